from __future__ import annotations

import threading

import pytest
import torch

from anyshard.trainer.checkpoint.layout import Fragment
from anyshard.trainer.checkpoint.manifest import Tensor
from anyshard.trainer.checkpoint.snapshot import FilePlan, Snapshot, UpdateGuard
from anyshard.trainer.checkpoint.staging import StagingPool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def test_a_step_on_the_device_waits_for_the_copy() -> None:
    """The host does not wait: the step's kernels are queued behind the copies."""
    weights = [torch.nn.Parameter(torch.full((20_000_000,), float(number), device="cuda")) for number in range(4)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    pool, guard = StagingPool(32, pinned=True), UpdateGuard()
    fragments = [
        Fragment(Tensor(str(number), "param", "float32", (20_000_000,)), 0, weight.detach().view(-1), False, owner=weight)
        for number, weight in enumerate(weights)
    ]
    for _ in range(3):
        expected = [float(weight.detach()[0]) for weight in weights]
        snapshot = Snapshot(FilePlan.of(fragments, 16 * 2**20, pool.block_bytes), pool)
        guard.protect(snapshot, [optimizer])
        copier = threading.Thread(target=snapshot.copy, args=[lambda: None])
        copier.start()
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        for filled in snapshot.blocks():
            for piece in filled.pieces:
                held = torch.frombuffer(bytearray(filled.bytes_of(piece)), dtype=torch.float32)
                assert bool((held == expected[int(piece.fragment.tensor.name)]).all())
        copier.join(10)
        assert [float(weight.detach()[0]) for weight in weights] == [value - 1 for value in expected]
