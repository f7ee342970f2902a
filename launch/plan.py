"""What a run will be, before anything starts: parameters, bytes per rank, batch arithmetic, the DeepSpeed JSON.

The parameter table comes from the meta device in a child process, since nothing here imports torch, and is cached by the
fingerprint of the model's configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anyshard import parallel
from anyshard.configs import rules, schema
from anyshard.configs.compose import compose_with_sources, finalize
from anyshard.configs.errors import AnyshardError, ConfigError, LaunchError, PlanError
from anyshard.configs.frozen import load_frozen
from anyshard.configs.world import dp_size, resolve_world
from anyshard.configs.writing import write_file
from anyshard.launch.console import make_console
from anyshard.launch.env import find_hardware
from anyshard.launch.placement import settle
from anyshard.launch.stages import describe_stages, shapes_of, stage_rows, stages_of
from anyshard.offload import tiers
from anyshard.offload.measured import load
from anyshard.offload.memory import GIB, Layout, Memory, plan_memory, staging_bytes
from anyshard.offload.swap_space import drive_of
from anyshard.parallel.split import split_problems
from anyshard.parallel.stages import Stages, stage_problems
from anyshard.parallel.topology import draw, mesh_of, shorten
from anyshard.trainer.batch import BatchPlan, plan_batch
from anyshard.trainer.checkpoint import ram
from anyshard.trainer.data.vocabulary import tokenizer_ids
from anyshard.trainer.ds_config import compile_ds_config, merged_overrides
from anyshard.trainer.flops import flops_per_token
from anyshard.trainer.models.param_table import TABLE_FORMAT, Param, ParamTable, read_answer, request
from anyshard.trainer.optim.states import state_bytes_per_param
from anyshard.trainer.parts import parts_of


@dataclass(frozen=True)
class Plan:
    """A run as planned.

    Attributes:
        memory: bytes of one rank by kind.
        device_limit_bytes, host_limit_bytes: memory of one device, and one rank's share of its node's memory.
        flops_per_token: of a forward and backward pass.
        stages: of the pipeline; None without one.
    """

    config: schema.Config
    table: ParamTable
    batch: BatchPlan
    memory: Memory
    ds_config: dict[str, Any]
    device_limit_bytes: float
    host_limit_bytes: float
    flops_per_token: float
    stages: Stages | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory of one rank fits its device and its share of the host."""
        return self.memory.device_bytes <= self.device_limit_bytes and self.memory.host_bytes <= self.host_limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """As written to plan.json."""
        return {
            "num_params": self.table.num_params,
            "world_size": mesh_of(self.config).world_size,
            "mesh": {axis: getattr(self.config.parallel, axis) for axis in ("dp", "tp", "pp", "sp")},
            "params": [
                {"name": param.name, "shape": list(param.shape), "trainable": param.trainable} for param in self.table.params
            ],
            "splits": self._splits(),
            "stages": [] if self.stages is None else stage_rows(self.stages),
            "batch": asdict(self.batch),
            "memory_bytes_per_rank": self.memory.to_dict(),
            "device_limit_bytes": self.device_limit_bytes,
            "host_limit_bytes": self.host_limit_bytes,
            "fits": self.fits,
            "flops_per_token": self.flops_per_token,
        }

    def show(self, console: Console | None = None) -> None:
        """Print the plan for people."""
        console = console or make_console()
        for table in (self._summary(), self._memory_table(console.is_terminal), self._parameters()):
            console.print(table)
        console.print("DeepSpeed's configuration", style="italic")
        console.print_json(json.dumps(self.ds_config), indent=2)
        for key, ours, theirs in merged_overrides(self.config, self.batch):
            console.print(f"deepspeed_extra overrides {key}: {ours!r} -> {theirs!r}", markup=False)

    def _summary(self) -> Table:
        config, batch, model = self.config, self.batch, self.table
        table = Table(title=f"plan of {config.run.name}", show_header=False, title_justify="left")
        tokens = batch.global_batch_size * config.data.sequence_length
        rows = [
            (
                "model",
                f"{config.model.name}, {model.num_params:,} parameters, {model.num_layers} layers, hidden {model.hidden_size}",
            ),
            (
                "ranks",
                f"{config.launch.nodes} nodes x {config.launch.procs_per_node} = {_axes(config)}, ZeRO {config.zero.stage}",
            ),
            ("offload", f"optimizer {config.offload.optimizer.value}, parameters {config.offload.param.value}"),
            ("precision", f"{config.precision.dtype.value}, masters fp32"),
            (
                "batch",
                str(batch),
            ),
            ("tokens", f"{tokens:,} per step, {tokens * config.train.max_steps:,} in {config.train.max_steps:,} steps"),
            (
                "compute",
                f"{self.flops_per_token / 1e9:.3g} GFLOP per token, {self.flops_per_token * tokens / 1e12:.4g} TFLOP per step",
            ),
            ("checkpoint", f"{self.table.num_params * (4 + _state_bytes(config)) / GIB:.2f} GiB each"),
        ]
        if self.stages is not None:
            rows.insert(2, ("stages", describe_stages(self.stages, batch.accumulation_steps)))
        for row in rows:
            table.add_row(*row)
        return table

    def _memory_table(self, color: bool) -> Table:
        memory = self.memory
        table = Table(title="memory of one rank, GiB", title_justify="left")
        for column in ("kind", "device", "host", *(("nvme",) if memory.nvme_bytes else ())):
            table.add_column(column, justify="left" if column == "kind" else "right")
        kinds = [
            ("weights", memory.weights, memory.params_on_host),
            ("gradients", memory.gradients, memory.optimizer_on_host),
            ("optimizer (masters and states)", memory.optimizer, memory.optimizer_on_host),
            ("activations", memory.activations, False),
            ("logits and loss", memory.logits, False),
            ("checkpoints on their way to storage", memory.staging, True),
        ]
        if memory.shared_memory:
            kinds.append(("checkpoints in shared memory", memory.shared_memory, True))
        if memory.optimizer_on_nvme or memory.params_on_nvme:
            kinds.append(("buffers of the drive, and what is too small for it", memory.swap_host, True))
        swapped = {"weights": memory.params_on_nvme, "optimizer (masters and states)": memory.optimizer_on_nvme}
        for kind, size, on_host in kinds:
            place = 2 if swapped.get(kind) else int(on_host)
            table.add_row(kind, *("" if number != place else f"{size / GIB:.2f}" for number in range(len(table.columns) - 1)))
        table.add_section()
        totals = [memory.device_bytes, memory.host_bytes, *([memory.nvme_bytes] if memory.nvme_bytes else [])]
        table.add_row("total", *(f"{size / GIB:.2f}" for size in totals))
        table.add_row("there is", f"{self.device_limit_bytes / GIB:.2f}", f"{self.host_limit_bytes / GIB:.2f}")
        table.caption = "fits" if self.fits else "does NOT fit"
        table.caption_style = "green" if self.fits else "bold red"
        table.caption_justify = "left"
        return table

    def _splits(self) -> dict[str, list[list[int]]]:
        """Parameter -> shape of what each tensor-parallel rank holds of it; empty without tensor parallelism."""
        tp = self.config.parallel.tp
        return {param.name: local_shapes(param, tp) for param in self.table.params} if tp > 1 else {}

    def _parameters(self) -> Table:
        """Every parameter, and how it is split over tensor-parallel ranks; layers that are alike in one row."""
        tp = self.config.parallel.tp
        title = f"parameters: {len(self.table.params)} tensors"
        if tp > 1:
            title += f" over tp {tp}, by {self.table.split_source}"
        table = Table(title=title, title_justify="left")
        for column in ("name", "shape", "elements", *(("cut", "on each rank") if tp > 1 else ())):
            table.add_column(column, justify="right" if column == "elements" else "left")
        alike: dict[tuple[str, ...], int] = {}
        for param in self.table.params:
            cut = _cut(param, tp) if tp > 1 else ()
            row = (re.sub(r"\.\d+(?=\.)", ".*", param.name), by(param.shape), f"{param.numel:,}", *cut)
            alike[row] = alike.get(row, 0) + 1
        for (name, *cells), count in alike.items():
            table.add_row(name if count == 1 else f"{name} ({count}x)", *cells)
        return table


def by(shape: Sequence[int]) -> str:
    """A shape for people: "64 x 32"."""
    return " x ".join(map(str, shape))


def local_shapes(param: Param, tp: int) -> list[list[int]]:
    """Shape of what each of `tp` ranks holds of a parameter."""
    if param.split is None:
        return [list(param.shape)] * tp
    dim = param.split.dim
    return [[*param.shape[:dim], size, *param.shape[dim + 1 :]] for size in param.split.sizes(tp)]


def _cut(param: Param, tp: int) -> tuple[str, str]:
    """Where a parameter is cut, and the shapes that come of it."""
    if param.split is None:
        return ("whole, gradients summed" if param.summed else "whole"), by(param.shape)
    blocks = " + ".join(str(block.size) for block in param.split.blocks) if len(param.split.blocks) > 1 else ""
    shared = any(block.shared and block.num_units < tp for block in param.split.blocks)
    where = f"dim {param.split.dim}" + (f" ({blocks})" if blocks else "") + (", shared" if shared else "")
    return where, ", ".join(dict.fromkeys(map(by, local_shapes(param, tp))))


def _axes(config: schema.Config) -> str:
    parallel = config.parallel
    return " x ".join(f"{a} {getattr(parallel, a)}" for a in ("dp", "tp", "pp", "sp") if a == "dp" or getattr(parallel, a) > 1)


def mesh_lines(config: schema.Config) -> list[str]:
    """Which rank is where, on which node."""
    mesh, each = mesh_of(config), int(config.launch.procs_per_node)
    hosts = [f"node {rank // each}" for rank in range(mesh.world_size)]
    return [f"{mesh.world_size} ranks, {each} on a node: {_axes(config)}", *shorten(draw(mesh, hosts))]


def plan(config: schema.Config) -> Plan:
    """Plan a configuration. Needs no GPU and no process group; the model is never built with memory.

    Raises:
        ConfigError: the configuration makes no model, or the data's sequences or vocabulary are too large for it.
        PlanError: the batch cannot be divided.
    """
    config = resolve_world(config, find_hardware().num_gpus)
    rules.require(config)
    if config.offload.auto:
        config, _ = settle(config, plan)
    table = param_table(config)
    ids = tokenizer_ids(config.data.tokenizer)
    problems = list(rules.check_dimensions(config, table.max_positions, table.vocab_size or None, ids))
    parallel, tp = config.parallel, config.parallel.tp
    names = [param.name for param in table.params]
    problems += stage_problems(parallel, names, table.num_layers, str(config.model.name), table.model_type)
    splits = [(param.name, param.split) for param in table.params if param.split is not None]
    problems += split_problems(table.unsplittable, splits, tp, str(config.model.name))
    if problems:
        raise ConfigError(problems)
    dp = dp_size(config)
    assert dp is not None, "rules.require accepted a world that cannot be divided"
    batch = plan_batch(config.train, dp)
    stages = stages_of(table, parallel)
    layout = Layout(
        dp=dp * parallel.sp,  # ZeRO shards over the ranks that share a sequence too
        stage=config.zero.stage,
        dtype=config.precision.dtype.value,
        state_bytes=_state_bytes(config),
        optimizer_on_host=config.offload.optimizer is not schema.Device.none,
        params_on_host=config.offload.param is not schema.Device.none,
        tp=tp,
    )
    recompute = config.train.activation_checkpointing
    memories = [
        plan_memory(
            shape,
            layout,
            micro_batch_size=batch.micro_batch_size,
            sequence_length=-(-config.data.sequence_length // parallel.sp),
            recompute=recompute,
            loss_tile_tokens=config.train.loss_tile_tokens,
            mlp_tile_tokens=config.train.mlp_tile_tokens,
        )
        for shape in shapes_of(table, tp, stages, batch.accumulation_steps)
    ]
    memory = max(memories, key=lambda each: each.device_bytes)
    ds_config = compile_ds_config(config, batch)
    if tiers.uses_nvme(config):
        memory = _with_swapping(memory, config, table, dp, ds_config)
    device_limit, host_limit = _limits(config)
    world = mesh_of(config).world_size
    memory = _with_checkpoints(memory, config, table.num_params * (4 + _state_bytes(config)), world, host_limit)
    return Plan(
        config=config,
        table=table,
        batch=batch,
        memory=memory,
        ds_config=ds_config,
        device_limit_bytes=device_limit,
        host_limit_bytes=host_limit,
        flops_per_token=flops_per_token(table, config.data.sequence_length, recompute=recompute),
        stages=stages,
    )


def _with_swapping(memory: Memory, config: schema.Config, table: ParamTable, dp: int, ds_config: dict[str, Any]) -> Memory:
    """The same with what is on a drive; completes DeepSpeed's configuration.

    Raises:
        ConfigError: the settings cannot hold the model's parts.
    """
    drive = drive_of(str(config.offload.nvme_path), 0)
    fragment = tiers.fragment(config, parts_of(config, table, dp), folder=drive, aio=load(Path(drive)).aio)
    tiers.complete(ds_config, fragment, config.deepspeed_extra)
    only_nvme = {kind: getattr(config.offload, kind) is schema.Device.nvme for kind in ("optimizer", "param")}
    # what the other kind keeps in memory counts as such
    host = fragment.bytes.host - sum(
        size
        for kind, size in (("optimizer", memory.optimizer), ("param", memory.weights))
        if getattr(config.offload, kind) is schema.Device.cpu
    )
    return replace(
        memory,
        optimizer_on_nvme=only_nvme["optimizer"],
        params_on_nvme=only_nvme["param"],
        swap_host=max(0, host),
        nvme_bytes=fragment.bytes.nvme,
    )


def _with_checkpoints(
    memory: Memory, config: schema.Config, checkpoint_bytes: int, world_size: int, host_limit_bytes: float
) -> Memory:
    """The same with what checkpoints need: ranks write equal parts of each."""
    settings, mine = config.checkpoint, -(-checkpoint_bytes // world_size)
    staging = staging_bytes(
        mine,
        bound_bytes=None if settings.staging_gib is None else int(settings.staging_gib * GIB),
        free_bytes=max(0, int(host_limit_bytes) - memory.host_bytes),
        background=settings.every_steps > 0 and settings.mode is schema.Mode["async"],
    )
    if not settings.ram_every_steps:
        return replace(memory, staging=staging)
    return replace(memory, staging=staging + ram.STAGING_BYTES, shared_memory=ram.STATES * mine)


def _state_bytes(config: schema.Config) -> int:
    """Optimizer state of one element; a plugin's optimizer counts as AdamW."""
    size = state_bytes_per_param(config.optimizer.name, momentum=config.optimizer.momentum)
    return 8 if size is None else size


def _limits(config: schema.Config) -> tuple[float, float]:
    """Bytes of one device and of one rank's share of its host. Without accelerators both are that share."""
    hardware = find_hardware()
    host_gib = (config.cluster.host_memory_gib or hardware.host_memory_gib) / int(config.launch.procs_per_node)
    device_gib = config.cluster.device_memory_gib or hardware.gpu_memory_gib or host_gib
    return device_gib * GIB, host_gib * GIB


def param_table(config: schema.Config) -> ParamTable:
    """The model's parameter table, from the cache or from a child process.

    Raises:
        ConfigError: the configuration makes no model.
        LaunchError: the child process died.
    """
    data = config.data
    if config.model.builder == "hf":  # it looks at nothing else of the data: other data is answered from the cache
        data = schema.Data(sequence_length=data.sequence_length)
    question = request(config.model, data)
    local = Path(config.model.path).exists() if config.model.path else False
    plans = "".join(path.read_text() for path in sorted(Path(parallel.__path__[0], "plans").glob("*.yaml")))
    asked = f"{TABLE_FORMAT} {question} {version('transformers')} {plans}"
    key = hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()
    cached = cache_dir() / "params" / f"{key}.json"
    if not local:  # a local path may hold another model tomorrow
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or cut off: it is made anew
            return ParamTable.from_json(cached.read_text())
    child = subprocess.run(
        [sys.executable, "-m", "anyshard.trainer.models.table"], input=question, capture_output=True, text=True, check=False
    )
    if not child.stdout.strip():
        raise LaunchError(f"the model could not be looked at:\n{child.stderr.strip()}")
    table = read_answer(child.stdout)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second next time
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}")
        temporary.write_text(table.to_json())
        temporary.replace(cached)
    return table


def cache_dir() -> Path:
    """`$ANYSHARD_CACHE`, or ~/.cache/anyshard."""
    return Path(os.environ.get("ANYSHARD_CACHE", "~/.cache/anyshard")).expanduser()


def run(overrides: Sequence[str], *, config_dir: Path | None, as_json: bool, mesh: bool = False) -> int:
    """`anyshard plan`; returns 0 when it fits.

    Args:
        mesh: only draw which rank is where.

    Raises:
        PlanError: it does not fit.
    """
    composition = compose_with_sources(overrides, config_dir=config_dir)
    config = resolve_world(finalize(composition.config, datetime.now()), find_hardware().num_gpus)
    if mesh:
        problems = [problem for problem in rules.check(config) if problem.key.split(".")[0] in ("parallel", "launch")]
        if problems:
            raise ConfigError(problems)
        print("\n".join(mesh_lines(config)))
        return 0
    rules.require(config, lambda: composition.sources)
    config = settled(config, say=(lambda line: print(line, file=sys.stderr)) if as_json else print)
    planned = plan(config)
    if as_json:
        print(json.dumps({**planned.to_dict(), "ds_config": planned.ds_config}, indent=2))
    else:
        planned.show()
    if not planned.fits:
        raise PlanError(advice(planned))
    return 0


def settled(config: schema.Config, say: Callable[[str], None] = print) -> schema.Config:
    """The configuration with `offload=auto` replaced by what it comes to, which is told."""
    if not config.offload.auto:
        return config
    config, choice = settle(config, plan)
    say("\n".join(choice.lines()))
    return config


def write_plan(run_dir: Path) -> None:
    """Write plan.json for the frozen configuration of ranks that were started by hand: `python -m anyshard.launch.plan DIR`.

    Raises:
        AnyshardError: it cannot be planned or written.
    """
    planned = plan(load_frozen(run_dir))
    write_file(run_dir / "plan.json", json.dumps(planned.to_dict(), indent=2) + "\n")


def advice(planned: Plan) -> str:
    """What to do about a plan that does not fit."""
    need, have = planned.memory.device_bytes / GIB, planned.device_limit_bytes / GIB
    config, knobs = planned.config, []
    if not config.train.activation_checkpointing and planned.memory.activations > planned.memory.device_bytes / 4:
        knobs.append("train.activation_checkpointing=true")
    if config.train.micro_batch_size > 1:
        knobs.append(f"train.micro_batch_size={max(1, config.train.micro_batch_size // 2)}")
    highest = 3 if config.parallel.pp == 1 else 1
    if config.zero.stage < highest and planned.batch.dp > 1:
        knobs.append(f"zero=z{highest}")
    if config.offload.optimizer is schema.Device.none:
        knobs.append("offload=cpu")
    elif config.offload.param is schema.Device.none and highest == 3:
        knobs.append("zero=z3 offload=cpu_param")
    if highest == 3 and not tiers.uses_nvme(config):
        knobs.append("zero=z3 offload=nvme offload.nvme_path=FOLDER")
    knobs.append("more ranks" if config.parallel.tp > 1 else "parallel.tp=2 or more ranks")
    if planned.memory.host_bytes > planned.host_limit_bytes:
        need, have = planned.memory.host_bytes / GIB, planned.host_limit_bytes / GIB
        less = "checkpoint.ram_every_steps=0, " if planned.memory.shared_memory else ""
        return f"one rank needs {need:.1f} GiB of host memory and has {have:.1f}: use {less}fewer ranks a node, or more nodes."
    return f"one rank needs {need:.1f} GiB and has {have:.1f}: try, in order of cost, {', '.join(knobs)}."


if __name__ == "__main__":
    try:
        write_plan(Path(sys.argv[1]))
    except AnyshardError as error:
        sys.exit(f"plan.json: {error}")
