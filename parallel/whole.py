"""What the whole model holds of which a pipeline stage has a part: written on the stage, read by checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ATTRIBUTE = "anyshard_whole"


@dataclass(frozen=True)
class Whole:
    """The whole model by canonical names.

    Attributes:
        params, buffers: global shape of each parameter and persistent buffer; tied ones under their first name.
        tied: other name -> first name.
        copies: what this rank's stage holds and another stage writes.
    """

    params: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    copies: frozenset[str] = frozenset()


def mark_whole(module: Any, whole: Whole) -> None:
    """Say what `module` is a stage of."""
    setattr(module, _ATTRIBUTE, whole)


def whole_of(module: Any) -> Whole | None:
    """What `module` is a stage of; None for a module that is whole itself."""
    found: Whole | None = getattr(module, _ATTRIBUTE, None)
    return found
