"""What `anyshard ckpt ls|show|verify|prune` print: the checkpoints of a run, without torch and without a device."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from anyshard.configs.errors import EXIT_DONE, EXIT_FAILED, CheckpointError, EnvError
from anyshard.configs.frozen import checkpoint_dir_in
from anyshard.configs.places import is_remote, place
from anyshard.launch.console import make_console
from anyshard.trainer.checkpoint import catalog, ram, retention
from anyshard.trainer.checkpoint.manifest import BUFFER, COMMIT, PARAM, Commit, Manifest
from anyshard.trainer.checkpoint.store import store_of


def ls(run_or_dir: Path, *, as_json: bool = False) -> int:
    """List the checkpoints of a run (or of a directory of them, or one alone), newest first; those that are not sound say why.

    Returns:
        0, also when some are damaged; 1 when there are none.

    Raises:
        CheckpointError: one alone whose directory has another name, and that cannot be read.
    """
    run_or_dir = place(run_or_dir)
    rows = [_row(each) for each in _found(run_or_dir)]
    if as_json:
        print(json.dumps(rows))
    elif rows:
        table = Table(
            "step", "created", "saved under", "size", "eval loss", "state", title=str(run_or_dir), title_justify="left"
        )
        for row in rows:
            state = ("damaged" if row["problem"] else "complete") + (", in shared memory" if row["in_memory"] else "")
            loss = row["evaluation"].get("loss")
            shown = "" if loss is None else f"{loss:.4f}"
            table.add_row(str(row["step"]), row["created"], row["layout"], _size(row["num_bytes"]), shown, state)
        console = make_console()
        console.print(table)
        for row in rows:
            if row["problem"]:
                console.print(f"step {row['step']}: {row['problem']}", highlight=False, soft_wrap=True, markup=False)
    else:
        Console(stderr=True).print(f"{run_or_dir}: no checkpoints", highlight=False)
    return EXIT_DONE if rows else EXIT_FAILED


def _folders(run_or_dir: Path) -> tuple[Path, Path]:
    """Where checkpoints may be."""
    return run_or_dir, run_or_dir / "checkpoints" if is_remote(run_or_dir) else checkpoint_dir_in(run_or_dir)


def _found(path: Path) -> list[catalog.Found]:
    has_commit = (path / COMMIT).is_file()
    step = catalog.step_of(path)
    if step is None and has_commit:
        step = catalog.read_commit(path).step  # written by 'ckpt import' or 'convert', under any name
    if step is not None and (has_commit or (path.is_dir() and not is_remote(path))):
        return [catalog.Found(path, step, catalog.structure_problem(path))]
    folders = _folders(path) if is_remote(path) else (*_folders(path), ram.folder_of(path))
    found = [each for directory in folders for each in catalog.list_checkpoints(directory)]
    return sorted(found, key=lambda each: each.step, reverse=True)


def _row(found: catalog.Found) -> dict[str, Any]:
    row = {
        "step": found.step,
        "path": str(found.path),
        "in_memory": found.path.is_relative_to(ram.SHARED_MEMORY),
        "created": "",
        "layout": "",
        "num_bytes": 0,
        "evaluation": {},
        "problem": found.problem,
    }
    if found.problem is None:
        commit = catalog.read_commit(found.path)
        num_bytes = sum(file.stat().st_size for file in found.path.iterdir())
        row |= {"created": commit.created, "layout": _layout(commit.layout), "num_bytes": num_bytes}
        row["evaluation"] = commit.meta.get("evaluation", {})
    return row


def show(path: Path, *, as_json: bool = False) -> int:
    """Describe a checkpoint (or the newest of a run): where it comes from and what it holds.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = catalog.resolve(place(path))
    commit = catalog.read_commit(path)
    manifests = catalog.read_manifests(path, commit)
    content = _content(path, commit, manifests)
    if as_json:
        print(json.dumps(content))
        return EXIT_DONE
    console = make_console()
    facts = Table("", "", title=str(path), title_justify="left", show_header=False)
    for name in ("step", "created", "layout", "versions", "optimizer", "groups", "engine", "meta"):
        value = content[name]
        facts.add_row(name, _words(value) if isinstance(value, Mapping) else str(value))
    console.print(facts)
    states = Table("state", "dtype", "tensors", "elements", "size")
    for state in content["states"]:
        states.add_row(state["key"], state["dtype"], str(state["tensors"]), f"{state['numel']:,}", _size(state["num_bytes"]))
    console.print(states)
    tensors = Table("tensor", "shape", "states")
    for tensor in content["tensors"]:
        tensors.add_row(tensor["name"], " x ".join(map(str, tensor["shape"])) or "scalar", ", ".join(tensor["keys"]))
    console.print(tensors)
    return EXIT_DONE


def _content(path: Path, commit: Commit, manifests: list[Manifest]) -> dict[str, Any]:
    tensors: dict[str, dict[str, Any]] = {}
    states: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: {"tensors": 0, "numel": 0, "num_bytes": 0})
    for (name, key), chunks in catalog.index_chunks(manifests).items():
        tensor = chunks[0].tensor
        tensors.setdefault(name, {"name": name, "shape": list(tensor.shape), "keys": []})["keys"].append(key)
        sums = states[key, tensor.dtype]
        sums["tensors"] += 1
        sums["numel"] += tensor.numel
        sums["num_bytes"] += sum(chunk.nbytes for chunk in chunks)
    order = {PARAM: 0, BUFFER: 2}
    return {
        "path": str(path),
        "step": commit.step,
        "created": commit.created,
        "layout": commit.layout,
        "versions": commit.versions,
        "optimizer": commit.optimizer["class"],
        "groups": commit.optimizer["groups"],
        "engine": commit.engine,
        "meta": commit.meta,
        "tied": commit.tied,
        "states": [
            {"key": key, "dtype": dtype, **sums}
            for (key, dtype), sums in sorted(states.items(), key=lambda item: (order.get(item[0][0], 1), item[0]))
        ],
        "tensors": list(tensors.values()),
    }


def verify(path: Path, *, as_json: bool = False) -> int:
    """Check every byte of a checkpoint (or of the newest of a run) against its checksums.

    Returns:
        0 when it is whole, 1 when anything is damaged; the damages are listed.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    path = catalog.resolve(place(path))
    damages = _verify(path, show_progress=not as_json)
    if as_json:
        print(json.dumps({"path": str(path), "damages": [vars(damage) for damage in damages]}))
        return EXIT_FAILED if damages else EXIT_DONE
    console = make_console()
    if not damages:
        console.print(f"{path}: every byte is as it was written", highlight=False, soft_wrap=True)
        return EXIT_DONE
    for damage in damages:
        console.print(f"{path}: {damage}", highlight=False, soft_wrap=True, markup=False)
    return EXIT_FAILED


def _verify(path: Path, *, show_progress: bool) -> list[catalog.Damage]:
    columns = (TextColumn(f"verifying {path.name}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, disable=not show_progress) as progress:
        task = progress.add_task("verify", total=None)
        return catalog.verify(path, lambda done, total: progress.update(task, completed=done, total=total))


def prune(run: Path, *, keep: int, keep_every: int = 0, dry_run: bool = False, as_json: bool = False) -> int:
    """Remove the checkpoints of a run that are older than its `keep` newest good ones; returns 0.

    Those that stay are read to the last byte, since only they make the others superfluous. A damaged one does not count, and
    goes when it is older than all that stay.

    Raises:
        CheckpointError: there is no good checkpoint, or a save is going on.
        EnvError: one could not be removed.
    """
    folders = _folders(place(run))
    directory = next((each for each in folders if catalog.list_checkpoints(each)), folders[-1])
    store = store_of(directory)
    writing = store.being_written()
    if writing:
        raise CheckpointError(
            f"{writing[0]} is being written: a run that saves removes old checkpoints itself (checkpoint.keep). "
            "Prune when it has stopped, or when the save is done."
        )
    found = _verified(catalog.list_checkpoints(directory), keep, show_progress=not as_json)
    if not any(each.problem is None for each in found):
        raise CheckpointError(f"{run}: there is no good checkpoint, so nothing may go.")
    going = retention.plan_removal(found, keep, keep_every)
    if not dry_run:
        for path in going:
            try:
                store.remove(path)
            except OSError as error:
                raise EnvError(f"{path}: cannot be removed ({error.strerror}).") from error
        store.collect()
    if as_json:
        staying = [str(each.path) for each in found if each.path not in going]
        problems = {str(each.path): each.problem for each in found if each.problem}
        print(json.dumps({"removed": [str(path) for path in going], "kept": staying, "problems": problems, "dry_run": dry_run}))
        return EXIT_DONE
    console = make_console()
    for each in found:
        fate = "stays" if each.path not in going else "would go" if dry_run else "removed"
        damage = f" (damaged: {each.problem})" if each.problem else ""
        console.print(f"{each.path}: {fate}{damage}", highlight=False, soft_wrap=True, markup=False)
    return EXIT_DONE


def _verified(found: list[catalog.Found], keep: int, *, show_progress: bool) -> list[catalog.Found]:
    """The same, newest first, with what reading tells of them, as far as `keep` good ones."""
    checked, sound = [], 0
    for each in found:
        problem = each.problem
        if problem is None and sound < keep:
            damages = _verify(each.path, show_progress=show_progress)
            problem = str(damages[0]) if damages else None
            sound += problem is None
        checked.append(catalog.Found(each.path, each.step, problem))
    return checked


def _layout(layout: Mapping[str, Any]) -> str:
    offloaded = [
        f"{key.removeprefix('offload_')} on {tier}"
        for key, tier in layout.items()
        if key.startswith("offload_") and tier != "none"
    ]
    axes = [
        f"{axis} {layout[axis]}" for axis in ("dp", "tp", "pp", "sp") if axis in layout and (axis == "dp" or layout[axis] != 1)
    ]
    return ", ".join([*axes, f"ZeRO {layout.get('zero')}", *offloaded])


def _words(value: Mapping[str, Any]) -> str:
    text = "\n".join(f"{key}: {json.dumps(item) if not isinstance(item, str) else item}" for key, item in value.items())
    return text or "-"


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.4g} {unit}"
