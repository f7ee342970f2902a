import socket
from dataclasses import replace
from pathlib import Path

import pytest

from anyshard.configs import schema
from anyshard.configs.errors import ConfigError, EnvError
from anyshard.configs.schema import Rendezvous, Torchrun
from anyshard.launch.backend_local import log_name
from anyshard.launch.backend_torchrun import TorchrunBackend, other_nodes
from anyshard.launch.spec import LaunchSpec


def spec_with(**options):
    launch = schema.Launch(torchrun=Torchrun(**options))
    return LaunchSpec(Path("/runs/x"), 3, 2, None, "/venv/bin/python", {}, launch, host="here")


def test_every_node_has_its_own_number_and_log():
    spec = replace(spec_with(rendezvous=Rendezvous.static), node_rank=2)
    assert "--node-rank=2 --master-addr=here --master-port=29500" in TorchrunBackend().render(spec).text()
    assert (log_name(spec), log_name(replace(spec, node_rank=0))) == ("launcher-node002.log", "launcher.log")


def test_the_other_nodes_are_told_how_to_start():
    start = "/venv/bin/python -m anyshard.launch.node /runs/x"
    assert other_nodes(spec_with()) == [f"{start} --node-rank=1 --host=here"]
    assert other_nodes(spec_with(rendezvous=Rendezvous.static, host="node0")) == [
        f"{start} --node-rank=1",
        f"{start} --node-rank=2",
    ]


def test_too_few_gpus_are_refused():
    with pytest.raises(ConfigError, match=r"launch\.procs_per_node=2: .*a node has 1\. Set it to 1 or auto"):
        TorchrunBackend().check(replace(spec_with(), gpus_per_node=1))


def test_the_port_where_others_connect_must_be_free():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        spec = replace(spec_with(), port=port)
        with pytest.raises(EnvError, match=rf"launch\.port={port}: something listens"):
            TorchrunBackend().check(spec)
        TorchrunBackend().check(replace(spec, node_rank=1))


def test_fewer_nodes_may_come_where_they_meet_by_themselves():
    spec = spec_with()
    spec = replace(spec, options=replace(spec.options, min_nodes=2))
    assert "--nnodes=2:3" in TorchrunBackend().render(spec).argv
    static = replace(spec.options, torchrun=Torchrun(rendezvous=Rendezvous.static))
    with pytest.raises(ConfigError, match=r"launch\.min_nodes=2: .*none may stay away"):
        TorchrunBackend().check(replace(spec, options=static))
