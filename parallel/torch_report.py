"""`python -m anyshard.parallel.torch_report`: what torch sees on this host, as one line of JSON.

A process of its own, so that the host's commands need not import torch.
"""

from __future__ import annotations

import json

import torch


def report() -> dict[str, object]:
    """Build and devices of torch."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "num_devices": torch.cuda.device_count(),
        "num_threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(report()))
