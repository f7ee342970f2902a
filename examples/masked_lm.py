"""A masked language model on the bytes of a Python file: the number of targets varies from batch to batch.

torchrun --nproc-per-node 2 examples/masked_lm.py zero=z3 run.dir=runs/masked
"""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from anyshard import Task, compose, fit


def build_model():
    torch.manual_seed(0)  # the same weights on every rank
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForMaskedLM(BertConfig(vocab_size=257, **sizes))  # 256 bytes and the mask


def collate(samples):
    labels = torch.stack(samples)
    masked = torch.rand(labels.shape, generator=torch.Generator().manual_seed(int(labels.sum()))) < 0.15
    return {"input_ids": labels.masked_fill(masked, 256), "labels": labels.masked_fill(~masked, -100)}


def num_targets(batch):
    return (batch["labels"] != -100).sum()


def predict(model, batch):
    right = model(input_ids=batch["input_ids"]).logits.argmax(-1) == batch["labels"]
    return {"accuracy": right.sum() / num_targets(batch)}


if __name__ == "__main__":
    pieces = torch.tensor(list(Path(torch.__file__).read_bytes())).unfold(0, 64, 64)
    task = Task(build_model, pieces[64:], collate, lambda model, batch: model(**batch).loss, pieces[:64], predict, num_targets)
    fit(compose(["debug=smoke", "train.max_steps=60", *sys.argv[1:]]), task)
