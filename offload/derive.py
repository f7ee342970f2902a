"""What DeepSpeed's NVMe swapping is told, derived from the partitions of the real model: pure arithmetic, no torch.

DeepSpeed steps a rank's optimizer state in sub-groups. Each is read from the drive into page-locked buffers, stepped, and
written back; the buffers are as large as the largest sub-group. Its defaults fit few models ("Not enough buffers",
"More elements than buffer size"), so sub-groups and buffers follow from the partitions here.

Source: deepspeed 0.19.8 runtime/zero/stage3.py:1210 (`_create_fp16_sub_groups`), runtime/swap_tensor/utils.py:14 (what is
swapped, and its alignment), optimizer_utils.py:180 (buffers), partitioned_param_swapper.py:104 (parameters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIB = 2**20
MIN_SWAPPED_BYTES = MIB
"""What is smaller stays in memory: DeepSpeed swaps no less than 1 MiB, nor less than a block."""
ALIGNED_BYTES = 1024
"""DeepSpeed pads what it swaps to a multiple of this, for each thread."""
FP32_BYTES = 4
OVERLAPS: dict[str, int] = {"none": 1, "read": 2, "write": 2, "both": 3}
"""Sub-groups that are in buffers at a time: the one that is stepped, the next, and the one before."""
SPARE_PARAM_BUFFERS = 2
"""For a parameter that is used again while it is held, such as a tied one."""


@dataclass(frozen=True)
class Aio:
    """How DeepSpeed's asynchronous I/O reads and writes one tensor.

    Attributes:
        block_bytes: of one request.
        queue_depth: requests on their way at a time, for each thread.
        threads: that share a tensor.
    """

    block_bytes: int = MIB
    queue_depth: int = 16
    threads: int = 1

    def __post_init__(self) -> None:
        assert self.block_bytes <= MIN_SWAPPED_BYTES, "larger blocks would raise what is swapped at all"


@dataclass(frozen=True)
class OptimizerSwap:
    """How one rank's masters and states are swapped.

    Attributes:
        sub_group_elements: `sub_group_size` for DeepSpeed.
        num_groups, num_swapped: sub-groups in all, and those of at least 1 MiB.
        buffer_count, buffer_bytes: page-locked buffers.
        nvme_bytes: of the swap files.
        memory_bytes: state that stays in memory, because it is too small.
    """

    sub_group_elements: int
    num_groups: int
    num_swapped: int
    buffer_count: int
    buffer_bytes: int
    nvme_bytes: int
    memory_bytes: int

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory of the buffers."""
        return self.buffer_count * self.buffer_bytes


@dataclass(frozen=True)
class ParamSwap:
    """How one rank's parts of the parameters are swapped.

    Attributes:
        buffer_elements: size of a buffer: that of the largest part.
        nvme_bytes, memory_bytes: parts in swap files, and those that are too small for it.
        reserve_bytes: of the buffer through which a stepped sub-group goes back to its files.
    """

    buffer_count: int
    buffer_elements: int
    buffer_bytes: int
    nvme_bytes: int
    memory_bytes: int
    reserve_bytes: int

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory of the buffers."""
        return self.buffer_count * self.buffer_bytes + self.reserve_bytes


class DoesNotFitError(Exception):
    """No sub-group size keeps the buffers in their budget; `needed_bytes` would."""

    def __init__(self, largest: int, buffer_count: int, needed_bytes: int) -> None:
        super().__init__(f"the largest parameter's part has {largest:,} elements")
        self.largest, self.buffer_count, self.needed_bytes = largest, buffer_count, needed_bytes


def part(num_elements: int, dp: int) -> int:
    """Elements of one rank's part of a parameter, with padding."""
    return -(-num_elements // dp)


def sub_groups(parts: Sequence[int], size: int) -> list[list[int]]:
    """Cut one param group as DeepSpeed does: a sub-group ends with the parameter that takes it to `size` or above."""
    if size >= sum(parts):
        return [list(parts)]
    groups: list[list[int]] = []
    current: list[int] = []
    for numel in parts:
        current.append(numel)
        if sum(current) >= size:
            groups.append(current)
            current = []
    return [*groups, current] if current else groups


def _aligned(num_bytes: int, aio: Aio) -> int:
    unit = ALIGNED_BYTES * aio.threads
    return -(-num_bytes // unit) * unit


def derive_optimizer(
    groups: Sequence[Sequence[int]],
    *,
    num_states: int,
    overlap: str,
    budget_bytes: int,
    aio: Aio,
    max_sub_group: int,
) -> OptimizerSwap:
    """Sub-groups and buffers for one rank's optimizer state.

    Args:
        groups: elements of this rank's part of each parameter, by param group of the optimizer, in its order.
        num_states: tensors that the optimizer keeps beside the master.
        overlap: a key of `OVERLAPS`.
        budget_bytes: page-locked memory that the buffers may take.
        max_sub_group: larger sub-groups are not wanted (`zero.sub_group_size`).

    Raises:
        DoesNotFitError: the buffers of the largest parameter's part alone are more than the budget.
    """
    # the state, its master, and a buffer that DeepSpeed takes for the gradient
    buffer_count = max(4, (num_states + 2) * OVERLAPS[overlap])
    largest = max((numel for group in groups for numel in group), default=0)
    limit = budget_bytes // buffer_count
    least = _aligned(FP32_BYTES * largest, aio)
    if least > limit:
        raise DoesNotFitError(largest, buffer_count, least * buffer_count)
    size = min(max_sub_group, max(1, limit // FP32_BYTES))
    cut = [each for group in groups for each in sub_groups(group, size)]
    while any(_aligned(FP32_BYTES * sum(each), aio) > limit for each in cut):
        size = max(1, size * 9 // 10)
        cut = [each for group in groups for each in sub_groups(group, size)]
    numels = [sum(each) for each in cut]
    swapped = [numel for numel in numels if numel * FP32_BYTES >= MIN_SWAPPED_BYTES]
    kept = sum(numels) - sum(swapped)
    return OptimizerSwap(
        sub_group_elements=size,
        num_groups=len(numels),
        num_swapped=len(swapped),
        buffer_count=buffer_count,
        buffer_bytes=_aligned(FP32_BYTES * max(numels, default=0), aio),
        nvme_bytes=sum(_aligned(FP32_BYTES * numel, aio) for numel in swapped) * (num_states + 1),
        memory_bytes=FP32_BYTES * kept * (num_states + 1),
    )


def live_params(names: Mapping[str, int], element_bytes: int, aio: Aio) -> int:
    """Most parameters in swap files that a forward or backward pass holds at a time: those of a module and its parents.

    Args:
        names: parameter -> elements of this rank's part.
    """
    per_module: dict[str, int] = {}
    for name, numel in names.items():
        if _is_swapped(numel, element_bytes, aio):
            module = name.rpartition(".")[0]
            per_module[module] = per_module.get(module, 0) + 1

    def with_parents(module: str) -> int:
        return sum(count for other, count in per_module.items() if module == other or module.startswith(f"{other}."))

    return max((with_parents(module) for module in per_module), default=0)


def sub_group_for_params(
    groups: Sequence[Sequence[int]], size: int, *, dp: int, element_bytes: int, budget_bytes: int, aio: Aio
) -> int:
    """The sub-group size, at most `size`, with which stepped parameters fit the buffer that DeepSpeed reserves for them.

    It reserves the whole parameters of the sub-group with most elements; another one may need more for its padding.
    """
    size = min(size, max(1, budget_bytes // (dp * element_bytes)))
    while size > 1:
        cut = [each for group in groups for each in sub_groups(group, size)]
        reserve = sum(_aligned(numel * dp * element_bytes, aio) for numel in max(cut, key=sum, default=[]))
        swapped = ([numel for numel in each if _is_swapped(numel, element_bytes, aio)] for each in cut)
        if all(sum(_aligned(numel * element_bytes, aio) for numel in each) <= reserve for each in swapped):
            return size
        size = size * 9 // 10
    return size


def _is_swapped(numel: int, element_bytes: int, aio: Aio) -> bool:
    return numel * element_bytes >= max(MIN_SWAPPED_BYTES, aio.block_bytes)


def derive_params(
    names: Mapping[str, int], groups: Sequence[Sequence[int]], *, dp: int, element_bytes: int, sub_group_elements: int, aio: Aio
) -> ParamSwap:
    """Buffers for one rank's parts of the parameters.

    Args:
        names: every parameter -> elements of this rank's part.
        groups: as for `derive_optimizer`.
        element_bytes: of the type that the model computes in.
        sub_group_elements: `OptimizerSwap.sub_group_elements`.
    """
    swapped = {name: numel for name, numel in names.items() if _is_swapped(numel, element_bytes, aio)}
    # what is not swapped there goes through DeepSpeed's buffers nowhere; one buffer there has to be
    largest = max(swapped.values(), default=MIN_SWAPPED_BYTES // element_bytes)
    cut = [each for group in groups for each in sub_groups(group, sub_group_elements)]
    widest = max(cut, key=sum, default=[])
    return ParamSwap(
        buffer_count=live_params(names, element_bytes, aio) + SPARE_PARAM_BUFFERS,
        buffer_elements=largest,
        buffer_bytes=_aligned(largest * element_bytes, aio),
        nvme_bytes=sum(_aligned(numel * element_bytes, aio) for numel in swapped.values()),
        memory_bytes=sum(names.values()) * element_bytes - sum(swapped.values()) * element_bytes,
        # DeepSpeed reserves the whole parameters of the largest sub-group, not their parts (stage3.py:1018)
        reserve_bytes=sum(_aligned(numel * dp * element_bytes, aio) for numel in widest),
    )
