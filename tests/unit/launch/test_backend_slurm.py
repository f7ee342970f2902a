import json
from dataclasses import replace
from pathlib import Path

import pytest

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, EnvError, LaunchError
from anyshard.configs.schema import Slurm
from anyshard.launch import slurm
from anyshard.launch.backend_slurm import SlurmBackend
from anyshard.launch.spec import LaunchSpec


def spec_with(run_dir=Path("/runs/x"), **options):
    return LaunchSpec(run_dir, 2, 4, None, "/venv/bin/python", {}, schema.Launch(slurm=Slurm(**options)))


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Commands of Slurm that print and exit as they are told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name, output, code=0):
        (folder / name).write_text(f"#!/bin/sh\nprintf '%s' '{output}'\necho 'no such partition' >&2\nexit {code}\n")
        (folder / name).chmod(0o755)

    return write


def test_a_submission_is_told_and_recorded(tmp_path, commands, capsys):
    commands("sbatch", "4711;big\n")
    run = tmp_path / "run"
    run.mkdir()
    assert SlurmBackend().submit(spec_with(run)) == 0
    told = capsys.readouterr().out
    for part in ("job 4711", f"anyshard runs tail {run}", f"{run}/logs/slurm-4711.log", "squeue -j 4711", "job.sbatch"):
        assert part in told
    record = json.loads((run / slurm.JOB_FILE).read_text())
    assert (record["job_id"], record["cluster"]) == ("4711", "big")
    assert (run / "launch" / "job.sbatch").read_text().startswith("#!/usr/bin/env bash\n")


def test_a_refusal_of_sbatch_is_shown(tmp_path, commands):
    commands("sbatch", "", code=1)
    with pytest.raises(LaunchError, match=r"sbatch refused .*job\.sbatch: no such partition Correct launch\.slurm"):
        SlurmBackend().submit(spec_with(tmp_path))
    assert not (tmp_path / slurm.JOB_FILE).exists()


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED"])
def test_a_run_whose_job_is_in_the_queue_is_refused(tmp_path, commands, state):
    commands("squeue", f"{state} n[1-2]\n")
    slurm.check_not_submitted(tmp_path)
    (tmp_path / slurm.JOB_FILE).write_text('{"job_id": "12"}')
    with pytest.raises(EnvError, match=rf"job 12 of this run is in the queue already \({state} n\[1-2\]\)"):
        slurm.check_not_submitted(tmp_path)


@pytest.mark.parametrize(("output", "code"), [("", 1), ("", 0), ("CANCELLED n1\n", 0)])
def test_a_job_that_has_left_the_queue_hinders_nobody(tmp_path, commands, output, code):
    commands("squeue", output, code)
    (tmp_path / slurm.JOB_FILE).write_text('{"job_id": "12"}')
    slurm.check_not_submitted(tmp_path)


def test_a_damaged_record_is_none(tmp_path):
    (tmp_path / slurm.JOB_FILE).write_text("{")
    assert slurm.submitted_job(tmp_path) is None


def test_without_slurm_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvError, match=r"there is no sbatch on this host\. Submit from a login node"):
        SlurmBackend().check(spec_with(tmp_path))
    (tmp_path / slurm.JOB_FILE).write_text('{"job_id": "12"}')
    assert slurm.job_in_queue(tmp_path) is None


@pytest.mark.parametrize(
    ("gpus", "options", "told"),
    [
        (None, {}, r"cluster\.devices_per_node=null: this host has no GPU.*cluster=8xh100.*cluster=cpu"),
        (2, {}, r"launch\.procs_per_node=4: .*a node has 2"),
        (0, {"container_mounts": ["/a:/a"]}, r"container_mounts=.*there is no launch\.slurm\.container_image"),
    ],
)
def test_what_cannot_start_is_refused(gpus, options, told):
    with pytest.raises(ConfigError, match=told):
        SlurmBackend().check(replace(spec_with(**options), gpus_per_node=gpus))


def test_a_template_of_ones_own(tmp_path):
    template = tmp_path / "mine.j2"
    template.write_text("#!/bin/bash\n{% for line in directives %}\n#SBATCH {{ line }}\n{% endfor %}\nsrun {{ run_dir }}\n")
    text = SlurmBackend().render(spec_with(template=str(template), qos="low")).text()
    assert text.endswith("\nsrun /runs/x\n")
    assert "#SBATCH --qos=low\n" in text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{% if %}\n", r"template=.*it cannot be used at line 1"),
        ("{{ partition }}", r"'partition' is undefined.*begin with a copy"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(tmp_path, text, told):
    (tmp_path / "mine.j2").write_text(text)
    with pytest.raises(ConfigError, match=told):
        SlurmBackend().render(spec_with(template=str(tmp_path / "mine.j2")))
    with pytest.raises(ConfigError, match="No such file"):
        SlurmBackend().render(spec_with(template=str(tmp_path / "none.j2")))
