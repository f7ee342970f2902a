"""What DeepSpeed's swapping of optimizer state leaves to be mended, on one engine: gradients, memory, and files by name.

- Gradients stay where they are accumulated. DeepSpeed writes those of at least 1 MiB to the drive and reads them back, into
  the middle of a buffer: direct I/O wants an address that is aligned, the request fails, nobody looks, and the optimizer steps
  with whatever the buffer held. They are in host memory anyway, so that writing them saves nothing either.
- What no gradient covers is zero, not the bytes of the sub-group before.
- Once a sub-group is written its tensors are let go. With overlapped writing DeepSpeed keeps those that the first step
  made, which is all states of the model, until the next step.

`tests/upstream/test_swapping.py` holds each of them against the installed DeepSpeed.

Source: deepspeed 0.19.8 runtime/zero/stage3.py:1443, runtime/swap_tensor/optimizer_utils.py:151, :479 and
pipelined_optimizer_swapper.py:198.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from anyshard.offload.derive import ALIGNED_BYTES, FP32_BYTES, MIN_SWAPPED_BYTES, sub_groups


def optimizer_files(
    groups: Sequence[Sequence[Any]], states: Iterable[str], *, folder: Path, rank: int, sub_group_elements: int, threads: int
) -> dict[Path, int]:
    """The files that DeepSpeed will swap one rank's masters and states to, with their sizes.

    Args:
        groups: the parameters of the optimizer's groups, partitioned.
        folder: `nvme_path` of the optimizer.
        threads: of its asynchronous I/O.

    Source: deepspeed 0.19.8 runtime/zero/stage3.py:1110 (`ds_id` of a sub-group), swap_tensor/optimizer_utils.py:33, :492.
    """
    home = folder / "zero_stage_3" / "optimizer" / f"rank{rank}"
    files: dict[Path, int] = {}
    for group in groups:
        params = iter(group)
        for numels in sub_groups([param.partition_numel() for param in group], sub_group_elements):
            members = [next(params) for _ in numels]
            num_bytes = sum(numels) * FP32_BYTES
            if num_bytes >= MIN_SWAPPED_BYTES:
                unit = ALIGNED_BYTES * threads
                name = f"{members[0].ds_id}_{members[-1].ds_id}.tensor.swp"
                for prefix in ("", *(f"{state}-" for state in states)):
                    files[home / f"{prefix}{name}"] = -(-num_bytes // unit) * unit
    return files


def param_files(params: Iterable[Any]) -> dict[Path, int]:
    """The files of the parameters that live on the drive, with their sizes."""
    return {
        Path(param.nvme_swapper.get_path(param)): param.nvme_swapper._io_aligned_numel(param.partition_numel())
        * param.ds_tensor.element_size()
        for param in params
        if getattr(param.ds_tensor.final_location, "value", param.ds_tensor.final_location) == "nvme"
    }


def mend(optimizer: Any) -> None:
    """Mend the swapping of a ZeRO-3 optimizer; does nothing where it does not swap."""
    swapper = optimizer.optimizer_swapper
    if swapper is None:
        return
    at_boundary, retrieve = optimizer._offload_grad_partition_at_boundary, swapper._retrieve_unswapped_grad_partitions

    def keep_gradient(param: Any, gradient: torch.Tensor, gradients: Any, offsets: Any) -> None:
        param_id = optimizer.get_param_id(param)
        number, start, _ = optimizer.grad_position[param_id]
        if not optimizer._swappable_optimizer_subgroup(number):
            at_boundary(param, gradient, gradients, offsets)
            return
        optimizer.norm_for_param_grads[param_id] = optimizer._constant_buffered_norm2(gradient)
        accumulated = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[param.ds_id]
        info = swapper.swap_params_info[optimizer.fp32_partitioned_groups_flat[number].ds_id]
        info.unswapped_gradients[start] = accumulated.narrow(0, 0, gradient.numel())

    def retrieve_all(swap_info: Any, dest_buffer: torch.Tensor) -> None:
        if sum(part.numel() for part in swap_info.unswapped_gradients.values()) < dest_buffer.numel():
            dest_buffer.zero_()
        retrieve(swap_info, dest_buffer)

    optimizer._offload_grad_partition_at_boundary = keep_gradient
    swapper._retrieve_unswapped_grad_partitions = retrieve_all
    if hasattr(swapper, "_complete_swap_out"):
        _release_when_written(swapper)


def _release_when_written(swapper: Any) -> None:
    complete = swapper._complete_swap_out

    def complete_and_release(kind: str) -> None:
        written = swapper.swap_ops[kind].param_info
        complete(kind)
        written.release_memory()

    swapper._complete_swap_out = complete_and_release


def swapped_tensors(optimizer: Any) -> Mapping[int, Path]:
    """id of each master and state that is in a swap file between steps -> the file."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    infos = swapper.swap_params_info.values() if swapper is not None else ()
    return {id(context.compute_tensor): Path(context.swap_path) for info in infos for context in info.tensors}
