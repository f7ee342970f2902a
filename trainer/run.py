"""One rank as a process: `python -m anyshard.trainer.run --run-dir DIR`, or with overrides, under any launcher.

`fit` does the work; this file turns what happens into exit codes, per-rank logs, and a record of the failure that the
launcher shows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from anyshard.configs import frozen
from anyshard.configs.compose import compose, split_arguments
from anyshard.configs.errors import EXIT_DONE, EXIT_REQUEUE, AnyshardError, ConfigError, HostLostError
from anyshard.configs.writing import writing
from anyshard.parallel.parent import signal_when_parent_dies
from anyshard.parallel.rank_env import is_restart, rank_of
from anyshard.trainer.failing import record_failure
from anyshard.trainer.signals import Interrupted, Signals

logger = logging.getLogger(__name__)

USAGE = "usage: python -m anyshard.trainer.run --run-dir DIR | [overrides ...] [--config-dir DIR]"


def main(argv: list[str]) -> int:
    """Run this rank; returns its exit code."""
    signals = Signals()
    signals.install()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun that is killed cannot end its ranks
        signal_when_parent_dies(signal.SIGTERM)
    stderr = os.dup(2)
    redirected = False

    def lost(error: HostLostError, host: str) -> None:
        _exit(record_failure(error, stderr, redirected=True, host=host))

    try:
        # the deepspeed launcher adds it, and says the same by LOCAL_RANK
        argv = [argument for argument in argv if not re.fullmatch(r"--local[-_]rank=\d+", argument)]
        if argv and argv[0] in ("-h", "--help"):
            print(USAGE)
            return EXIT_DONE
        if argv and argv[0] == "--run-dir":
            if len(argv) != 2:
                raise ConfigError(f"--run-dir takes one folder and nothing else. {USAGE}")
            run_dir = Path(argv[1])
            config = frozen.load_frozen(run_dir)
            if is_restart(os.environ):
                config = frozen.after_restart(config, run_dir)
            _redirect(run_dir)
            redirected = True
            from anyshard.trainer.fit import fit_as_process

            outcome = fit_as_process(config, signals=signals, on_agreed=lambda run_dir: None, on_lost=lost)
        else:
            from anyshard.trainer.fit import fit_as_process

            def log_to(run_dir: Path) -> None:
                nonlocal redirected
                _redirect(run_dir)
                redirected = True

            overrides, config_dir = split_arguments(argv)
            outcome = fit_as_process(
                # rank 0 alone calls it, and pays for Hydra
                lambda: compose(overrides, config_dir=config_dir),
                signals=signals,
                overrides=overrides,
                timeout_s=_timeout_s(overrides),
                on_agreed=log_to,
                on_lost=lost,
            )
    except Interrupted as interruption:
        logger.warning("%s", interruption)
        return stop_code(os.environ)
    except BaseException as error:
        return _fail(error, stderr, redirected=redirected, interrupted=signals.received is not None and not signals.training)
    return stop_code(os.environ) if outcome.stopped else EXIT_DONE


def _timeout_s(overrides: Sequence[str]) -> float | None:
    """`launch.timeout_s` as the command line has it: the ranks meet before rank 0 composes."""
    given = [text.partition("=")[2] for text in overrides if text.lstrip("+").startswith("launch.timeout_s=")]
    with contextlib.suppress(ValueError, IndexError):  # composing has more to say about a wrong one
        return float(given[-1])
    return None


def stop_code(environ: Mapping[str, str]) -> int:
    """The exit code of a rank that stops as asked: 75, but not where torchrun would take that for a failure and restart it."""
    return EXIT_DONE if int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) else EXIT_REQUEUE


def _redirect(run_dir: Path) -> None:
    """Send this rank's output to its log file; rank 0 keeps the console for what people read."""
    rank = rank_of(os.environ)
    log = run_dir / "logs" / f"rank{rank:05d}.log"
    with writing(run_dir):
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(descriptor, 2)
    if rank != 0:
        os.dup2(descriptor, 1)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s {rank} %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler(sys.stderr)],
    )
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.WARNING)
        console.addFilter(lambda record: record.name.startswith("anyshard"))
        console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logging.getLogger().addHandler(console)


def _fail(error: BaseException, stderr: int, *, redirected: bool, interrupted: bool = False) -> int:
    """Record why this rank ends; returns the exit code.

    Args:
        interrupted: a signal had asked it to end before it began to train, which is why it ends, whatever came of it.
    """
    if interrupted and not isinstance(error, AnyshardError):
        return stop_code(os.environ)
    return record_failure(error, stderr, redirected=redirected)


def _exit(code: int) -> NoReturn:
    """Leave at once: destructors of process groups may wait for ranks that are gone."""
    with contextlib.suppress(OSError):  # a full disk or a closed terminal must not change the exit code
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main(sys.argv[1:]))
