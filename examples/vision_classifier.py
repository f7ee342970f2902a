"""Another task, no words in it: classify small pictures of stripes by their direction.

torchrun --nproc-per-node 2 examples/vision_classifier.py zero=z3 run.dir=runs/stripes
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from anyshard import Task, compose, fit


def stripes(size, seed):
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    clean = torch.stack([x, y, x + y, x - y]).sin()
    noise = 0.5 * torch.randn(size, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [{"image": (clean[i % 4] + noise[i])[None], "label": i % 4} for i in range(size)]


def build_model():
    torch.manual_seed(0)  # the same weights on every rank
    convolutions = [nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 4))


def loss(model, batch):
    return F.cross_entropy(model(batch["image"]).float(), batch["label"])


def predict(model, batch):
    return {"accuracy": (model(batch["image"]).argmax(1) == batch["label"]).float().mean()}


if __name__ == "__main__":
    task = Task(build_model, stripes(4096, 0), default_collate, loss, validation_data=stripes(256, 1), predict=predict)
    fit(compose(["debug=smoke", "optimizer.lr=1e-3", "train.max_steps=60", *sys.argv[1:]]), task)
