"""Experiment trackers. wandb is imported when it is chosen and not before; without a key it works offline."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from anyshard.configs import schema
from anyshard.configs.errors import EnvError
from anyshard.trainer.wandb_key import find_key

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the records of `metrics.jsonl`."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record; it has "step" and numbers with slashes in their names."""

    def finish(self, *, failed: bool) -> None:
        """End the run."""


class Wandb:
    """A wandb run; its id is kept in the run directory so that a resumed run continues it.

    Raises:
        EnvError: wandb cannot start: no key, no network.
    """

    def __init__(self, config: schema.Config, run_dir: Path) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        mode = wandb_mode(config.tracking.mode)
        try:
            self._run = self._init(wandb, config, run_dir, run_id, mode)
        except wandb.Error as error:
            raise EnvError(
                f"tracking.mode={mode}: wandb cannot start ({error}). Run 'wandb login', or set tracking.mode=offline."
            ) from error
        id_file.write_text(run_id)
        self._run.define_metric("tokens")
        logger.info("wandb run %s in mode %s", run_id, mode)

    @staticmethod
    def _init(wandb: Any, config: schema.Config, run_dir: Path, run_id: str, mode: str) -> Any:
        options = config.tracking
        return wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags or None,
            name=config.run.name,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=run_dir,
            config=_plain(asdict(config)),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def log(self, record: dict[str, Any]) -> None:
        """Send one record."""
        self._run.log({k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}, step=record["step"])

    def finish(self, *, failed: bool) -> None:
        """End the wandb run."""
        self._run.finish(exit_code=int(failed))


def wandb_mode(mode: schema.WandbMode) -> str:
    """The mode wandb is started in: what was asked, `WANDB_MODE`, or by whether there is an API key."""
    if mode is not schema.WandbMode.auto:
        return str(mode.value)
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    key = find_key()
    if key.problem:
        logger.warning("%s, so there is no wandb key", key.problem)
    return "online" if key.source else "offline"


def build_trackers(config: schema.Config, run_dir: Path, *, rank: int) -> list[Tracker]:
    """The trackers of rank 0; none on other ranks."""
    return [Wandb(config, run_dir)] if rank == 0 and config.tracking.name == "wandb" else []


def _plain(value: Any) -> Any:
    """Enums by value, so that wandb's config holds words."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return getattr(value, "value", value)
