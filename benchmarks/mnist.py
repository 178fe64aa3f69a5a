"""A classifier for MNIST's digits pruned and quantised within a budget: accuracy, size of the file, speed.

    FASTNN_DATA=folder python benchmarks/mnist.py [--epochs 6] [--budget 0.008] [--threads 1] [--check]

784-512-256-10 with ReLU is trained on 55,000 of the 60,000 training images; `fastnn.compress` is told the accuracy on
the other 5,000, and trains what has lost neurons on the 55,000 again, with the model before as the teacher. The 10,000
test images judge what comes out, which neither sees. Times are torch's eager float32 against what came out, in turns
in one process in which malloc keeps what is freed (`fastnn.memory.tune`), so that neither pays for fresh pages.
--check: exit status 1 where a bar is missed: 97 % of the test images, a file of at most 8 % of the float32 one, twice
as fast at batches of 64 and 512.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import fastnn
from fastnn.compression.judge import milliseconds, ratio_of
from fastnn.compression.state import State
from fastnn.demo.train import digits

HELD_OUT = 5000
ACCURACY, SIZE, SPEED = 0.97, 0.08, 2.0


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, teacher: nn.Module | None = None) -> None:
    """AdamW with a rate that falls to zero; with a teacher, half of the loss is the distance from what it says."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (len(x) // 128))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
            logits = model(x[batch])
            loss = fastnn.cross_entropy(logits, y[batch])
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(x[batch])
                loss = loss + fastnn.distillation_loss(logits, wanted, temperature=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)) / len(
            y
        )


def times(before: nn.Module, after: nn.Module, x: Tensor, rounds: int) -> tuple[list[list[float]], float]:
    """Milliseconds of both, in turns, and the median ratio."""
    pair = nn.ModuleList([before, after])
    found: list[list[float]] = [[], []]
    for _ in range(rounds):
        for model, mine in zip(pair, found, strict=True):
            mine += milliseconds(model, [State(model)], x, 1)[0]
    return found, ratio_of(found)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--budget", type=float, default=0.008)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", type=Path, help="a folder: the two models are read from it, or written to it")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fastnn.memory.tune()
    torch.manual_seed(0)
    found = digits()
    if isinstance(found, str):
        sys.exit(found)
    images, labels, test_images, test_labels, source = found
    x, y, held_x, held_y = images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]
    print(f"{source}; {len(y)} to train on, {len(held_y)} for the search, {len(test_labels)} to judge")
    folder = options.keep or Path(tempfile.mkdtemp())
    whole, small = folder / "float.safetensors", folder / "compressed.safetensors"
    model = classifier()
    if not whole.exists():
        train(model, x, y, options.epochs, 2e-3)
        fastnn.save(model, whole)
    model = fastnn.load(whole, model).eval()
    teacher = copy.deepcopy(model)
    if not small.exists():
        start = time.perf_counter()
        report = fastnn.compress(
            model,
            calib=[x[:256]],
            evaluate=lambda model: {"accuracy": accuracy(model, held_x, held_y)},
            example_inputs=x[:64],
            max_drop=options.budget,
            target="size",
            candidates=[
                fastnn.Int8Dynamic(),
                fastnn.Int4Int8Dynamic(),
                fastnn.Shrink(0.5, importance="activation", multiple_of=16),
            ],
            recover=lambda model: train(model, x, y, 2, 1e-3, teacher),
            max_evaluations=options.evaluations,
            save=small,
        )
        print(report)
        print(f"search: {time.perf_counter() - start:.0f} s on {options.threads} threads")
    model = fastnn.load(small, classifier()).eval()
    fastnn.accelerate(model, example_inputs=x[:64], freeze=True)

    before, after = accuracy(teacher, test_images, test_labels), accuracy(model, test_images, test_labels)
    share = small.stat().st_size / whole.stat().st_size
    print(f"test images: {before:.2%} -> {after:.2%}")
    print(f"file: {whole.stat().st_size} -> {small.stat().st_size} bytes, {share:.2%}")
    ratios = {}
    for batch in (1, 64, 512):
        each, ratios[batch] = times(teacher, model, x[:batch], options.rounds)
        print(f"batch {batch}: best {min(each[0]):.4f} -> {min(each[1]):.4f} ms, {ratios[batch]:.2f}x by medians")
    good = after >= ACCURACY and share <= SIZE and min(ratios[64], ratios[512]) >= SPEED
    print("every bar is kept" if good else f"a bar is MISSED: {ACCURACY:.0%}, {SIZE:.0%} of the file, {SPEED}x")
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
