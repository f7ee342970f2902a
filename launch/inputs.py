"""What can be refused before any rank starts: data, tokenizer or checkpoint that is not there, folders that cannot be written.

Nothing is changed here and nothing heavy is imported. Where ranks run on other hosts, they look again themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from anyshard.configs import schema
from anyshard.configs.errors import CheckpointError, ConfigError, Problem
from anyshard.configs.frozen import checkpoint_dir_of, run_dir_of
from anyshard.configs.places import is_remote, place
from anyshard.configs.writing import check_writable
from anyshard.trainer.checkpoint.catalog import list_checkpoints, resolve
from anyshard.trainer.data.cache import cache_root
from anyshard.trainer.data.files import check_paths
from anyshard.trainer.data.vocabulary import tokenizer_ids


def check_inputs(config: schema.Config) -> None:
    """Refuse a configuration whose inputs are not there, or whose outputs could not be written.

    Raises:
        ConfigError, DataError: with every problem found.
        EnvError: a folder cannot be written.
    """
    problems: list[Problem] = []
    error: ConfigError | None = None
    checks: list[Callable[[], object]] = [
        lambda: check_paths(config.data),
        lambda: tokenizer_ids(config.data.tokenizer),
        lambda: check_resume(config),
    ]
    for check in checks:
        try:
            check()
        except ConfigError as found:
            error = found
            problems += found.problems
    if error is not None:
        raise error if len(problems) == 1 else ConfigError(problems)
    check_writable("run.dir", run_dir_of(config))
    if not is_remote(checkpoint_dir_of(config)):  # ranks find out, before they train
        check_writable("checkpoint.dir", checkpoint_dir_of(config))
    check_writable("data.cache_dir", cache_root(config.data))


def check_resume(config: schema.Config) -> None:
    """Refuse to start where the checkpoint that `resume` demands does not exist; whether it is sound, ranks find out together.

    Raises:
        ConfigError: there is none.
    """
    wanted, folder = config.resume, checkpoint_dir_of(config)
    if wanted == "must" and not list_checkpoints(folder):
        fix = "Set resume=auto to start anew, or checkpoint.dir to where they are."
        raise ConfigError(Problem("resume", "must", f"there is no checkpoint in {folder}.", fix))
    if wanted in schema.RESUME_WORDS:
        return
    if not is_remote(wanted) and not Path(wanted).exists():
        fix = "Give a run directory, a step-XXXXXXXX directory, or auto, never or must."
        raise ConfigError(Problem("resume", wanted, "there is no such directory.", fix))
    try:
        resolve(place(wanted))
    except CheckpointError as error:
        fix = "Give a run directory or a step-XXXXXXXX directory, or look with 'anyshard ckpt ls'."
        raise ConfigError(Problem("resume", wanted, "no sound checkpoint is there.", fix)) from error
