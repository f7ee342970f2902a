"""Another task in three functions: classify small pictures of stripes by their direction.

torchrun --nproc-per-node 2 examples/vision_classifier.py zero=z3 run.dir=runs/stripes
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from anyshard import Task, compose, fit


class Stripes(torch.utils.data.Dataset):
    def __init__(self, size, first_seed):
        self.size, self.first_seed = size, first_seed

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(self.first_seed + i))
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        return torch.sin([x, y, x + y, x - y][i % 4]) + 0.5 * noise, i % 4


def build_model():
    torch.manual_seed(0)  # the same weights on every rank
    convolutions = [nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 4))


def collate(samples):
    return {
        "image": torch.stack([image for image, _ in samples])[:, None],
        "label": torch.tensor([label for _, label in samples]),
    }


def loss(model, batch):
    return F.cross_entropy(model(batch["image"]).float(), batch["label"])


def predict(model, batch):
    return {"accuracy": (model(batch["image"]).argmax(1) == batch["label"]).float().mean()}


if __name__ == "__main__":
    task = Task(build_model, Stripes(4096, 0), collate, loss, validation_data=Stripes(256, 10**6), predict=predict)
    fit(compose(["debug=smoke", "optimizer.lr=1e-3", "train.max_steps=60", *sys.argv[1:]]), task)
