"""What a run is besides its tensors: step, cursor, tokens, and the random number generators."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        samples: global sample position; the next global batch starts here. It is the whole state of the data.
        tokens: tokens trained on.
        evaluation: numbers of the evaluation at this step; empty when there was none.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)

    def to_meta(self) -> dict[str, Any]:
        """As stored in a checkpoint."""
        return asdict(self)


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts and nothing else."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(*parts: object) -> None:
    """Seed the generators of python, numpy and torch (all devices) from `parts`."""
    seed = derived_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this rank, as JSON."""
    version, internal, gauss = random.getstate()
    # numpy types the legacy state as a union of tuple and dict; legacy=False gives the dict
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(internal), gauss],
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": _encode(numpy_state["state"]["key"].tobytes()),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _encode(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back as `rng_state` found them; the CUDA state is ignored on a machine without one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    stored = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": stored["bit_generator"],
            "state": {"key": np.frombuffer(_decode(stored["key"]), dtype=np.uint32), "pos": stored["pos"]},
            "has_gauss": stored["has_gauss"],
            "gauss": stored["gauss"],
        }
    )
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


class RngMark:
    """The generators of python, numpy and torch as they are now, to go back to; microseconds, unlike `rng_state`."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def go_back(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text)


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_decode(text)), dtype=torch.uint8)
