"""The `anyshard` command. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from anyshard import __version__
from anyshard.configs.errors import EXIT_CONFIG, AnyshardError
from anyshard.configs.places import as_env_error

EXIT_CTRL_C = 128 + 2
"""What shells make of a program that SIGINT has ended."""

app = typer.Typer(
    name="anyshard",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
    help="Distributed training over DeepSpeed: composed with Hydra, planned before it starts, resumable on any other layout.",
)
ckpt_app = typer.Typer(
    no_args_is_help=True, help="Look at checkpoints, check, compare, convert and remove them.", rich_markup_mode=None
)
runs_app = typer.Typer(no_args_is_help=True, help="Look at runs, stop them, draw them.", rich_markup_mode=None)
config_app = typer.Typer(no_args_is_help=True, help="Groups, choices and keys of the configuration.", rich_markup_mode=None)
app.add_typer(ckpt_app, name="ckpt")
app.add_typer(runs_app, name="runs")
app.add_typer(config_app, name="config")

Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(help="Hydra overrides: zero=z3 data.sequence_length=1024 experiment=llama3_8b_8xh100", show_default=False),
]
ConfigDir = Annotated[Optional[Path], typer.Option(help="Folder with configuration files of your own.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, plan and print what would run; write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunDir = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
Target = Annotated[
    Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint directory.", metavar="RUN|CHECKPOINT")
]
Listed = Annotated[
    Path, typer.Argument(help="A run directory, a directory of checkpoints, or one checkpoint.", metavar="RUN|CHECKPOINT")
]
Source = Annotated[
    Path, typer.Argument(help="A run directory (its newest checkpoint) or a checkpoint directory.", metavar="SOURCE")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    dry_run: DryRun = False,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="One run for each combination: zero=z1,z2 seed=1,2.")
    ] = False,
) -> None:
    """Compose a configuration, check and plan it, freeze it in a run directory and start its ranks."""
    from anyshard.launch import train as command

    run = command.sweep if multirun else command.train
    raise typer.Exit(run(overrides or [], config_dir=config_dir, dry_run=dry_run))


@app.command()
def plan(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    as_json: AsJson = False,
    mesh: Annotated[bool, typer.Option("--mesh", help="Only draw which rank is where.")] = False,
) -> None:
    """Parameters, memory of a rank, batch arithmetic and the DeepSpeed configuration, before anything starts."""
    from anyshard.launch import plan as command

    raise typer.Exit(command.run(overrides or [], config_dir=config_dir, as_json=as_json, mesh=mesh))


@app.command()
def parity(
    layout_a: Annotated[str, typer.Argument(metavar="LAYOUT_A", help="Degrees and ZeRO stage, such as dp2 or dp2xtp2xz3.")],
    layout_b: Annotated[str, typer.Argument(metavar="LAYOUT_B", help="What to compare it with.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the two runs; must not exist.")] = Path("parity"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each.")] = 20,
    tolerance: Annotated[
        Optional[float], typer.Option("--tolerance", help="Relative, of losses. Default: 1e-5 in fp32, 0.03 in 16 bits.")
    ] = None,
) -> None:
    """Train the same under two layouts and compare losses, gradient norms and parameters; exit code 0: they agree."""
    from anyshard.launch import parity as command

    raise typer.Exit(command.run(layout_a, layout_b, overrides or [], out=out, steps=steps, tolerance=tolerance))


@app.command()
def resume(
    run: RunDir,
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    force: Annotated[bool, typer.Option("--force", help="Accept overrides that change the mathematics of the run.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Continue a run, on the same layout or another (parallel, zero, offload, launch), to other lengths and intervals."""
    from anyshard.launch import train as command

    raise typer.Exit(command.resume(run, overrides or [], config_dir=config_dir, force=force, dry_run=dry_run))


@app.command()
def doctor(
    dist: Annotated[bool, typer.Option("--dist", help="Run a collective on all ranks of this host.")] = False,
    nproc: Annotated[Optional[int], typer.Option(help="Ranks of --dist.", show_default="one per GPU, or 2")] = None,
    probe: Annotated[Optional[Path], typer.Option(help="Measure the drive of this folder for offload, and keep it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, accelerators, operators, limits, disk, wandb."""
    from anyshard.launch.doctor import doctor as command

    raise typer.Exit(command(dist=dist, as_json=as_json, nproc=nproc, probe=probe))


@ckpt_app.command("ls")
def ckpt_ls(path: Listed, as_json: AsJson = False) -> None:
    """List the checkpoints of a run: step, when it was saved, layout, size, loss, whether it is complete."""
    from anyshard.launch import ckpt

    raise typer.Exit(ckpt.ls(path, as_json=as_json))


@ckpt_app.command("show")
def ckpt_show(path: Target, as_json: AsJson = False) -> None:
    """What a checkpoint holds."""
    from anyshard.launch import ckpt

    raise typer.Exit(ckpt.show(path, as_json=as_json))


@ckpt_app.command("verify")
def ckpt_verify(path: Target, as_json: AsJson = False) -> None:
    """Check every byte of a checkpoint against its checksums."""
    from anyshard.launch import ckpt

    raise typer.Exit(ckpt.verify(path, as_json=as_json))


@ckpt_app.command("export")
def ckpt_export(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.", metavar="OUT")],
    to: Annotated[
        str, typer.Option(help="hf (Hugging Face), universal (DeepSpeed) or dcp (torch.distributed.checkpoint).")
    ] = "hf",
    dtype: Annotated[
        Optional[str], typer.Option(help="bf16, fp16 or fp32; with --to hf.", show_default="the type of the run")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file; with --to hf.")] = "5GB",
    config: Annotated[
        Optional[Path], typer.Option(help="config.json of the model, where the checkpoint has none.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in a format that others read."""
    from anyshard.launch import interop

    raise typer.Exit(
        interop.export(source, out, to=to, dtype=dtype, max_shard_size=max_shard_size, config=config, as_json=as_json)
    )


@ckpt_app.command("import")
def ckpt_import(
    source: Annotated[Path, typer.Argument(help="A Hugging Face, DeepSpeed or universal folder.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="Checkpoint to write, for resume=OUT.", metavar="OUT")],
    weights: Annotated[bool, typer.Option("--weights", help="Leave the optimizer's states behind.")] = False,
    config: Annotated[
        Optional[Path], typer.Option(help="config.json to store with it, for a later export.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint of another format, to continue from it."""
    from anyshard.launch import interop

    raise typer.Exit(interop.import_(source, out, weights_only=weights, config=config, as_json=as_json))


@ckpt_app.command("convert")
def ckpt_convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Checkpoint to write; it must be new or empty.", metavar="OUT")],
    files: Annotated[
        Optional[int], typer.Option(min=1, max=65536, help="Data files.", show_default="as many as there are")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a checkpoint in the present version of the format, every byte checked, in another number of files."""
    from anyshard.launch import interop

    raise typer.Exit(interop.convert(source, out, num_files=files, as_json=as_json))


@ckpt_app.command("diff")
def ckpt_diff(
    a: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a checkpoint of another format.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="What to compare it with.", metavar="B")],
    weights: Annotated[bool, typer.Option("--weights", help="Compare parameters and buffers only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor; exit code 0: the same, 1: different."""
    from anyshard.launch import interop

    raise typer.Exit(interop.diff(a, b, weights_only=weights, as_json=as_json))


@ckpt_app.command("prune")
def ckpt_prune(
    run: RunDir,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints that stay; only those that verify count.")],
    keep_every: Annotated[int, typer.Option(min=0, help="Checkpoints of multiples of this step stay too; 0: none.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints of a run, never the last good one."""
    from anyshard.launch import ckpt

    raise typer.Exit(ckpt.prune(run, keep=keep, keep_every=keep_every, dry_run=dry_run, as_json=as_json))


@runs_app.command("ls")
def runs_ls(
    folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs: state, step, loss, tokens/s, last checkpoint, host, job of Slurm, starts."""
    from anyshard.launch import runs

    raise typer.Exit(runs.ls(folder, as_json=as_json))


@runs_app.command("show")
def runs_show(run: RunDir, as_json: AsJson = False) -> None:
    """One run: state, hosts, job, and every attempt with how it ended."""
    from anyshard.launch import show

    raise typer.Exit(show.show(run, as_json=as_json))


@runs_app.command("tail")
def runs_tail(
    run: RunDir,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Lines to begin with.")] = 10,
    follow: Annotated[bool, typer.Option(help="Wait for more until the run ends or Ctrl-C; or print those there are.")] = True,
) -> None:
    """Follow the metrics of a run."""
    from anyshard.launch import runs

    raise typer.Exit(runs.tail(run, lines=lines, follow=follow))


@runs_app.command("stop")
def runs_stop(run: RunDir) -> None:
    """Ask a run to stop after the present step, with a save (exit code 75)."""
    from anyshard.launch import runs

    raise typer.Exit(runs.ask(run, "STOP"))


@runs_app.command("save")
def runs_save(run: RunDir) -> None:
    """Ask a run to save after the present step and go on."""
    from anyshard.launch import runs

    raise typer.Exit(runs.ask(run, "SAVE"))


@runs_app.command("plot")
def runs_plot(
    run: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN...")],
    out: Annotated[
        Optional[Path],
        typer.Option("--out", "-o", help="PNG to write.", show_default="RUN/curves.png, or runs.png for several"),
    ] = None,
) -> None:
    """Draw loss, throughput, memory and checkpoint stalls of one or several runs, and write RUN/curves.csv."""
    from anyshard.launch import runs

    raise typer.Exit(runs.plot(run, out))


@runs_app.command("compare")
def runs_compare(
    run: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN...")],
    out: Annotated[Optional[Path], typer.Option("--out", "-o", help="PNG to write.", show_default="runs.png")] = None,
    as_json: AsJson = False,
) -> None:
    """Runs side by side: the keys in which they differ, what came of them, and their curves on one picture."""
    from anyshard.launch import show

    raise typer.Exit(show.compare(run, out=out, as_json=as_json))


@config_app.command("ls")
def config_ls(
    group: Annotated[Optional[str], typer.Argument(help="Say what each choice of this group is.", show_default=False)] = None,
    config_dir: ConfigDir = None,
) -> None:
    """List the groups and the choices of each."""
    from anyshard.launch import config

    config.ls(group, config_dir=config_dir)


@config_app.command("show")
def config_show(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from a run without overrides.")] = False,
) -> None:
    """Print the configuration that these overrides make."""
    from anyshard.launch import config

    config.show(overrides or [], config_dir=config_dir, changed=changed)


@config_app.command("explain")
def config_explain(
    key: Annotated[Optional[str], typer.Argument(help="A key or a group; none lists all keys.", show_default=False)] = None,
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
) -> None:
    """Tell what a key does, its range and default, and which file or override sets it."""
    from anyshard.launch import config

    config.explain(key, overrides or [], config_dir=config_dir)


@contextlib.contextmanager
def _object_stores() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = as_env_error(error)
        if told is None:
            raise
        raise told from error


def main() -> None:
    """Run the command line; an error of ours ends with its message and exit code, without a traceback."""
    try:
        with _object_stores():
            app()
    except AnyshardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if error.exit_code == EXIT_CONFIG and sys.argv[1:2] in (["train"], ["resume"]):
            print("Nothing was started.", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # whoever presses Ctrl-C needs no traceback
        sys.exit(EXIT_CTRL_C)
