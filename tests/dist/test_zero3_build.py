"""Models built across ranks: the same weights under every ZeRO stage and rank count, within the memory bound of ZeRO-3."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.models import small_config
from helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

MIB = 2**20
SLACK_MIB = 16
"""Small objects, and the sampling of the peak."""


def _ds_config(stage: int, dtype: str = "fp32") -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bf16"},
    }


def _world() -> Any:
    import torch.distributed as dist

    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.topology import Mesh

    return create_groups(Mesh(dp=dist.get_world_size()), dist.get_rank())


def _engine(family: str, stage: int, dtype: str = "fp32") -> Any:
    import deepspeed
    import torch

    from anyshard.parallel.zero3 import Zero3Partitioner
    from anyshard.trainer.models.hf import build

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    ds_config = _ds_config(stage, dtype)
    partition = Zero3Partitioner(ds_config, torch_dtype, _world()) if stage == 3 else None
    model = build(small_config(family), device=torch.device("cpu"), dtype=torch_dtype, partition=partition)
    if stage == 3:
        assert all(param.numel() == 0 and param.ds_tensor is not None for param in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=ds_config)
    return engine


def _digests(family: str, stage: int) -> dict[str, str]:
    import deepspeed

    engine = _engine(family, stage)
    digests = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=stage == 3):
            digests[name] = hashlib.sha256(param.detach().numpy().tobytes()).hexdigest()
    engine.destroy()
    return digests


def _losses(family: str, stage: int, dtype: str = "fp32") -> tuple[list[float], int, str]:
    import torch
    import torch.distributed as dist

    engine = _engine(family, stage, dtype)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 272, (4, 32), generator=generator)
    losses = []
    for _ in range(5):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        value = loss.detach().double()
        dist.all_reduce(value)
        losses.append(value.item() / dist.get_world_size())
    num_params = len(list(engine.module.parameters()))
    rotary = next((str(buffer.dtype) for name, buffer in engine.module.named_buffers() if "inv_freq" in name), "none")
    engine.destroy()
    return losses, num_params, rotary


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_bit_equal_for_every_rank_count_and_stage(family: str) -> None:
    reference = run_ranks(_digests, 1, family=family, stage=0)[0]
    assert len(set(reference.values())) > 3
    for world_size in (1, 2, 4):
        for stage in (0, 1, 2, 3):
            for digests in run_ranks(_digests, world_size, family=family, stage=stage):
                assert digests == reference, (world_size, stage)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_a_model_partitioned_while_built_trains_as_zero_1(family: str) -> None:
    reference, num_params, _ = run_ranks(_losses, 2, family=family, stage=1)[0]
    losses, num_partitioned, _ = run_ranks(_losses, 2, family=family, stage=3)[0]
    assert losses == pytest.approx(reference, rel=1e-5)
    assert losses[-1] < losses[0]
    assert num_partitioned == num_params  # qwen3 ties its embeddings: still one parameter


@pytest.mark.parametrize("stage", [1, 3])
def test_rotary_frequencies_stay_in_fp32_under_bf16(stage: int) -> None:
    losses, _, dtype = run_ranks(_losses, 2, family="llama", stage=stage, dtype="bf16")[0]
    assert dtype == "torch.float32"
    assert losses[-1] < losses[0]


BIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
}


def _peak_growth_mib(partitioned: bool, model: dict[str, Any]) -> tuple[float, float, float]:
    """Growth of the resident set while the model is built, the model's size and its largest module's, in MiB."""
    import psutil
    import torch

    from anyshard.configs import schema
    from anyshard.parallel.zero3 import Zero3Partitioner
    from anyshard.trainer.models.hf import build
    from anyshard.trainer.models.table import table_of

    init = schema.Init.pretrained if "path" in model else schema.Init.random
    config = small_config("llama", init=init, **{"config": {}, **model})
    table = table_of(build(config, device=torch.device("meta"), dtype=torch.float32))
    partition = Zero3Partitioner(_ds_config(3), torch.float32, _world()) if partitioned else None
    process, peak, done = psutil.Process(), [0], threading.Event()

    def sample() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.001)

    start = process.memory_info().rss
    sampler = threading.Thread(target=sample)
    sampler.start()
    built = build(config, device=torch.device("cpu"), dtype=torch.float32, partition=partition)
    done.set()
    sampler.join()
    assert len(list(built.parameters())) == len(table.params)
    return (peak[0] - start) / MIB, 4 * table.num_params / MIB, 4 * max(table.modules().values()) / MIB


@pytest.mark.parametrize(("init", "copies"), [("random", 1), ("pretrained", 2)])  # 2: the pages of the file, and their copy
def test_zero3_build_holds_one_module_above_the_share(
    init: str, copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # else glibc keeps freed blocks below 32 MiB, which hides ours
    model: dict[str, Any] = {"config": BIG}
    if init == "pretrained":
        import torch

        from anyshard.trainer.models.hf import build

        saved = build(small_config("llama", config=BIG), device=torch.device("cpu"), dtype=torch.float32)
        saved.save_pretrained(tmp_path, max_shard_size="100MB")
        del saved
        model = {"path": str(tmp_path)}
    for growth, size, module in run_ranks(_peak_growth_mib, 2, fresh=True, partitioned=True, model=model):
        bound = size / 2 + module * copies + SLACK_MIB
        assert growth < bound
        assert bound < 0.8 * size  # else the bound would say nothing
    for growth, size, _ in run_ranks(_peak_growth_mib, 1, fresh=True, partitioned=False, model=model):
        assert growth > 0.95 * size
