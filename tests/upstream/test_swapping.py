"""What DeepSpeed's swapping does today that `offload/` works around."""

from __future__ import annotations

import pytest
from helpers.ranks import run_ranks
from helpers.upstream import line, still

MENDING = "offload/mending.py"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("runtime/zero/stage3.py:1110", "for i, tensor in enumerate(self.fp16_partitioned_groups_flat):"),
        ("runtime/zero/stage3.py:1210", "def _create_fp16_sub_groups(self, params_group):"),
        ("runtime/zero/stage3.py:1443", "def _offload_grad_partition_at_boundary("),
        ("runtime/zero/stage3.py:2710", "def _optimizer_states_and_gradient_swap_in("),
        ("runtime/zero/stage3.py:2761", "def _optimizer_states_and_gradient_swap_out("),
        ("runtime/swap_tensor/utils.py:14", "MIN_AIO_BYTES = 1024**2"),
        ("runtime/swap_tensor/utils.py:15", "AIO_ALIGNED_BYTES = 1024"),
        ("runtime/swap_tensor/optimizer_utils.py:33", "self.swap_path = os.path.join(swap_folder"),
        ("ops/csrc/aio/common/deepspeed_aio_common.cpp:112", "static int _do_io_complete("),
    ],
)
def test_where_things_are(where, text):
    assert text in line(where), f"{where} is now {line(where)!r}"


def _read_into_the_middle(folder):
    """Bytes that a read into a page-locked buffer brings, at an aligned and at another address."""
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder

    handle = AsyncIOBuilder().load(verbose=False).aio_handle(2**20, 8, False, True, 1)
    numel = 2**18
    file = f"{folder}/x.swp"
    buffer = handle.new_cpu_locked_tensor(2 * numel, torch.zeros(1))
    buffer.fill_(7)
    handle.sync_pwrite(buffer.narrow(0, 0, numel), file, 0)
    found = []
    for start in (numel, numel - 100):
        buffer.zero_()
        target = buffer.narrow(0, start, numel)
        handle.async_pread(target, file, 0)
        assert handle.wait() == 1
        found.append(bool((target == 7).all()))
    handle.free_cpu_locked_tensor(buffer)
    return found


@pytest.mark.dist
def test_a_request_that_fails_goes_unnoticed(tmp_path):
    """DeepSpeed reads gradients so: into the middle of a buffer, at whatever address the parameter's offset comes to."""
    (found,) = run_ranks(_read_into_the_middle, 1, folder=str(tmp_path))
    assert found[0], "an aligned read works"
    still(
        not found[1],
        "ops/csrc/aio/common/deepspeed_aio_common.cpp:112",
        "static int _do_io_complete(",
        f"{MENDING}: gradients could be swapped again",
    )
