"""Four fifths of the blocks of a dense classifier gone: accuracy on MNIST's test images, bytes and time.

    FASTNN_DATA=folder python benchmarks/sparsify_mlp.py

Trains, makes it sparse at once by magnitude and by Wanda, and step by step while it trains again
(fastnn.GradualSparsifier); times the last one and the dense one, as torch runs it and packed, in turns in one process.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastnn

Data = tuple[torch.Tensor, torch.Tensor]


def digits(part: str) -> Data:
    """Images (N, 784) about 0, and labels."""
    data = np.load(Path(os.environ["FASTNN_DATA"]) / "mnist.npz")
    x = torch.from_numpy(data[f"x_{part}"]).float().div(127.5).sub(1).flatten(1)
    return x, torch.from_numpy(data[f"y_{part}"]).long()


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    rate: float,
    gradual: fastnn.GradualSparsifier | None = None,
) -> None:
    """AdamW with a rate that falls to zero."""
    x, y = data
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    if gradual is not None:
        optimizer.register_step_post_hook(gradual)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
            loss = fastnn.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Percent."""
    x, y = data
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def file_bytes(model: nn.Module) -> int:
    """Of what fastnn.save writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fastnn.save(model, path)
        return path.stat().st_size


@torch.no_grad()
def times(calls: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, seconds: float = 3.0) -> list[float]:
    """Median milliseconds of each, in turns."""
    runs: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(runs[0]) < 20:
        for call, found in zip(calls, runs, strict=True):
            start = time.perf_counter()
            call(x)
            found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in runs]


def main() -> None:
    """Everything, in print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, test = digits("train"), digits("test")
    dense = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    train(dense, data, 3, 1e-3)
    print(f"dense: {accuracy(dense, test):.2f} %, {file_bytes(dense)} bytes")
    steps = 2 * (len(data[0]) // 128)
    for amount in (0.8, 0.9):
        for importance in ("magnitude", "wanda"):
            model = copy.deepcopy(dense)
            config = fastnn.Sparsify(amount, importance=importance)
            calibration = [data[0][:512]] if importance == "wanda" else None
            fastnn.sparsify_(model, config, exclude="4", calibration=calibration)
            print(f"{amount} by {importance}, at once: {accuracy(model, test):.2f} %")
        model = copy.deepcopy(dense)
        config = fastnn.Sparsify(amount)
        gradual = fastnn.GradualSparsifier(model, config, exclude="4", end=int(0.7 * steps), every=20)
        train(model, data, 2, 5e-4, gradual)
        report = gradual.strip_()
        print(f"{amount} by magnitude, in two epochs: {accuracy(model, test):.2f} %, {file_bytes(model)} bytes")
        print(f"  {report.summary}")
        compare(dense, model, test[0])


def compare(dense: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    """Prints how many times as fast the sparse one is."""
    packed = copy.deepcopy(dense)
    fastnn.accelerate(packed, freeze=True)
    for batch in (1, 16, 64, 512):
        ours, theirs, ours_dense = times([model, dense, packed], x[:batch])
        print(f"  batch {batch}: {ours:.3f} ms, torch {theirs / ours:.2f}x, packed {ours_dense / ours:.2f}x")


if __name__ == "__main__":
    main()
