from __future__ import annotations

import numpy as np
import pytest
import torch

from anyshard.trainer.batch import BatchPlan
from anyshard.trainer.data.loader import Loader, collate_tokens
from anyshard.trainer.data.order import SampleOrder
from anyshard.trainer.data.tokens import TokenDataset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def test_batches_on_the_device_equal_those_on_the_host() -> None:
    tokens = np.arange(60_000, dtype=np.uint16)
    data = TokenDataset(tokens, np.arange(500, 60_001, 500), sequence_length=256, separate_documents=True)
    keys = {"collate": collate_tokens, "order": SampleOrder(len(data), 1), "batch": BatchPlan(16, 4, 2, 2), "dp_rank": 1}
    host, device = Loader(data, device="cpu", **keys), Loader(data, device="cuda", **keys)
    for step in range(50):
        for here, there in zip(host.step(step * 16), device.step(step * 16), strict=True):
            assert all(there[name].is_cuda and torch.equal(there[name].cpu(), here[name]) for name in here)
    host.close()
    device.close()
