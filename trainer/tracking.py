"""Experiment trackers. wandb is imported when it is chosen and not before; without a key it works offline."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import asdict
from netrc import netrc
from pathlib import Path
from typing import Any, Protocol

from anyshard.configs import schema
from anyshard.configs.errors import EnvError

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
        options = config.tracking
        try:
            self._run = self._init(wandb, config, run_dir, run_id)
        except wandb.Error as error:
            mode = wandb_mode(options.mode)
            raise EnvError(
                f"tracking.mode={mode}: wandb cannot start ({error}). Run 'wandb login', or set tracking.mode=offline."
            ) from error
        id_file.write_text(run_id)
        self._run.define_metric("tokens")
        logger.info("wandb run %s in mode %s", run_id, wandb_mode(options.mode))

    @staticmethod
    def _init(wandb: Any, config: schema.Config, run_dir: Path, run_id: str) -> Any:
        options = config.tracking
        return wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags or None,
            name=config.run.name,
            id=run_id,
            resume="allow",
            mode=wandb_mode(options.mode),
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


def wandb_mode(mode: schema.WandbMode) -> Any:
    """The mode wandb is started in: what was asked, `WANDB_MODE`, or by whether there is an API key."""
    if mode is not schema.WandbMode.auto:
        return mode.value
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Whether an API key is in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.exists() and netrc(path).authenticators("api.wandb.ai") is not None


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
