"""The loop that we are compared with: what a careful person writes around DeepSpeed, with nothing of ours in it.

    torchrun --nproc-per-node 2 benchmarks/hand_written.py OPTIONS.json   # the fields of Options

It does less than we do: it cannot be stopped or resumed, draws samples with repetitions, evaluates and checks nothing.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Options:
    model: dict[str, Any]  # fields of LlamaConfig
    deepspeed: dict[str, Any]
    tokens: Path
    sequence_length: int
    max_steps: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    log_every_steps: int
    warmup_steps: int = 1
    min_lr_ratio: float = 0.1
    seed: int = 42
    tp: int = 1
    sp: int = 1


class HandWritten:
    """Model, engine and data of one rank."""

    def __init__(self, options: Options) -> None:
        self.options, self.step = options, 0
        torch.manual_seed(options.seed)
        model = LlamaForCausalLM(LlamaConfig(**options.model, use_cache=False))
        config, mpu = dict(options.deepspeed), None
        if options.tp > 1:
            # without the mesh DeepSpeed makes the batch 1/tp of what is asked for
            deepspeed.utils.groups._init_tp_mesh_device(tensor_model_parallel_size=options.tp)
            config["tensor_parallel"], mpu = {"autotp_size": options.tp}, deepspeed.utils.groups
        if options.sp > 1:
            from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

            config["sequence_parallel_size"] = options.sp
            micro = config["train_micro_batch_size_per_gpu"]
            mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", options.sp, micro)
        matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim <= 1 or "embed" in name]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
        self.engine.train()
        self.rank = dist.get_rank()
        self.micro = options.deepspeed["train_micro_batch_size_per_gpu"]
        self.accumulation = options.deepspeed["gradient_accumulation_steps"]
        self.tokens = np.memmap(options.tokens, dtype=np.uint16, mode="r")
        self.random = np.random.default_rng([options.seed, self.rank // (options.tp * options.sp)])

    def train_step(self) -> None:
        options, engine = self.options, self.engine
        lr = options.lr * self.lr_factor()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        logged = (self.step + 1) % options.log_every_steps == 0 or self.step == 0
        total = 0.0
        for _ in range(self.accumulation):
            input_ids, labels = self.batch()
            logits = engine(input_ids=input_ids, **self.positions(input_ids)).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            if options.sp > 1 and options.deepspeed["zero_optimization"]["stage"] < 3:
                loss = loss / options.sp  # DeepSpeed sums over these ranks at ZeRO 1 and 2, and averages at 3
            engine.backward(loss)
            if logged:
                total += loss.item() / self.accumulation
            engine.step()
        self.step += 1
        if logged and self.rank == 0:
            print(f"step {self.step}/{options.max_steps} loss {total:.4f} lr {lr:.2e}", flush=True)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.options.sequence_length
        starts = self.random.integers(0, len(self.tokens) - length - 1, self.micro)
        rows = torch.from_numpy(np.stack([self.tokens[i : i + length + 1].astype(np.int64) for i in starts]))
        inputs, labels = rows[:, :-1], rows[:, 1:]
        if self.options.sp == 1:
            return inputs, labels
        part = self.rank % self.options.sp
        return inputs.chunk(self.options.sp, dim=1)[part], labels.chunk(self.options.sp, dim=1)[part]

    def positions(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.options.sp == 1:
            return {}
        first = self.rank % self.options.sp * input_ids.shape[1]
        return {"position_ids": torch.arange(first, first + input_ids.shape[1]).expand(input_ids.shape[0], -1)}

    def lr_factor(self) -> float:
        options = self.options
        if self.step < options.warmup_steps:
            return (self.step + 1) / options.warmup_steps
        done = (self.step - options.warmup_steps) / max(options.max_steps - options.warmup_steps, 1)
        return options.min_lr_ratio + (1 - options.min_lr_ratio) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def start() -> None:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text())
    start()
    run = HandWritten(Options(**options))
    for _ in range(run.options.max_steps):
        run.train_step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
