"""The golden DeepSpeed configurations are read as we mean them, and the places that our errors cite say what we claim."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

GOLDEN = sorted((Path(__file__).parents[1] / "golden/ds_config").glob("*.json"))
ROOT = Path(deepspeed.__file__).parent


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_deepspeed_reads_what_we_emit_as_we_mean_it(file: Path) -> None:
    compiled = json.loads(file.read_text())
    compiled["train_batch_size"] //= 2  # the golden files are for two ranks, and there is one here
    parsed = DeepSpeedConfig(compiled)
    assert parsed.gradient_accumulation_steps == compiled["gradient_accumulation_steps"]
    assert parsed.gradient_clipping == compiled["gradient_clipping"]
    assert parsed.zero_optimization_stage == compiled["zero_optimization"]["stage"]
    assert parsed.bfloat16_config.enabled is compiled["bf16"]["enabled"]
    assert parsed.float16_config.enabled is compiled["fp16"]["enabled"]
    assert parsed.zero_force_ds_cpu_optimizer is False
    assert parsed.zero_allow_untested_optimizer is True
    assert parsed.optimizer_name is None
    assert parsed.scheduler_name is None
    for kind in ("offload_optimizer", "offload_param"):
        block = getattr(parsed.zero_config, kind)
        assert (block.device if block else None) == compiled["zero_optimization"].get(kind, {}).get("device")


def test_the_throughput_timer_would_synchronise_the_device() -> None:
    """utils/config.py:36: on unless said, and synchronising; ours is off."""
    timers = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1}).timers_config
    assert (timers.enabled, timers.synchronized) == (True, True)
    assert DeepSpeedConfig({**json.loads(GOLDEN[0].read_text()), "train_batch_size": 16}).timers_config.enabled is False


@pytest.mark.parametrize(
    ("file", "line", "text"),
    [
        ("runtime/fp16/unfused_optimizer.py", 412, "def initialize_optimizer_states"),
        ("runtime/fp16/unfused_optimizer.py", 425, "self.optimizer.step()"),
        ("runtime/engine.py", 2305, "grad_accum_dtype == torch.float32 and self.zero_optimization_stage("),
        ("runtime/engine.py", 2323, "unsupported mix of"),
        ("runtime/zero/stage3.py", 316, "Hybrid Optimizer Only Supports DeepSpeedCPUAdam"),
        ("runtime/zero/config.py", 396, "def offload_ratio_check"),
        ("runtime/precision_config.py", 155, "min_loss_scale: int"),
        ("runtime/zero/stage_1_and_2.py", 889, "_update_model_bit16_weights"),
        ("module_inject/auto_ep_presets/base.py", 326, "registry.get(registry_key, "),
    ],
)
def test_what_our_errors_cite_is_there(file: str, line: int, text: str) -> None:
    assert text in (ROOT / file).read_text().splitlines()[line - 1]
