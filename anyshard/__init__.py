"""anyshard: distributed training over DeepSpeed, composed with Hydra, resumable on any other layout.

The public surface is three functions, loaded on first use so that `import anyshard` costs no torch import:
`compose` (overrides -> Config), `plan` (Config -> Plan, before anything starts) and `fit` (train, on every rank).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "Task", "__version__", "compose", "fit", "plan"]

_LAZY = {
    "compose": "anyshard.configs.compose",
    "Config": "anyshard.configs.schema",
    "plan": "anyshard.launch.plan",
    "fit": "anyshard.trainer.fit",
    "Task": "anyshard.trainer.task",
}

for _part in ("configs", "parallel", "offload", "trainer", "launch"):
    if not (Path(__file__).parent / _part).is_dir():
        raise ImportError(
            f"anyshard/{_part} is not a directory: the links anyshard/{_part} -> ../{_part} were lost in this checkout. "
            "Restore them with 'git config core.symlinks true && git checkout -- anyshard', or install the wheel."
        )

if TYPE_CHECKING:
    from anyshard.configs.compose import compose
    from anyshard.configs.schema import Config
    from anyshard.launch.plan import plan
    from anyshard.trainer.fit import fit
    from anyshard.trainer.task import Task


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'anyshard' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_LAZY[name]), name)
