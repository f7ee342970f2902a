"""Tiny engines of every layout, and the whole logical state of one: for the tests of checkpoints."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from helpers.optimizers import OPTIMIZERS
from torch import nn

GLOBAL_BATCH = 4
VOCAB = 61
LENGTH = 12


@dataclass(frozen=True)
class Layout:
    """How an engine is laid out; dp * tp * pp ranks build it."""

    dp: int
    zero: int
    offload: bool = False
    offload_param: bool = False
    optimizer: str = "adamw"
    dtype: str = "fp32"
    sub_group: int | None = None  # ZeRO-3: elements of a sub-group
    fp32_accumulation: bool = False  # at ZeRO-1 in bf16 DeepSpeed then uses another optimizer class
    tp: int = 1
    pp: int = 1
    model: str = "llama"

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        extras = [name for name in ("offload", "offload_param", "sub_group", "fp32_accumulation") if getattr(self, name)]
        extras += [f"{axis}{getattr(self, axis)}" for axis in ("tp", "pp") if getattr(self, axis) > 1]
        extras += [self.model] * (self.model != "llama")
        return "-".join([f"dp{self.dp}", f"z{self.zero}", self.optimizer, self.dtype, *extras])


def tiny_llama(*, tied: bool = False, hidden: int = 32) -> nn.Module:
    """Two layers with grouped-query attention, a frozen norm, a persistent buffer; a vocabulary that no dp divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden + 13,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    model.register_buffer("seen", torch.arange(5, dtype=torch.int64))
    return model


def tiny_gpt2() -> nn.Module:
    """Two layers with fused queries, keys and values, and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, **dropouts))


def scrambled_llama(**options: Any) -> nn.Module:
    """The same model with everything that a checkpoint holds overwritten by nonsense."""
    return scrambled(tiny_llama(**options))


def scrambled(model: nn.Module) -> nn.Module:
    """A model with everything that a checkpoint holds overwritten by nonsense."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *[buffer for name, buffer in model.named_buffers() if name == "seen"]]:
            tensor.fill_(3)
    return model


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def build(layout: Layout, model: nn.Module | None = None, **optimizer_options: Any) -> Any:
    """A DeepSpeed engine around a client's optimizer with two named groups."""
    import deepspeed

    from anyshard.parallel.groups import create_groups
    from anyshard.parallel.topology import Mesh

    model = model or FAMILIES[layout.model]()
    groups_of_ranks = create_groups(Mesh(dp=layout.dp, tp=layout.tp, pp=layout.pp), dist.get_rank())
    if layout.pp > 1:
        from anyshard.configs import schema
        from anyshard.trainer.building import stage_of

        config = schema.Config(parallel=schema.Parallel(tp=layout.tp, pp=layout.pp))
        model = stage_of(model, config, groups_of_ranks)
    elif layout.tp > 1:
        from anyshard.parallel.tensor import Sharder

        Sharder(model, groups_of_ranks, layout.model).shard_all()
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups = [
        {"name": "decay", "weight_decay": 0.1, "lr": 1e-2, "select": lambda p: p.dim() >= 2},
        {"name": "no_decay", "weight_decay": 0.0, "lr": 5e-3, "select": lambda p: p.dim() < 2},
    ]
    for group in groups:
        select = group.pop("select")
        group["params"] = [param for _, param in named if select(param)]
        group["param_names"] = [name for name, param in named if select(param)]
    zero: dict[str, Any] = {"stage": layout.zero, "stage3_param_persistence_threshold": 40}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if layout.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    if layout.sub_group:
        zero["sub_group_size"] = layout.sub_group
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": GLOBAL_BATCH // layout.dp,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if layout.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        model = model.bfloat16()
    if layout.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}
        model = model.half()
    if layout.fp32_accumulation:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = _optimizer(layout, groups, **optimizer_options)
    mpu = groups_of_ranks.mpu()
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False, mpu=mpu)[0]


def _optimizer(layout: Layout, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    from anyshard.trainer.optim.lion import Lion

    if layout.optimizer in OPTIMIZERS:
        return OPTIMIZERS[layout.optimizer](groups, **options)
    if layout.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, **options)
    if layout.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.lion import DeepSpeedCPULion

        if layout.optimizer == "lion":
            return DeepSpeedCPULion(groups, lr=1e-2, betas=(0.9, 0.95), **options)
        return DeepSpeedCPUAdam(groups, lr=1e-2, betas=(0.9, 0.95), adamw_mode=True, **options)
    if layout.optimizer == "lion":
        return Lion(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **options)


def train(engine: Any, first_step: int, num_steps: int) -> list[float]:
    """Steps on data that is a function of the step alone; returns the mean loss of each over the global batch."""
    losses = []
    dp, rank = dist.get_world_size(), dist.get_rank()
    pipelined = hasattr(engine.module, "feed")
    if engine.mpu is not None:
        dp, rank = engine.mpu.get_data_parallel_world_size(), engine.mpu.get_data_parallel_rank()
    for step in range(first_step, first_step + num_steps):
        generator = torch.Generator().manual_seed(step)
        samples = torch.randint(0, VOCAB, (GLOBAL_BATCH, LENGTH), generator=generator)
        total = torch.zeros(1)
        if pipelined:
            mine = [samples[number * dp + rank].unsqueeze(0) for number in range(GLOBAL_BATCH // dp)]
            batches = [{"input_ids": sample, "labels": sample} for sample in mine]
            engine.module.feed(batches, lambda model, batch, number: model(**batch).loss)
            losses.append(engine.train_batch(engine.module.inputs(batches)).item())
            continue
        for number in range(GLOBAL_BATCH // dp):
            sample = samples[number * dp + rank].unsqueeze(0)
            loss = engine(input_ids=sample, labels=sample).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / GLOBAL_BATCH
        dist.all_reduce(total)
        total *= dp / dist.get_world_size()
        losses.append(total.item())
    return losses


def logical_state(engine: Any) -> dict[str, str]:
    """Digest of every whole tensor of the state, whatever the layout; gathered over all ranks by brute force."""
    from anyshard.trainer.checkpoint import layout, optimizers

    slots, optimizer = layout.slots(engine), layout.inner_optimizer(engine)
    pieces = [
        (f.tensor.name, f.tensor.key, f.tensor.shape, f.box, f.start, _values(f))
        for f in optimizers.fragments(slots, optimizer, position=layout.position(engine))
        + layout.buffer_fragments(engine.module)
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, pieces)
    whole: dict[tuple[str, str], torch.Tensor] = {}
    filled: dict[tuple[str, str], torch.Tensor] = {}
    for name, key, shape, box, start, view in (piece for part in gathered for piece in part):
        tensor = whole.setdefault((name, key), torch.zeros(shape, dtype=view.dtype))
        mask = filled.setdefault((name, key), torch.zeros(shape, dtype=torch.bool))
        place = torch.arange(tensor.numel()).view(shape)[tuple(slice(*side) for side in box)].reshape(-1)
        place = place[start : start + view.numel()]
        old = tensor.view(-1)[place]
        assert torch.equal(torch.where(mask.view(-1)[place], old, view), view), f"the ranks disagree about {name} [{key}]"
        tensor.view(-1)[place] = view
        mask.view(-1)[place] = True
    assert all(bool(mask.all()) for mask in filled.values())
    digests = {
        f"{name} [{key}]": hashlib.blake2b(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for (name, key), tensor in whole.items()
    }
    steps = {scalar.value for scalar in optimizers.scalars(slots, optimizer) if scalar.key == "step"}
    assert len(steps) <= 1
    return digests | {f"group {name}": str(sorted(s.items())) for name, s in group_settings(engine).items()}


def _values(fragment: Any) -> torch.Tensor:
    """A copy of a fragment, from its swap file where it is in one."""
    if fragment.file is None:
        return fragment.view.detach().clone()
    values = torch.empty(fragment.numel, dtype=fragment.view.dtype)
    fragment.file.read_into(values.data_ptr(), 0, values.numel() * values.element_size())
    return values


def group_settings(engine: Any) -> dict[str, dict[str, Any]]:
    """The hyper-parameters that every implementation of an optimizer has."""
    groups = {group["name"]: group for group in engine.optimizer.param_groups}
    return {name: {key: group[key] for key in ("lr", "weight_decay")} for name, group in groups.items()}


def model_digest(engine: Any) -> dict[str, str]:
    """Digest of every parameter as the model computes with it, gathered where ranks hold parts."""
    import deepspeed

    from anyshard.parallel.part import part_of

    pieces: list[Any] = []
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param, enabled=hasattr(param, "ds_id")):
            value, part = param.detach().cpu().clone(), part_of(param)
            pieces.append((name, value.shape, ..., value) if part is None else (part.name, part.shape, part.box, value))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, pieces)
    whole: dict[str, torch.Tensor] = {}
    for name, shape, box, value in (piece for part in gathered for piece in part):
        region = box if box is ... else tuple(slice(*side) for side in box)
        whole.setdefault(name, torch.zeros(shape, dtype=value.dtype))[region] = value
    return {name: hashlib.blake2b(_bytes(value)).hexdigest()[:16] for name, value in whole.items()}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def manager(directory: Any, **options: Any) -> Any:
    """A CheckpointManager whose events are kept in `.events`."""
    from anyshard.trainer.checkpoint.manager import CheckpointManager
    from anyshard.trainer.checkpoint.retention import Retention

    events: list[tuple[str, dict[str, Any]]] = []
    group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
    options["stay"] = Retention(options.pop("keep", 3))
    arguments = {"verify": True, "timeout_s": 30.0, **options}
    made = CheckpointManager(directory, group=group, event=lambda kind, **details: events.append((kind, details)), **arguments)
    made.events = events  # type: ignore[attr-defined]
    return made


@contextmanager
def engine_of(layout: Layout, model: nn.Module | None = None, **options: Any) -> Any:
    """An engine that is torn down again, so that the next of another layout can follow in the same process."""
    engine = build(layout, model, **options)
    try:
        yield engine
    finally:
        engine.destroy()
