"""`launch=slurm`: one sbatch script from a template, submitted once for a run directory.

Everything that happens in the job stands in the script (launch/templates/slurm.sbatch.j2, or a template of one's own):
where the ranks meet, their environment with reasons, srun, Slurm's warning before the time limit, and the requeue.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2

from anyshard.configs.errors import EXIT_DONE, ConfigError, EnvError, LaunchError, Problem
from anyshard.configs.schema import Starter
from anyshard.launch import slurm
from anyshard.launch.spec import REASONS, LaunchSpec, Rendered, require_gpus

TEMPLATE = Path(__file__).parent / "templates" / "slurm.sbatch.j2"
OF_THIS_HOST = ("PATH", "OMP_NUM_THREADS")
"""Variables that are computed on the nodes instead."""


class SlurmBackend:
    """A job of Slurm."""

    def render(self, spec: LaunchSpec) -> Rendered:
        """The script, and the sbatch that submits it.

        Raises:
            ConfigError: the template cannot be used.
        """
        script = spec.run_dir / "launch" / "job.sbatch"
        return Rendered(["sbatch", "--parsable", str(script)], {}, {script: _script(spec)})

    def check(self, spec: LaunchSpec) -> None:
        """Slurm is here, and what the nodes have is known.

        Raises:
            ConfigError: it is not known whether the nodes have GPUs, or a rank would have none.
            EnvError: there is no sbatch.
        """
        if spec.gpus_per_node is None:
            why = "this host has no GPU, so it cannot be known what the nodes have."
            fix = "Set cluster=8xh100, cluster.devices_per_node=8, or cluster=cpu for nodes without."
            raise ConfigError(Problem("cluster.devices_per_node", None, why, fix))
        require_gpus(spec)
        if spec.options.slurm.container_mounts and not spec.options.slurm.container_image:
            why, fix = "there is no launch.slurm.container_image.", "Set it, or mount nothing."
            raise ConfigError(Problem("launch.slurm.container_mounts", spec.options.slurm.container_mounts, why, fix))
        if shutil.which("sbatch") is None:
            raise EnvError(
                "launch.name=slurm: there is no sbatch on this host. Submit from a login node of the cluster, "
                "or print the script with --dry-run and take it there."
            )

    def submit(self, spec: LaunchSpec) -> int:
        """Hand the script to Slurm, and say where to look; returns at once.

        Raises:
            EnvError: the run directory cannot be written.
            LaunchError: sbatch refused the script.
        """
        rendered = self.render(spec)
        rendered.write()
        logs = spec.run_dir / "logs"
        logs.mkdir(exist_ok=True)
        done = subprocess.run(rendered.argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LaunchError(
                f"sbatch refused {rendered.argv[-1]}: {done.stderr.strip()} "
                "Correct launch.slurm.* or the template, and submit again."
            )
        job = slurm.remember(spec.run_dir, done.stdout)
        name = "slurm-%s_*.log" if spec.options.slurm.array else "slurm-%s.log"
        print(f"job {job} is in the queue: {spec.nodes} nodes x {spec.procs_per_node} ranks")
        print(f"  script    {rendered.argv[-1]}")
        print(f"  output    {logs / (name % job)}")
        print(f"  ranks     {logs}/rank00000.log ...")
        print(f"  progress  anyshard runs tail {spec.run_dir}")
        print(f"  queue     squeue -j {job}")
        print(f"  stop      anyshard runs stop {spec.run_dir}   (with a save; scancel {job} ends a job that waits)")
        return EXIT_DONE


def _script(spec: LaunchSpec) -> str:
    options = spec.options.slurm
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    path = Path(options.template) if options.template else TEMPLATE
    try:
        text = environment.from_string(path.read_text(encoding="utf-8")).render(**_variables(spec))
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        fix = f"Correct it, or begin with a copy of {TEMPLATE}."
        where = f" at line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ConfigError(Problem("launch.slurm.template", path, f"it cannot be used{where} ({error}).", fix)) from error
    return re.sub(r"\n{3,}", "\n\n", text)


def _variables(spec: LaunchSpec) -> dict[str, Any]:
    """What a template may use."""
    by_torchrun = spec.options.slurm.starter is Starter.torchrun
    ranks = "1 rank" if spec.procs_per_node == 1 else f"{spec.procs_per_node} ranks"
    each = f"{ranks} on the node" if spec.nodes == 1 else f"{ranks} on each of {spec.nodes} nodes"
    return {
        "run_dir": str(spec.run_dir),
        "python": spec.options.slurm.python or spec.python,
        "host_python": spec.python,  # outside of a container
        "nodes": spec.nodes,
        "procs_per_node": spec.procs_per_node,
        "port": spec.port,
        "slurm": spec.options.slurm,
        "directives": _directives(spec),
        "env": _environment(spec),
        "srun": _srun(spec),
        "ranks_are": f"{each}: one torchrun a node" if by_torchrun else f"{each}, started by srun",
    }


def _directives(spec: LaunchSpec) -> list[str]:
    options, starter = spec.options.slurm, spec.options.slurm.starter
    output = "slurm-%A_%a.log" if options.array else "slurm-%j.log"
    gpus = [] if options.gres or not spec.gpus_per_node else [_joined(options.gpu_type, spec.procs_per_node)]
    cpus = None if spec.node_range else options.cpus_per_task
    if starter is Starter.torchrun and cpus:
        cpus *= spec.procs_per_node
    lines = [
        ("job-name", spec.run_dir.name),
        ("nodes", "-".join(map(str, spec.node_range or [spec.nodes]))),
        # with it, Slurm takes the fewest nodes of a range instead of the most
        ("ntasks-per-node", None if spec.node_range else _tasks(spec)),
        ("gpus-per-node", *gpus),
        ("gres", options.gres),
        ("cpus-per-task", cpus),
        ("mem", options.mem),
        ("account", options.account),
        ("partition", options.partition),
        ("qos", options.qos),
        ("time", options.time_min),
        ("constraint", options.constraint),
        ("reservation", options.reservation),
        ("nodelist", options.nodelist),
        ("exclude", options.exclude),
        ("array", f"1-{options.array}%1" if options.array else None),
        ("output", f"{spec.run_dir}/logs/{output}"),
        ("open-mode", "append"),
        ("signal", f"B:USR2@{options.warn_s}"),
    ]
    told = [f"--{name}={_quoted(value[0])}" for name, *value in lines if value and value[0] is not None]
    told += ["--exclusive"] if options.exclusive or spec.node_range else []
    told += ["--requeue" if options.requeue and not options.array else "--no-requeue"]
    return [*told, *options.directives]


def _tasks(spec: LaunchSpec) -> int:
    return 1 if spec.options.slurm.starter is Starter.torchrun else spec.procs_per_node


def _joined(kind: str | None, count: int) -> str:
    return f"{kind}:{count}" if kind else str(count)


def _quoted(value: object) -> str:
    """A value as sbatch reads it in a directive."""
    text = str(value)
    return f'"{text}"' if re.search(r"[\s&|]", text) else text


def _environment(spec: LaunchSpec) -> list[tuple[str, str, str]]:
    """Variables as (name, text for bash, reason)."""
    of_people = spec.options.env
    env = {name: value for name, value in spec.env.items() if name in of_people or name not in OF_THIS_HOST}
    if "OMP_NUM_THREADS" not in env:
        threads = spec.options.threads_per_proc
        cores = f"$((SLURM_CPUS_ON_NODE > {spec.procs_per_node} ? SLURM_CPUS_ON_NODE / {spec.procs_per_node} : 1))"
        told = [("OMP_NUM_THREADS", str(threads) if threads else cores, REASONS["OMP_NUM_THREADS"])]
    else:
        told = []
    if "PATH" not in env and not spec.options.slurm.container_image:
        told.append(("PATH", '"${PYTHON%/*}:$PATH"', REASONS["PATH"]))
    reasons = {**REASONS, **dict.fromkeys(of_people, "yours, by launch.env")}
    named = [(name, _for_bash(value), reasons.get(name, "")) for name, value in env.items()]
    return [*told, *named]


def _for_bash(value: str) -> str:
    return f"'{value}'" if value.startswith("=") else shlex.quote(value)


def _srun(spec: LaunchSpec) -> list[str]:
    """The srun command by lines."""
    options = spec.options.slurm
    # a rank that fails ends the others, which get SIGTERM first; without a limit to how long rank 0 may stay at the end
    first = ["srun --kill-on-bad-exit=1 --wait=0"]
    if spec.node_range:
        first.append(f'--ntasks="$((SLURM_JOB_NUM_NODES * {_tasks(spec)}))" --ntasks-per-node={_tasks(spec)}')
    if spec.gpus_per_node and options.starter is Starter.srun:
        first.append("--gpu-bind=none")  # each rank takes the GPU of its local rank, and sees all
    lines = [" ".join([*first, *map(shlex.quote, options.srun_args)])]
    if options.container_image:
        mounts = ",".join([f"{spec.run_dir}:{spec.run_dir}", *options.container_mounts])
        lines.append(f"    --container-image={shlex.quote(options.container_image)} --container-mounts={shlex.quote(mounts)}")
    if options.starter is Starter.torchrun:
        lines.append('    "$PYTHON" -m anyshard.launch.node "$RUN_DIR"')
    else:
        lines.append('    "$PYTHON" -m anyshard.trainer.run --run-dir "$RUN_DIR"')
    return lines
