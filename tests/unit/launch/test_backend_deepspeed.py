import json
from dataclasses import replace
from pathlib import Path

import pytest

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, EnvError
from anyshard.configs.schema import DeepspeedLauncher, Runner
from anyshard.launch.backend_deepspeed import DeepspeedBackend, read_hosts
from anyshard.launch.spec import LaunchSpec


def spec_with(tmp_path=Path("/runs/x"), nodes=2, procs=4, python="/venv/bin/python", **options):
    launch = schema.Launch(deepspeed=DeepspeedLauncher(**options))
    return LaunchSpec(tmp_path, nodes, procs, None, python, {"OMP_NUM_THREADS": "1"}, launch)


def test_a_hostfile_of_ones_own_is_read(tmp_path):
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4\n")
    spec = spec_with(tmp_path, hostfile=str(tmp_path / "hosts"))
    rendered = DeepspeedBackend().render(spec)
    assert f"--hostfile {tmp_path}/hosts --master_addr a " in rendered.text()
    assert list(rendered.files) == [tmp_path / "launch" / "deepspeed.env"]


def test_hosts_that_are_used_are_those_that_were_asked_for(tmp_path, monkeypatch):
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    DeepspeedBackend().check(spec_with(hosts=["a", "b", "c"], exclude="b"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hosts": ["a", "b", "c"]}, r"launch\.nodes=2: .*a with 4 slots, b with 4 slots.*Set launch\.nodes=3 launch\.procs"),
        ({"hosts": ["a", "b"], "include": "a:0,1@b"}, r"launch\.nodes=2: .*a with 2 slots.*and give each host as many slots"),
        ({"hosts": ["a", "b"], "hostfile": "/etc/hosts"}, r"launch\.deepspeed\.hostfile is given as well"),
        ({"hostfile": "/nowhere"}, r"hostfile=/nowhere: it cannot be read \(No such file"),
        ({"hosts": ["a", "b", "c"], "exclude": "b", "runner": Runner.openmpi}, r"runner=openmpi cannot choose"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        DeepspeedBackend().check(spec_with(**options))


def test_too_few_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"launch\.procs_per_node=4: .*a node has 2"):
        DeepspeedBackend().check(replace(spec_with(hosts=["a", "b"]), gpus_per_node=2))


@pytest.mark.parametrize(("runner", "program"), [(Runner.pdsh, "pdsh"), (Runner.openmpi, "mpirun")])
def test_the_program_that_reaches_other_nodes_is_named(monkeypatch, tmp_path, runner, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvError, match=rf"runner={runner.value}: {program} is not installed\. Install it \(apt-get install"):
        DeepspeedBackend().check(spec_with(hosts=["a", "b"], runner=runner))
    DeepspeedBackend().check(spec_with(hosts=["a", "b"], runner=Runner.no_ssh))


def test_without_hosts_it_is_this_one():
    assert read_hosts(spec_with(nodes=1)) == {"localhost": 4}


@pytest.mark.parametrize(
    ("code", "events", "result"),
    [
        (0, ["start", "done"], 0),
        (0, ["start"], 1),
        (1, ["start"], 1),
        (2, [], 2),
        (1, ["start", "stop"], 75),
        (255, ["stop", "start"], 1),
    ],
)
def test_how_the_run_ended(tmp_path, code, events, result):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({"event": event}) + "\n" for event in events))
    assert DeepspeedBackend().submit(spec_with(tmp_path, nodes=1, python=str(python))) == result
    assert (tmp_path / "launch" / "hostfile").read_text() == "localhost slots=4\n"
    variables = (tmp_path / "launch" / "deepspeed.env").read_text().splitlines()
    assert variables == [f"ANYSHARD_ERRORS={tmp_path}/launch/errors", "ANYSHARD_LAUNCHER=deepspeed", "OMP_NUM_THREADS=1"]
