"""`anyshard plan`: every experiment of ours composes, plans and fits its hardware; what does not fit says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli import anyshard

from anyshard import compose, plan
from anyshard.configs.errors import ConfigError, LaunchError
from anyshard.launch import plan as planning
from anyshard.offload.memory import GIB

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_plans_and_fits_its_hardware(experiment):
    planned = plan(compose([f"experiment={experiment}"]))
    world = planned.config.launch.nodes * planned.config.launch.procs_per_node
    assert planned.batch.dp == world
    assert planned.ds_config["train_batch_size"] == planned.batch.global_batch_size
    assert planned.fits, planning.advice(planned)
    if experiment.endswith("h100"):
        assert experiment.endswith(f"{world}xh100")
        assert planned.device_limit_bytes / GIB == pytest.approx(80, abs=2)


def test_the_numbers_of_a_known_case():
    """Llama 3 8B, ZeRO 3 over 8 ranks in bf16: 2 + 2 + 12 bytes of each of 8.03e9 parameters, divided by 8."""
    planned = plan(compose(["experiment=llama3_8b_8xh100", "zero=z3", "launch.nodes=1"]))
    states = planned.memory.weights + planned.memory.gradients + planned.memory.optimizer
    assert planned.table.num_params == 8_030_261_248
    assert states == pytest.approx(16 * 8_030_261_248 / 8, rel=1e-6)


def test_json_and_exit_code(tmp_path):
    done = anyshard("plan", "debug=smoke", "launch.procs_per_node=2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["batch"]["dp"] == 2
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_says_what_to_do(tmp_path):
    done = anyshard("plan", "experiment=llama3_8b_8xh100", "zero=z1", "train.activation_checkpointing=false", cwd=tmp_path)
    assert done.returncode == 2
    assert "does NOT fit" in done.stdout
    assert "zero=z3" in done.stderr
    assert "train.activation_checkpointing=true" in done.stderr


def test_tensor_parallelism_is_planned(tmp_path):
    """Llama 3 8B over tp 8: all but norms (266,240 parameters) and eight key-value heads is divided by 8."""
    overrides = [
        "experiment=llama3_8b_8xh100",
        "zero=z1",
        "launch.nodes=1",
        "parallel.tp=8",
        "train.activation_checkpointing=true",
    ]
    planned = plan(compose(overrides))
    assert planned.batch.dp == 1
    mine = (planned.table.num_params - 266_240) // 8 + 266_240
    assert planned.memory.weights == 2 * mine
    splits = planned.to_dict()["splits"]
    assert splits["model.layers.0.self_attn.k_proj.weight"] == [[128, 4096]] * 8
    assert splits["model.norm.weight"] == [[4096]] * 8
    assert set(splits) == {param.name for param in planned.table.params}
    done = anyshard("plan", "debug=smoke", "parallel.tp=4", "launch.procs_per_node=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "by the model's tp_plan" in done.stdout
    assert "k_proj" in done.stdout
    assert "shared" in done.stdout


def test_a_pipeline_is_planned(tmp_path):
    """Llama 3 8B over 4 stages: 218,112,000 parameters in a layer, 525,336,576 in embedding and in head, 4,096 in the norm."""
    base = ["experiment=llama3_8b_8xh100", "zero=z1", "launch.nodes=1", "parallel.pp=4"]
    planned = plan(compose(base))
    rows = planned.to_dict()["stages"]
    assert [row["layers"] for row in rows] == [[0, 7], [7, 16], [16, 25], [25, 32]]
    layer, embedding = 218_112_000, 525_336_576
    assert [row["num_params"] for row in rows] == [7 * layer + embedding, 9 * layer, 9 * layer, 7 * layer + embedding + 4096]
    assert planned.memory.weights == 2 * rows[3]["num_params"]  # with the logits it needs most
    assert planned.ds_config["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    by_hand = plan(compose([*base, "parallel.pp_layers=[5,9,9,9]"]))
    assert [row["layers"][1] for row in by_hand.to_dict()["stages"]] == [5, 14, 23, 32]
    done = anyshard("plan", "debug=smoke", "parallel.pp=2", "launch.procs_per_node=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0: layers 0 to 1, embedding, 91,392 parameters" in done.stdout
    assert "idle 33 % of a step, with 2 micro-batches" in done.stdout


def test_advice_keeps_to_what_a_pipeline_can():
    overrides = ["experiment=llama3_8b_8xh100", "zero=z1", "parallel.pp=2", "launch.nodes=1", "offload=cpu"]
    advice = planning.advice(plan(compose(overrides)))
    assert "zero=z" not in advice


def test_a_pipeline_that_the_model_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"parallel\.pp=5: the model tiny has 4 layers, and every stage needs one\."):
        plan(compose(["debug=smoke", "parallel.pp=5", "launch.procs_per_node=5"]))
    falcon = ["model=hf", "model.config={model_type: falcon, num_hidden_layers: 4, vocab_size: 300}", "parallel.pp=2"]
    with pytest.raises(ConfigError, match=r"model of type falcon .* add an entry 'falcon' to parallel/stages\.yaml"):
        plan(compose(["debug=smoke", *falcon, "launch.procs_per_node=2"]))


def test_a_degree_that_the_model_cannot_be_split_into_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"parallel\.tp=3: .*can be split into 1, 2, 4\."):
        plan(compose(["debug=smoke", "parallel.tp=3", "launch.procs_per_node=3"]))


def test_the_mesh_is_drawn_without_a_plan(tmp_path):
    mesh = ["parallel.tp=2", "launch.procs_per_node=2", "launch.nodes=2", "train.global_batch_size=7"]
    done = anyshard("plan", "debug=smoke", "--mesh", *mesh, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["dp 0: tp [0 1] on node 0", "dp 1: tp [2 3] on node 1"]
    refused = anyshard("plan", "debug=smoke", "--mesh", "parallel.tp=3", "launch.procs_per_node=2", cwd=tmp_path)
    assert refused.returncode == 2
    assert "Start a multiple of 3 ranks" in refused.stderr


def test_host_memory_counts_too():
    overrides = ["experiment=llama3_8b_8xh100", "zero=z3", "offload=cpu_param", "cluster.host_memory_gib=64"]
    planned = plan(compose(overrides))
    assert not planned.fits
    assert "of host memory" in planning.advice(planned)


def test_checkpoints_take_host_memory():
    base = [
        "model=llama_125m",
        "data=synthetic",
        "launch.procs_per_node=2",
        "cluster.host_memory_gib=64",
        "checkpoint.every_steps=5",
    ]
    memory = plan(compose(base)).memory
    mine = plan(compose(base)).table.num_params * 12 / 2
    assert 2 * mine < memory.staging < 2 * mine + 2**26
    assert memory.host_bytes == memory.staging
    assert plan(compose([*base, "checkpoint.mode=sync"])).memory.staging == 64 * 2**20
    assert plan(compose([*base, "checkpoint.staging_gib=0.5"])).memory.staging == GIB // 2
    with_ram = plan(compose([*base, "checkpoint.ram_every_steps=1"])).memory
    assert with_ram.shared_memory == pytest.approx(2 * mine, rel=1e-6)
    assert with_ram.staging == memory.staging + 128 * 2**20
    assert with_ram.host_bytes == with_ram.staging + with_ram.shared_memory
    small = plan(compose([*base, "checkpoint.ram_every_steps=1", "cluster.host_memory_gib=4"]))
    assert not small.fits
    assert "checkpoint.ram_every_steps=0" in planning.advice(small)


def test_sequences_beyond_the_models_positions_are_refused():
    with pytest.raises(ConfigError, match=r"data\.sequence_length=100000.*2048"):
        plan(compose(["debug=smoke", "data.sequence_length=100000"]))


def test_a_child_that_dies_is_an_error_with_its_last_words(monkeypatch):
    monkeypatch.setattr(planning.sys, "executable", "/bin/false")
    with pytest.raises(LaunchError, match="the model could not be looked at"):
        planning.param_table(compose(["debug=smoke", "model.config.hidden_size=48", "model.config.intermediate_size=96"]))


def test_a_cache_that_is_cut_off_or_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("ANYSHARD_CACHE", str(cache))
    config = compose(["model=tiny"])
    table = planning.param_table(config)
    (cached,) = (cache / "params").glob("*.json")
    cached.write_text(cached.read_text()[:100])
    assert planning.param_table(config) == table
    assert planning.param_table(config) == table  # from the mended entry
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYSHARD_CACHE", str(tmp_path / "file" / "below"))
    assert planning.param_table(config) == table


def test_everything_is_printed_and_the_file_to_blame_is_named(tmp_path):
    shown = anyshard("plan", "model=tiny", "zero=z2", cwd=tmp_path).stdout
    for text in ("model.layers.*.mlp.up_proj.weight (4x)", "model.embed_tokens.weight", '"stage": 2'):
        assert text in shown
    (tmp_path / "mine" / "schedule").mkdir(parents=True)
    (tmp_path / "mine" / "schedule" / "long.yaml").write_text("name: cosine\nwarmup_steps: 5000\n")
    refused = anyshard("plan", "--config-dir", "mine", "schedule=long", cwd=tmp_path)
    assert refused.returncode == 2
    assert f"(Set in {tmp_path}/mine/schedule/long.yaml.)" in refused.stderr
