"""A masked language model on Python source bytes: the number of targets varies from batch to batch.

torchrun --nproc-per-node 2 examples/masked_lm.py zero=z3 run.dir=runs/masked
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from anyshard import Task, compose, fit

MASK, LENGTH = 256, 64


def build_model():
    torch.manual_seed(0)  # the same weights on every rank
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForMaskedLM(BertConfig(vocab_size=257, max_position_embeddings=LENGTH, **sizes))


def collate(samples):
    labels = torch.stack(samples)
    masked = torch.rand(labels.shape, generator=torch.Generator().manual_seed(int(labels.sum()))) < 0.15
    return {"input_ids": labels.masked_fill(masked, MASK), "labels": labels.masked_fill(~masked, -100)}


def num_targets(batch):
    return (batch["labels"] != -100).sum()


def loss(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits.float().flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum") / num_targets(batch).clamp(min=1)


if __name__ == "__main__":
    source = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    samples = list(source[: len(source) // LENGTH * LENGTH].view(-1, LENGTH))
    task = Task(build_model, samples[64:], collate, loss, validation_data=samples[:64], num_targets=num_targets)
    fit(compose(["debug=smoke", "train.max_steps=60", *sys.argv[1:]]), task)
