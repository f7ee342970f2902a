"""One environment of each launcher, as it was recorded from it, and what cannot be true."""

import socket
import subprocess
import sys

import pytest

from anyshard.configs.errors import EnvError
from anyshard.parallel import rank_env
from anyshard.parallel.rank_env import (
    RankEnv,
    address_of,
    discover,
    first_host,
    free_port,
    is_restart,
    port_of_job,
    rank_of,
)

PLAIN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
TORCHRUN = {
    **PLAIN,
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {**PLAIN, "LOCAL_RANK": "1", "CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07,09]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1973551105",
}
MVAPICH = {name.replace("OMPI_", "MV2_"): value for name, value in OPENMPI.items() if name.startswith("OMPI_")}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MASTER = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}

HERE = RankEnv(3, 1, 4, 2, "host", 29500)


@pytest.mark.parametrize(
    "environ",
    [TORCHRUN, DEEPSPEED, {**OPENMPI, **MASTER}, {**MVAPICH, **MASTER}, {**MPICH, **MASTER}, {**SRUN, **MASTER}],
    ids=["torchrun", "deepspeed", "openmpi", "mvapich", "mpich", "srun"],
)
def test_every_launcher_is_understood(environ):
    assert discover(environ) == HERE
    assert rank_of(environ) == 3


def test_plain_variables_are_one_node_unless_they_say_otherwise():
    assert discover(PLAIN) == RankEnv(3, 3, 4, 4, "host", 29500)


def test_no_launcher_is_one_process():
    env = discover({"HOME": "/root"})
    assert (env.rank, env.world_size, env.local_world_size, env.master_addr) == (0, 1, 1, "127.0.0.1")
    assert rank_of({}) == 0


def test_srun_needs_nothing_else():
    assert discover(SRUN, resolve=lambda host: f"{host}.cluster") == RankEnv(
        3, 1, 4, 2, "gpu07.cluster", 20000 + 123458 % 10000
    )


def test_a_batch_script_is_no_rank():
    environ = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert discover(environ).world_size == 1


def test_mpirun_on_one_host_needs_nothing_else():
    alone = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    env = discover(alone)
    assert env == discover({**alone, "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}).__class__(
        3, 3, 4, 4, "127.0.0.1", env.master_port
    )
    assert discover({**alone, "PMIX_NAMESPACE": "77"}).master_port != env.master_port


@pytest.mark.parametrize("environ", [OPENMPI, MPICH])
def test_mpirun_on_several_hosts_must_say_where_they_meet(environ):
    with pytest.raises(EnvError, match=r"MASTER_ADDR, MASTER_PORT not set although .*mpirun -x MASTER_ADDR="):
        discover(environ)


def test_what_srun_says_completes_plain_variables():
    plain = {"RANK": "3", "WORLD_SIZE": "4"}
    assert discover({**SRUN, **plain}, resolve=str) == discover(SRUN, resolve=str)


@pytest.mark.parametrize("outer_size", ["1", "2"])
def test_torchrun_below_srun_decides(outer_size):
    step = {**SRUN, "SLURM_STEP_NUM_TASKS": outer_size, "SLURM_STEP_TASKS_PER_NODE": f"1(x{outer_size})"}
    node = str(int(outer_size) - 1)
    assert discover({**step, "SLURM_PROCID": node, "SLURM_NODEID": node, "SLURM_LOCALID": "0", **TORCHRUN}) == HERE


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"MASTER_ADDR, MASTER_PORT not set although RANK is"),
        ({"WORLD_SIZE": "2"}, r"RANK not set although WORLD_SIZE is: start the ranks with torchrun, deepspeed, srun or mpirun"),
        ({"RANK": "0"}, r"WORLD_SIZE not set although RANK is"),
        ({**TORCHRUN, "RANK": "4"}, r"RANK=4 with WORLD_SIZE=4: ranks are 0 to 3"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, r"WORLD_SIZE='four': it must be a number"),
        ({**TORCHRUN, "WORLD_SIZE": "5"}, r"local rank 1 of 2: every node must have the same number of ranks"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, r"local rank 2 of 2"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, r"unevenly \(SLURM_STEP_TASKS_PER_NODE=3,1\).*--ntasks-per-node"),
        # exported in the batch script, so that all tasks see the same
        (
            {**SRUN, **PLAIN, "RANK": "0"},
            r"the environment says RANK=0 of WORLD_SIZE=4, but srun says SLURM_PROCID=3 of .*=4\. .*Unset RANK",
        ),
        # a torchrun of one node in each of four tasks
        (
            {**SRUN, **TORCHRUN, "WORLD_SIZE": "2", "RANK": "1"},
            r"each of these 4 tasks would train by itself\. Give torchrun --nnodes=4",
        ),
        # srun of tasks that an MPI library takes for singletons
        ({**SRUN, **MPICH, "PMI_RANK": "0", "PMI_SIZE": "1"}, r"PMI_SIZE=1, but srun says .*Start the ranks with one of them"),
        ({**OPENMPI, **PLAIN, "RANK": "1"}, r"the environment says RANK=1 .*mpirun \(Open MPI\) says OMPI_COMM_WORLD_RANK=3"),
    ],
)
def test_what_cannot_be_is_refused(environ, told):
    with pytest.raises(EnvError, match=told) as raised:
        discover(environ)
    assert raised.value.exit_code == 3


def test_the_rank_of_a_log_is_known_without_complaint():
    assert rank_of({"RANK": "0x"}) == 0
    assert rank_of({**SRUN, **PLAIN, "RANK": "2"}) == 2


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("login1,gpu[003-007]", "login1"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("node-a.cluster,node-b.cluster", "node-a.cluster"),
    ],
)
def test_the_first_host_of_a_list(nodelist, first):
    assert first_host(nodelist) == first


def test_a_name_that_resolves_is_its_own_address():
    assert address_of("localhost") == "localhost"


@pytest.mark.parametrize(
    ("shown", "address"),
    [("NodeName=n1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=n1 Port=0", "10.1.2.3"), ("Node n1 not found", "n1.invalid")],
)
def test_a_name_that_does_not_is_looked_up_in_slurm(monkeypatch, tmp_path, shown, address):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho '{shown}'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert address_of("n1.invalid") == address


def test_without_slurm_the_name_is_all_there_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert address_of("n1.invalid") == "n1.invalid"


def test_ports_of_jobs_are_not_those_that_linux_hands_out():
    ports = {port_of_job(job) for job in range(20000)}
    assert min(ports) == 20000
    assert max(ports) < 32768
    assert port_of_job(1) != port_of_job(2)


def test_a_free_port_can_be_bound():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", free_port()))


def test_it_needs_no_torch():
    code = f"import sys, {rank_env.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("environ", "again"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_ARRAY_TASK_ID": "1"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_ARRAY_TASK_ID": "2"}, True),
    ],
)
def test_restarts_are_known(environ, again):
    assert is_restart(environ) is again
