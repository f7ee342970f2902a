"""Traps of DeepSpeed's engine, shown on two ranks, and what our layer does about each. See test_config_traps.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import make_config
from helpers.hardware import needs_fp16
from helpers.ranks import run_ranks
from helpers.upstream import still

from anyshard.configs.batch import plan_batch
from anyshard.configs.rules import check
from anyshard.trainer.ds_config import compile_ds_config

pytestmark = pytest.mark.dist

BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


def _ours(changes: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration that we compile for two ranks."""
    config = make_config({"launch.procs_per_node": 2, "train.global_batch_size": 2, "train.micro_batch_size": 1, **changes})
    assert check(config) == []
    return compile_ds_config(config, plan_batch(config.train, 2))


def _initialize(ds_config: dict[str, Any], optimizer: str = "AdamW") -> Any:
    import deepspeed
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    built = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=built, config=ds_config)[0]


def _error(ds_config: dict[str, Any], optimizer: str = "AdamW") -> str:
    """On a rank: what `deepspeed.initialize` says, empty when it works."""
    try:
        _initialize(ds_config, optimizer).destroy()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _steps_taken_at_start(ds_config: dict[str, Any]) -> list[float]:
    """On a rank: how many steps Adam has counted before any batch was seen."""
    engine = _initialize(ds_config)
    inner = engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    return [float(state["step"]) for state in inner.state.values() if "step" in state]


def _norm_after_a_step(ds_config: dict[str, Any]) -> tuple[float | None, float | None, float]:
    """On a rank: the gradient norm that DeepSpeed keeps, the one that our engine keeps, and the true one."""
    import torch
    import torch.distributed as dist

    from anyshard.parallel.groups import Groups
    from anyshard.parallel.topology import Mesh
    from anyshard.trainer.engine import Engine

    groups = Groups(Mesh(dist.get_world_size()), dist.get_rank())
    engine = Engine(_initialize(ds_config), stage=ds_config["zero_optimization"]["stage"], lr=0.1, groups=groups)
    x = torch.full((1, 4), float(dist.get_rank() + 1))
    loss = engine.ds(x).sum()
    engine.ds.backward(loss)
    kept = engine.local_grad_norm()
    engine.ds.step()
    # dL/dW[i, j] = x_j and dL/db = 1, averaged over x = 1 and x = 2
    true = (16 * 1.5**2 + 4) ** 0.5
    return engine.grad_norm(), None if kept is None else kept.item(), true


def _weights_after_infinite_loss(ds_config: dict[str, Any]) -> tuple[bool, int]:
    """On a rank: whether the weights are finite after a step whose gradients are not, and the steps that were skipped."""
    import deepspeed
    import torch

    engine = _initialize(ds_config)
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(1, 4, dtype=dtype)).sum() * float("inf"))
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        finite = all(bool(param.isfinite().all()) for param in engine.module.parameters())
    return finite, engine.skipped_steps


def _checkpoints_activations(ds_config: dict[str, Any]) -> bool:
    """On a rank: whether a Hugging Face model recomputes activations under an `activation_checkpointing` block."""
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return bool(engine.module.is_gradient_checkpointing)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=needs_fp16)])
def test_stage_0_takes_a_phantom_step_in_low_precision(dtype: str) -> None:
    """runtime/fp16/unfused_optimizer.py:108 and :412: the optimizer steps on zero gradients when it is built."""
    steps = run_ranks(_steps_taken_at_start, 2, ds_config={**BATCH, dtype: {"enabled": True}})[0]
    still(
        bool(steps) and set(steps) == {1.0},
        "runtime/fp16/unfused_optimizer.py:108",
        "self.initialize_optimizer_states()",
        "configs/rules.py (_precision)",
    )
    still(True, "runtime/fp16/unfused_optimizer.py:412", "def initialize_optimizer_states", "configs/rules.py (_precision)")
    problems = check(make_config({"zero.stage": 0, "precision.dtype": dtype}))
    assert [problem.key for problem in problems] == ["zero.stage"]
    assert "zero=z1" in problems[0].fix


def test_stage_0_keeps_no_gradient_norm() -> None:
    """runtime/engine.py:3503: `clip_fp32_gradients` drops the norm that it computes; our engine computes it itself."""
    kept, ours, true = run_ranks(_norm_after_a_step, 2, ds_config=_ours({"zero.stage": 0, "precision.dtype": "fp32"}))[0]
    still(kept is None, "runtime/engine.py:3503", "clip_grad_norm_(", "trainer/engine.py (local_grad_norm)")
    assert ours == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_stages_keep_the_norm_before_clipping(stage: int) -> None:
    """runtime/engine.py:3519: what `Engine.grad_norm` relies on."""
    ds_config = _ours({"zero.stage": stage, "precision.dtype": "fp32", "train.max_grad_norm": 0.5})
    kept, ours, true = run_ranks(_norm_after_a_step, 2, ds_config=ds_config)[0]
    still(
        kept == pytest.approx(true, rel=1e-5),
        "runtime/engine.py:3519",
        "self._global_grad_norm = self.optimizer._global_grad_norm",
        "trainer/engine.py (grad_norm)",
    )
    assert ours is None


def test_an_optimizer_that_zero_does_not_know() -> None:
    """runtime/engine.py:2300: an assertion unless zero_allow_untested_optimizer is set."""
    error = run_ranks(_error, 2, ds_config={**BATCH, "zero_optimization": {"stage": 1}}, optimizer="SGD")[0]
    still(
        "untested ZeRO Optimizer" in error,
        "runtime/engine.py:2300",
        "self.zero_allow_untested_optimizer()",
        "trainer/ds_config.py (zero_allow_untested_optimizer)",
    )
    ours = _ours({"zero.stage": 1, "optimizer.name": "sgd"})
    assert run_ranks(_error, 2, ds_config=ours, optimizer="SGD") == ["", ""]


def test_a_torch_optimizer_with_its_state_on_the_cpu() -> None:
    """runtime/engine.py:2344: refused unless zero_force_ds_cpu_optimizer is false; sgd needs it."""
    block = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    error = run_ranks(
        _error,
        2,
        ds_config={**BATCH, "zero_optimization": block, "zero_allow_untested_optimizer": True},
        optimizer="SGD",
    )[0]
    still(
        error.startswith("ZeRORuntimeException"),
        "runtime/engine.py:2344",
        "if self.zero_force_ds_cpu_optimizer():",
        "trainer/ds_config.py (zero_force_ds_cpu_optimizer)",
    )
    ours = _ours({"zero.stage": 2, "offload.optimizer": "cpu", "optimizer.name": "sgd"})
    assert run_ranks(_error, 2, ds_config=ours, optimizer="SGD") == ["", ""]


def test_stage_0_with_another_type_of_accumulation() -> None:
    """runtime/engine.py:2323: NotImplementedError once every rank has built the model; ours before any starts."""
    types = {"data_types": {"grad_accum_dtype": "fp32"}}
    error = run_ranks(_error, 2, ds_config={**BATCH, "bf16": {"enabled": True}, **types})[0]
    still(
        error.startswith("NotImplementedError: unsupported mix"),
        "runtime/engine.py:2323",
        "unsupported mix of",
        "configs/rules.py (_deepspeed_extra)",
    )
    other = {"data_types": {"grad_accum_dtype": "bf16"}}
    problems = check(make_config({"zero.stage": 0, "precision.dtype": "fp32", "deepspeed_extra": other}))
    assert [problem.key for problem in problems] == ["deepspeed_extra.data_types.grad_accum_dtype"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bf16_step_that_is_not_finite_is_skipped(stage: int) -> None:
    """runtime/zero/stage_1_and_2.py:3029: at stages 1 and 2 only where bf16.check_grad_overflow is set, as we do."""
    ours = _ours({"zero.stage": stage, "precision.dtype": "bf16"})
    assert run_ranks(_weights_after_infinite_loss, 2, ds_config=ours) == [(True, 1)] * 2
    if stage < 3:
        without = {**ours, "bf16": {"enabled": True, "check_grad_overflow": False}}
        finite, skipped = run_ranks(_weights_after_infinite_loss, 2, ds_config=without)[0]
        still(
            (finite, skipped) == (False, 0),
            "runtime/zero/stage_1_and_2.py:3029",
            "if self.check_grad_overflow:",
            "trainer/ds_config.py (check_grad_overflow)",
        )


def test_the_activation_checkpointing_block_does_nothing_for_hugging_face_models() -> None:
    """runtime/activation_checkpointing/config.py:45: it configures functions that such models never call."""
    block = {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 1}}
    answers = run_ranks(_checkpoints_activations, 2, ds_config={**BATCH, "zero_optimization": {"stage": 1}, **block})
    still(
        answers == [False, False],
        "runtime/activation_checkpointing/config.py:45",
        "activation_checkpointing",
        "configs/deepspeed_keys.py (OWNED; train.activation_checkpointing asks the model itself)",
    )
    problems = check(make_config({"deepspeed_extra": block}))
    assert {problem.reason for problem in problems} == {"train.activation_checkpointing sets this."}


def test_a_lock_left_by_a_killed_build_is_waited_for_without_end(tmp_path: Path) -> None:
    """torch 2.13.0 utils/file_baton.py: `wait` has no limit; offload/op_cache.py removes locks that nobody holds."""
    from torch.utils.file_baton import FileBaton

    from anyshard.offload.op_cache import remove_stale_locks

    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    waiter = threading.Thread(target=FileBaton(str(lock)).wait, daemon=True)
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive(), "upstream changed: remove our workaround in offload/op_cache.py (stale_locks)"
    assert remove_stale_locks(tmp_path) == [lock]
    start = time.monotonic()
    waiter.join(5)
    assert not waiter.is_alive()
    assert time.monotonic() - start < 5


def test_ranks_on_cpus_load_an_operator_at_init() -> None:
    """comm/torch.py:51: the reason why `make setup` builds shm_comm and `needed_ops` lists it on every CPU run."""
    still(True, "comm/torch.py:51", "shm_cpp_module = builder.load()", "offload/op_cache.py (needed_ops)")
    loaded = run_ranks(_loaded_operators, 2)
    assert all("deepspeed_shm_comm" in names for names in loaded), loaded


def _loaded_operators() -> list[str]:
    from deepspeed.ops.op_builder.builder import OpBuilder

    return list(OpBuilder._loaded_ops)
