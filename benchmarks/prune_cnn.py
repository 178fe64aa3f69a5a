"""Half the channels of a small CNN gone: accuracy on MNIST's test images and time, before and after.

    FASTNN_DATA=folder python benchmarks/prune_cnn.py

Trains, shrinks (fastnn.shrink_), trains the smaller model again, and times both in turns in one process.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastnn


class Cnn(nn.Module):
    """Convolutions with batch normalisation, one residual sum, one depthwise block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
        )
        self.depthwise = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.BatchNorm2d(64))
        self.last = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(self.stem(x), 2)
        x = self.down(x)
        x = torch.relu(x + self.inner(x))
        x = torch.max_pool2d(torch.relu(self.depthwise(x)), 2)
        return self.head(self.last(x).mean((2, 3)))


def digits(part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` shuffled images (N, 1, 28, 28) about 0, and labels."""
    data = np.load(Path(os.environ["FASTNN_DATA"]) / "mnist.npz")
    order = np.random.default_rng(0).permutation(len(data[f"y_{part}"]))[:count]
    x = torch.from_numpy(data[f"x_{part}"][order]).float().div(127.5).sub(1).unsqueeze(1)
    return x, torch.from_numpy(data[f"y_{part}"][order]).long()


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float) -> None:
    """AdamW with a rate that falls to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
            loss = fastnn.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """In per cent."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(y)


def times(models: list[nn.Module], x: torch.Tensor, rounds: int = 15) -> list[float]:
    """Median milliseconds of each, in turns."""
    found: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for i in range(rounds + 2):
            for model, mine in zip(models, found, strict=True):
                start = time.perf_counter()
                model(x)
                if i > 1:
                    mine.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(one) for one in found]


def experiment(images: int = 8000, epochs: int = 2) -> dict[str, Any]:
    """Everything, as numbers: `images` to train on, `epochs` before and again after; all 10,000 test images."""
    torch.manual_seed(0)
    x, y = digits("train", images)
    test = digits("test", 10000)
    model = Cnn()
    train(model, x, y, epochs, 5e-3)
    before, original = accuracy(model, *test), copy.deepcopy(model)
    report = fastnn.shrink_(model, fastnn.Shrink(0.5, multiple_of=8), example_inputs=x[:2])
    found: dict[str, Any] = {"report": report, "before": before, "untrained": accuracy(model, *test)}
    train(model, x, y, epochs, 2e-3)
    found["after"] = accuracy(model, *test)
    for batch in (1, 64, 512):
        old, new = times([original.eval(), model.eval()], x[:batch])
        found[f"ms of {batch}"] = (old, new, old / new)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, value in experiment().items():
        print(f"{name}: {value}", flush=True)
