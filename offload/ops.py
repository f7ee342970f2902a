"""DeepSpeed's compiled operators: built here one at a time, and loaded where the optimizer state lives on the CPU.

`python -m anyshard.offload.ops build [NAME ...]` builds what runs on this machine need (`make setup` calls it);
`python -m anyshard.offload.ops status` says what there is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from anyshard.configs.errors import EnvError
from anyshard.offload.op_cache import (
    BUILD_TIME,
    DEFAULT_OPS,
    OPS,
    OpStatus,
    extensions_dir,
    needed_ops,
    op_env,
    remove_stale_locks,
    status,
)

__all__ = ["build", "cpu_optimizer", "extensions_dir", "needed_ops", "op_env", "remove_stale_locks", "status"]


def build(names: Sequence[str] = DEFAULT_OPS, say: Callable[[str], None] = print) -> None:
    """Build the operators that are not built yet, one after another, in this process.

    Args:
        names: keys of `OPS`.
        say: receives a line before and after each build.

    Raises:
        EnvError: an operator is unknown, something its build needs is not installed, or it does not compile.
    """
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise EnvError(f"no operator is called {', '.join(unknown)}: there are {', '.join(OPS)}.")
    os.environ.update(op_env())
    for lock in remove_stale_locks():
        say(f"removed {lock}: a build that was killed had left it")
    todo = [entry for entry in status(names) if entry.state != "built"]
    for number, entry in enumerate(todo, start=1):
        say(f"building {entry.op.name} ({number} of {len(todo)}; {BUILD_TIME}) ...")
        start = time.monotonic()
        _build(entry)
        say(f"built {entry.op.name} in {time.monotonic() - start:.0f} s")
    if not todo:
        say(f"operators {', '.join(names)} are built in {extensions_dir()}")


def default_ops() -> list[str]:
    """What every run on this machine may need: the operators of host memory, and that of drives where libaio is there."""
    (drive,) = status(["async_io"])
    return [*DEFAULT_OPS, *([] if drive.state == "missing" else ["async_io"])]


def _build(entry: OpStatus) -> None:
    what = f"DeepSpeed's operator {entry.op.name} ({entry.op.used_for})"
    if entry.state == "missing":
        raise EnvError(f"{what} cannot be built: {entry.reason} {entry.fix}")
    from deepspeed.ops.op_builder import cpu  # these run on the host, whatever the accelerator

    try:
        getattr(cpu, entry.op.builder)().load(verbose=False)
    except Exception as error:  # torch raises RuntimeError, ImportError and CalledProcessError
        log = "\n".join(str(error).splitlines()[-20:])
        again = f"{sys.executable} -m anyshard.offload.ops build {entry.op.name}"
        raise EnvError(
            f"{what} did not compile. To try again, remove {extensions_dir() / entry.op.library} and run '{again}'. "
            f"The compiler's last words:\n{log}"
        ) from error


def cpu_optimizer(name: str) -> Any:
    """DeepSpeed's vectorised optimizer class for state on the CPU: "adamw" or "lion".

    Its first instance loads the operator, which takes a minute where it was not built before.

    Raises:
        ValueError: DeepSpeed has none of this name.
    """
    if name == "adamw":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam
    if name == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion

        return DeepSpeedCPULion
    raise ValueError(f"DeepSpeed has no CPU optimizer for {name!r}: adamw and lion are what it has")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m anyshard.offload.ops", description="Build DeepSpeed's operators.")
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="build operators that are not built yet")
    builder.add_argument("names", nargs="*", help=f"of {', '.join(OPS)}; default: those that can be built here")
    commands.add_parser("status", help="print the state of each operator")
    args = parser.parse_args(argv)
    if args.command == "status":
        for entry in status():
            print(f"{entry.op.name:10} {entry.state:10} {entry.reason} {entry.fix}".rstrip())
        return 0
    try:
        build(args.names or default_ops(), say=lambda line: print(line, flush=True))
    except EnvError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
