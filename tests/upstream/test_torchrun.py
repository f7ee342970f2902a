"""What of torchrun's own code ours depends on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path


def test_the_agents_store_is_left_by_a_variable_that_is_still_read() -> None:
    """distributed/elastic/rendezvous/dynamic_rendezvous.py:1146; launch/backend_torchrun.py sets it with max_restarts.

    That restarted ranks come up with it is tested in tests/e2e/test_backends.py.
    """
    import torch

    file = Path(torch.__file__).parent / "distributed/elastic/rendezvous/dynamic_rendezvous.py"
    found = file.read_text().splitlines()[1145]
    assert 'os.getenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"' in found, (
        f"torch {version('torch')} decides otherwise: look again at launch/backend_torchrun.py and correct the line number"
    )
