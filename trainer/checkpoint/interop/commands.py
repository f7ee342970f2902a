"""The commands of `__main__.py` by name: from paths and options to a source and what becomes of it.

Each imports what it needs when it runs: transformers alone takes seconds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anyshard.configs.errors import CheckpointError, ConfigError, Problem
from anyshard.configs.frozen import CONFIG_FILE, checkpoint_dir_in
from anyshard.configs.places import is_remote, place
from anyshard.trainer.checkpoint import catalog
from anyshard.trainer.checkpoint.interop.source import Source, Stored
from anyshard.trainer.checkpoint.manifest import COMMIT

Report = Callable[[int, int], None]


def open_source(path: Path, *, weights_only: bool = False) -> Source:
    """The checkpoint at `path`, of whatever format.

    Args:
        weights_only: leave the optimizer states of a foreign checkpoint alone.

    Raises:
        CheckpointError: nothing is there that is known.
    """
    path = place(path)
    if is_remote(path):  # what others write is read from file systems only
        try:
            return Stored(catalog.resolve(path))
        except CheckpointError as error:
            text = "From an object store only checkpoints of anyshard are read: copy those of other formats here first."
            raise CheckpointError(f"{error} {text}") from error
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder.")
    if (path / COMMIT).exists() or catalog.list_checkpoints(path) or catalog.list_checkpoints(checkpoint_dir_in(path)):
        return Stored(catalog.resolve(path))
    for latest in ("latest", "latest_universal"):
        if (path / latest).is_file():
            tag = (path / latest).read_text(errors="replace").strip()
            if not tag or Path(tag).name != tag or not (path / tag).is_dir():
                raise CheckpointError(f"{path / latest}: it names {tag[:80]!r}, and there is no such folder beside it.")
            return open_source(path / tag, weights_only=weights_only)
    if (path / "zero").is_dir():
        from anyshard.trainer.checkpoint.interop.universal_source import UniversalSource

        with _malformed(path):
            return UniversalSource(path, weights_only=weights_only)
    if any(path.glob("*_model_states.pt")) or any(path.glob("*_optim_states.pt")):
        from anyshard.trainer.checkpoint.interop.deepspeed_source import DeepSpeedSource

        with _malformed(path):
            return DeepSpeedSource(path, weights_only=weights_only)
    if (path / "config.json").is_file():
        from anyshard.trainer.checkpoint.interop.hf_source import HfSource

        return HfSource(path)
    raise CheckpointError(
        f"{path}: there is no checkpoint here: give a run, a checkpoint, a Hugging Face folder (with config.json), "
        "a DeepSpeed checkpoint or a universal folder."
    )


@contextlib.contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """What follows from records that have another form than DeepSpeed gives them."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: its records are not those that DeepSpeed writes ({what}).") from error


def _export(
    source: str, out: str, to: str, dtype: str | None, max_shard_bytes: int, config: str | None, report: Report
) -> dict[str, Any]:
    stored = Stored(catalog.resolve(place(source)))
    if to == "universal":
        from anyshard.trainer.checkpoint.interop.universal_export import export_universal

        return export_universal(stored, Path(out), report=report)
    if to == "dcp":
        from anyshard.trainer.checkpoint.interop.dcp_export import export_dcp

        return export_dcp(stored, Path(out), report=report)
    from anyshard.trainer.checkpoint.interop.hf_export import export_hf

    return export_hf(
        stored,
        Path(out),
        run_dir=Path(source) if (Path(source) / CONFIG_FILE).is_file() else None,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        config_file=Path(config) if config else None,
        report=report,
    )


def _import(source: str, out: str, weights_only: bool, config: str | None, report: Report) -> dict[str, Any]:
    from anyshard.trainer.checkpoint.interop.rewrite import write_checkpoint

    opened = open_source(Path(source), weights_only=weights_only)
    if isinstance(opened, Stored):
        fix = "Resume from it as it is, or rewrite it with 'anyshard ckpt convert'."
        raise ConfigError(Problem("SOURCE", source, "it is a checkpoint of anyshard already.", fix))
    if config is not None:
        try:
            opened.record.meta["model"] = {"config": json.loads(Path(config).read_text())}
        except (OSError, ValueError) as error:
            reason = f"it cannot be read ({error})."
            raise ConfigError(Problem("--config", config, reason, "Give a config.json.")) from error
    return write_checkpoint(opened, Path(out), num_files=1, rank_meta=None, report=report)


def _convert(source: str, out: str, num_files: int | None, report: Report) -> dict[str, Any]:
    from anyshard.trainer.checkpoint.interop.rewrite import write_checkpoint

    stored = Stored(catalog.resolve(place(source)))
    wrote = stored.commit.world_size
    rank_meta = [manifest.meta for manifest in stored.manifests] if num_files in (None, wrote) else None
    if rank_meta is None and any(manifest.meta for manifest in stored.manifests):
        text = f"the random number generators of the {wrote} ranks are left out: a run that resumes seeds them anew"
        stored.record.notes.append(text)
    return write_checkpoint(stored, Path(out), num_files=num_files or wrote, rank_meta=rank_meta, report=report)


def _diff(a: str, b: str, weights_only: bool, report: Report) -> dict[str, Any]:
    from anyshard.trainer.checkpoint.interop.diff import diff

    left, right = (open_source(Path(path), weights_only=weights_only) for path in (a, b))
    return diff(left, right, weights_only=weights_only, report=report)


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "export": _export,
    "import": _import,
    "convert": _convert,
    "diff": _diff,
}
"""Name -> function of the request's other keys and `report`; returns JSON."""
