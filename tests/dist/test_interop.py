"""Other formats with real DeepSpeed engines on both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_engines import (
    Layout,
    engine_of,
    logical_state,
    manager,
    model_digest,
    scrambled_llama,
    tiny_llama,
    train,
)
from helpers.interop import silent
from helpers.ranks import run_ranks

from anyshard.trainer.checkpoint.catalog import verify
from anyshard.trainer.checkpoint.interop.commands import COMMANDS, open_source
from anyshard.trainer.checkpoint.interop.diff import diff

pytestmark = pytest.mark.dist

STEPS, MORE = 3, 3
FROZEN = "model.layers.0.input_layernorm.weight"

Z1 = Layout(2, 1)
Z1_DP1 = Layout(1, 1)
Z2_CPU = Layout(2, 2, offload=True)
Z3 = Layout(2, 3)
Z3_SMALL = Layout(2, 3, sub_group=1500)
Z3_DP4 = Layout(4, 3)
Z1_BF16 = Layout(2, 1, dtype="bf16")
Z3_BF16 = Layout(2, 3, dtype="bf16")
BF16_OPTIMIZER = Layout(2, 1, dtype="bf16", fp32_accumulation=True)


def save_both(layout: Layout, directory: str, tied: bool = False) -> dict[str, Any]:
    """Train, save by DeepSpeed and by us, and go on."""
    with engine_of(layout, tiny_llama(tied=tied)) as engine:
        train(engine, 0, STEPS)
        engine.module.universal_checkpoint_info = {"universal_checkpoint_version": 0.4}
        engine.save_checkpoint(f"{directory}/ds", tag="t")
        meta = {"step": STEPS, "global_batch_size": 4}
        path = manager(Path(directory) / "ours").save(engine, step=STEPS, meta=meta, rank_meta={}).path
        state, model = logical_state(engine), model_digest(engine)
        return {"path": str(path), "state": state, "model": model, "losses": train(engine, STEPS, MORE)}


def restore(layout: Layout, path: str, tied: bool = False) -> dict[str, Any]:
    """Continue from an imported checkpoint in a fresh engine, with its own hyper-parameters."""
    with engine_of(layout, scrambled_llama(tied=tied)) as engine:
        restored = manager(Path(path).parent).restore(engine, Path(path))
        state, model = logical_state(engine), model_digest(engine)
        steps, skipped = engine.global_steps, engine.skipped_steps
        losses = train(engine, STEPS, MORE)
        return {"state": state, "model": model, "steps": steps - skipped, "losses": losses, "meta": restored.meta}


def load_universal(layout: Layout, directory: str, tied: bool = False) -> dict[str, Any]:
    """Continue in raw DeepSpeed, whose own loader reads the folder."""
    with engine_of(layout, tiny_llama(tied=tied)) as engine:
        with torch.no_grad():  # the trained parameters are nonsense; frozen ones DeepSpeed does not restore
            optimizer = engine.optimizer
            for flat in getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups:
                flat.fill_(3)
        groups = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
        engine._config.load_universal_checkpoint = True
        path, _ = engine.load_checkpoint(directory)
        assert path is not None
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.update(own)  # upstream: ZeRO 3 gives every group those of the first (stage3.py:3684)
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()  # and all of them one tensor, which each then counts up (:3680)
        return {"steps": engine.global_steps, "state": logical_state(engine), "losses": train(engine, STEPS, MORE)}


def tensors_of(state: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in state.items() if name.endswith("]")}


def convert_by_deepspeed(directory: Path) -> Path:
    out = directory / "ds" / "t_universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    arguments = ["--input_folder", str(directory / "ds" / "t"), "--output_folder", str(out), "--no_strict"]
    arguments += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=300)
    return out


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("source", "target", "tied"),
    [(Z1, Z3, True), (Z2_CPU, Z1_DP1, False), (Z3, Z1, False), (Z3_SMALL, Z3_DP4, True), (Z1_BF16, Z3_BF16, False)],
    ids=str,
)
def test_a_plain_deepspeed_checkpoint_comes_in(tmp_path: Path, source: Layout, target: Layout, tied: bool) -> None:
    before = run_ranks(save_both, source.dp, layout=source, directory=str(tmp_path), tied=tied)[0]
    result = COMMANDS["import"](str(tmp_path / "ds"), str(tmp_path / "in"), False, None, report=silent)
    assert (result["from"], result["step"]) == ("deepspeed", STEPS)
    assert verify(tmp_path / "in") == []
    same = diff(open_source(Path(before["path"])), open_source(tmp_path / "in"), weights_only=False, report=silent)
    assert {row["what"] for row in same["differences"]} <= {"setting"}, same
    assert {row["name"] for row in same["differences"]} <= {"group decay", "group no_decay"}
    after = run_ranks(restore, target.dp, layout=target, path=str(tmp_path / "in"), tied=tied)[0]
    assert tensors_of(after["state"]) == tensors_of(before["state"])
    assert after["steps"] == STEPS
    assert after["meta"]["imported"]["format"] == "deepspeed"
    tolerance = 2e-2 if source.dtype == "bf16" else 1e-5
    assert after["losses"] == pytest.approx(before["losses"], rel=tolerance)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layout", [BF16_OPTIMIZER, Layout(2, 1, optimizer="lion"), Layout(2, 3, optimizer="sgd")], ids=str)
def test_other_optimizers_of_deepspeed_come_in(tmp_path: Path, layout: Layout) -> None:
    before = run_ranks(save_both, layout.dp, layout=layout, directory=str(tmp_path))[0]
    COMMANDS["import"](str(tmp_path / "ds" / "t"), str(tmp_path / "in"), False, None, report=silent)
    after = run_ranks(restore, layout.dp, layout=layout, path=str(tmp_path / "in"))[0]
    assert tensors_of(after["state"]) == tensors_of(before["state"])
    assert after["losses"] == pytest.approx(before["losses"], rel=1e-6)


@pytest.mark.parametrize(("source", "target", "tied"), [(Z1, Z3, True), (Z3_SMALL, Z1_DP1, False)], ids=str)
def test_a_universal_folder_comes_in(tmp_path: Path, source: Layout, target: Layout, tied: bool) -> None:
    before = run_ranks(save_both, source.dp, layout=source, directory=str(tmp_path), tied=tied)[0]
    folder = convert_by_deepspeed(tmp_path)
    result = COMMANDS["import"](str(folder), str(tmp_path / "in"), False, None, report=silent)
    assert (result["from"], result["step"]) == ("universal", STEPS)
    same = diff(open_source(Path(before["path"])), open_source(tmp_path / "in"), weights_only=False, report=silent)
    assert {row["what"] for row in same["differences"]} <= {"setting"}, same
    after = run_ranks(restore, target.dp, layout=target, path=str(tmp_path / "in"), tied=tied)[0]
    assert tensors_of(after["state"]) == tensors_of(before["state"])
    assert after["losses"] == pytest.approx(before["losses"], rel=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("source", "target", "tied"),
    [(Z1, Z3, True), (Z1, Z1_DP1, False), (Z3_SMALL, Z2_CPU, False), (Z3, Z3_DP4, True)],
    ids=str,
)
def test_raw_deepspeed_continues_from_our_universal_folder(tmp_path: Path, source: Layout, target: Layout, tied: bool) -> None:
    before = run_ranks(save_both, source.dp, layout=source, directory=str(tmp_path), tied=tied)[0]
    options: dict[str, Any] = {"dtype": None, "max_shard_bytes": 1, "config": None}
    COMMANDS["export"](before["path"], str(tmp_path / "out"), "universal", **options, report=silent)
    after = run_ranks(load_universal, target.dp, layout=target, directory=str(tmp_path / "out"), tied=tied)[0]
    unrestored = {f"{FROZEN} [param]", "seen [buffer]"}  # by DeepSpeed; here they have their first values anyway
    assert set(before["state"]) >= unrestored
    assert tensors_of(after["state"]) == tensors_of(before["state"])
    assert after["steps"] == STEPS
    assert after["losses"] == pytest.approx(before["losses"], rel=1e-5)
    back = COMMANDS["diff"](before["path"], str(tmp_path / "out"), False, report=silent)
    assert {row["what"] for row in back["differences"]} <= {"setting"}, back


def save_hf(layout: Layout, directory: str) -> dict[str, Any]:
    """Train and save by us; the weights as the model computes with them, and its logits."""
    from anyshard.trainer.models.describe import describe_model

    with engine_of(layout, tiny_llama(tied=True)) as engine:
        del engine.module._buffers["seen"]  # Hugging Face's Llama has no such buffer
        train(engine, 0, STEPS)
        engine.module.eval()
        with torch.no_grad():
            logits = engine(input_ids=torch.arange(12).view(1, 12)).logits
        meta = {"model": describe_model(engine.module)}
        path = manager(Path(directory)).save(engine, step=STEPS, meta=meta, rank_meta={}).path
        return {"path": str(path), "model": model_digest(engine), "logits": logits}


@pytest.mark.parametrize("layout", [Z3, Z1_BF16], ids=str)
def test_an_export_computes_the_same_bit_for_bit(tmp_path: Path, layout: Layout) -> None:
    from transformers import AutoModelForCausalLM

    before = run_ranks(save_hf, layout.dp, layout=layout, directory=str(tmp_path / "ours"))[0]
    options: dict[str, Any] = {"dtype": None, "max_shard_bytes": 10_000, "config": None}
    COMMANDS["export"](before["path"], str(tmp_path / "hf"), "hf", **options, report=silent)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.dtype is (torch.bfloat16 if layout.dtype == "bf16" else torch.float32)
    model.to(model.dtype)  # the engine of this test casts rotary frequencies too
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    try:
        with torch.no_grad():
            assert torch.equal(model(input_ids=torch.arange(12).view(1, 12)).logits, before["logits"])
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is True


def start(layout: Layout, path: str | None) -> dict[str, Any]:
    """The first steps from the weights of a checkpoint, or from those that the model is built with."""
    model = tiny_llama(tied=True)
    del model._buffers["seen"]
    if path is not None:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(3)
    with engine_of(layout, model) as engine:
        notes = [] if path is None else manager(Path(path).parent).restore(engine, Path(path)).notes
        return {"model": model_digest(engine), "losses": train(engine, 0, 3), "state": logical_state(engine), "notes": notes}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", [Layout(1, 0), Z2_CPU, Z3_SMALL, Layout(2, 1, optimizer="lion")], ids=str)
def test_weights_alone_come_in_and_the_optimizer_starts_fresh(tmp_path: Path, layout: Layout) -> None:
    model = tiny_llama(tied=True)
    del model._buffers["seen"]
    model.save_pretrained(tmp_path / "hf")
    COMMANDS["import"](str(tmp_path / "hf"), str(tmp_path / "in"), False, None, report=silent)
    built = run_ranks(start, layout.dp, layout=layout, path=None)[0]
    assert run_ranks(start, layout.dp, layout=layout, path=str(tmp_path / "in"))[0] == built
