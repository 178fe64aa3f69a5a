"""all-MiniLM-L6-v2 quantised: what it costs in accuracy and size, and what it gains in speed, beside other libraries.

    FASTNN_DATA=... python benchmarks/minilm.py [accuracy | speed] [--threads 1] [--rounds 9] [--check]

accuracy: Spearman's correlation of cosine similarities with the scores of STS benchmark's development sets (English,
and machine-translated to Chinese), and the size of the file. GPTQ is calibrated on the demo's sentences, none of which
is in these sets. speed: 8 sentences of 128 tokens, every contender in turns in one process. Both see the same objects:
fastnn's (accelerated), torch.ao's and torchao's dynamic int8, onnxruntime's (quantize_dynamic of torch's export) and
onnxruntime on what fastnn.export wrote. Who is not installed is named as missing. --check: exit status 1 where an
accuracy or a size misses its bar.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import Module

import fastnn
from fastnn.compression.within import spearman
from fastnn.demo import encoder
from fastnn.demo.sentences import CANDIDATES, QUERIES

BARS = {
    "fastnn int8": (0.005, 1.0),
    "fastnn int4": (0.02, 0.25),
    "fastnn int4, GPTQ": (0.01, 0.25),
    "fastnn int4 x int8": (0.02, 0.25),
}
"""The most that Spearman's correlation may lose, and the largest file, of the float32 one."""
LANGUAGES = ("en", "zh")
SPEEDS = (("eager fp32", 2.5), ("fastnn fp32", 1.6), ("the best other int8", 1.2))
"""How many times as fast fastnn int8 should be."""
PACKAGES = {
    "torchao int8": ("torchao",),
    "onnxruntime int8": ("onnx", "onnxscript", "onnxruntime"),
    "fastnn.export int8, onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
}
"""What contenders need beside torch."""
TWICE = "fastnn int4, GPTQ"
"""Of the same speed as fastnn int4: not timed again."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# ---- accuracy


def pairs(language: str) -> tuple[list[str], list[str], Tensor]:
    path = Path(os.environ["FASTNN_DATA"]) / f"stsb-{language}-dev.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [a for a, _, _ in rows], [b for _, b, _ in rows], torch.tensor([float(score) for *_, score in rows])


def embed(model: encoder.Encoder, sentences: list[str]) -> Tensor:
    """Rows in the order given; batches of like lengths, so that little is padded."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    rows = model.embed([sentences[i] for i in order], 64)
    return torch.empty_like(rows).index_copy_(0, torch.tensor(order), rows)


def scores(model: encoder.Encoder) -> dict[str, float]:
    found = {}
    for language in LANGUAGES:
        first, second, wanted = pairs(language)
        found[language] = spearman((embed(model, first) * embed(model, second)).sum(1), wanted)
    return found


def accuracy(base: encoder.Encoder, made: dict[str, Contender]) -> bool:
    """Prints the table; whether every bar is kept."""
    say(f"{'':32} {'en':>7} {'zh':>7} {'en lost':>8} {'zh lost':>8} {'file':>9} {'of fp32':>8}")
    kept, before, whole = True, {}, made["eager fp32"].nbytes
    for name, contender in made.items():
        after = scores(encoder.Encoder(contender.model, base._tokenizer))
        before = before or after  # eager fp32 is the first
        lost = {language: before[language] - after[language] for language in LANGUAGES}
        text = f"{name:32} {after['en']:7.4f} {after['zh']:7.4f} {lost['en']:8.4f} {lost['zh']:8.4f}"
        if contender.nbytes:
            text += f" {contender.nbytes / 1e6:6.1f} MB {contender.nbytes / whole:8.1%}"
        if name in BARS:
            most, size = BARS[name]
            good = max(lost.values()) <= most and contender.nbytes <= size * whole
            kept &= good
            text += "  ok" if good else f"  MISSES {most} or {size:.0%}"
        say(text)
    return kept


# ---- contenders


@dataclass(frozen=True)
class Contender:
    model: Module
    """Called as the encoder is."""
    nbytes: int
    """Of its file; 0 where it has none."""


class Session(Module):
    """A file, run by onnxruntime."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> SimpleNamespace:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SimpleNamespace(last_hidden_state=torch.from_numpy(self.session.run(None, feed)[0]))


class Plain(Module):
    """The encoder with token ids and mask, and the last states alone."""

    def __init__(self, model: Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found


def exported(model: Module, path: Path) -> Path:
    """What fastnn.export writes, for any batch and length."""
    ids = torch.randint(1000, 30000, (2, 16), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: {0: "batch", 1: "tokens"} for name in example}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastnn.export(Plain(model), path, example, dynamic_shapes=shapes)
    return path


def torch_ao(model: Module) -> Contender:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Contender(torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}), 0)


def torchao(model: Module) -> Contender:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return Contender(model, 0)


def onnxruntime_int8(model: Module, threads: int, folder: Path) -> Contender:
    """onnxruntime's own quantize_dynamic of the floating file, a scale for each output."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "theirs.onnx"
    quantize_dynamic(exported(model, folder / "float.onnx"), path, per_channel=True, weight_type=QuantType.QInt8)
    return Contender(Session(path, threads), path.stat().st_size)


def ours_by_onnxruntime(model: Module, threads: int, folder: Path) -> Contender:
    model, path = copy.deepcopy(model), folder / "ours.onnx"
    fastnn.quantize_(model, fastnn.Int8Dynamic())
    exported(model, path)
    return Contender(Session(path, threads), path.stat().st_size)


def ours(base: encoder.Encoder, config: object | None) -> Contender:
    """fastnn's: attention, norms and fused layers by accelerate, dense layers and tables by the configuration."""
    model, calibration = copy.deepcopy(base.model), None
    if getattr(config, "rounding", None) is not None:
        sentences = [*QUERIES, *CANDIDATES]
        calibration = [base.tokens(sentences[i : i + 8]) for i in range(0, len(sentences), 8)]
    if config is not None:
        fastnn.quantize_(model, config, calibration=calibration)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fastnn.save(model, path)
        nbytes = path.stat().st_size
    fastnn.accelerate(model, freeze=True)
    return Contender(model, nbytes)


def contenders(base: encoder.Encoder, threads: int, folder: Path, without: str = "") -> dict[str, Contender]:
    """Those that are installed, one perhaps left out; says which are not."""
    fp32 = ours(base, None)
    makers: dict[str, Callable[[], Contender]] = {
        "eager fp32": lambda: Contender(base.model, fp32.nbytes),
        "fastnn fp32": lambda: fp32,
        "fastnn int8": lambda: ours(base, fastnn.Int8Dynamic()),
        "fastnn int4": lambda: ours(base, fastnn.Int4WeightOnly(64)),
        TWICE: lambda: ours(base, fastnn.Int4WeightOnly(64, rounding=fastnn.Gptq())),
        "fastnn int4 x int8": lambda: ours(base, fastnn.Int4Int8Dynamic(64)),
        "torch.ao int8": lambda: torch_ao(base.model),
        "torchao int8": lambda: torchao(base.model),
        "onnxruntime int8": lambda: onnxruntime_int8(base.model, threads, folder),
        "fastnn.export int8, onnxruntime": lambda: ours_by_onnxruntime(base.model, threads, folder),
    }
    found = {}
    for name, make in makers.items():
        lacking = [one for one in PACKAGES.get(name, ()) if importlib.util.find_spec(one) is None]
        if lacking:
            say(f"MISSING: {name}: pip install {' '.join(lacking)}")
        elif name != without:
            found[name] = make()
    return found


# ---- speed


def in_turns(ready: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, call in ready.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


@torch.no_grad()
def speed(made: dict[str, Contender], threads: int, rounds: int) -> None:
    ids = torch.randint(1000, 30000, (8, 128), generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def call_of(model: Module) -> Callable[[], Tensor]:
        return lambda: model(**tokens).last_hidden_state

    ready = {name: call_of(one.model) for name, one in made.items() if name != TWICE}
    truth = ready["eager fp32"]()
    errors = {name: float((call() - truth).norm() / truth.norm()) for name, call in ready.items()}
    times = in_turns(ready, rounds)
    middle = {name: statistics.median(found) for name, found in times.items()}
    say(f"8 x 128 tokens, {threads} threads, {rounds} rounds in turns; error: of the last states, relative")
    for name, found in times.items():
        say(f"{name:32} {min(found):8.1f} ms best {middle[name]:8.1f} median  error {errors[name]:.2e}")
    mine, best = "fastnn int8", min((t, n) for n, t in middle.items() if "int8" in n and not n.startswith("fastnn"))
    for other, bar in SPEEDS:
        other = other if other in middle else best[1]
        ratio = middle[other] / middle[mine]
        say(f"{mine} against {other}: {ratio:.2f}x by medians, bar {bar}x {'' if ratio >= bar else '  MISSED'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["accuracy", "speed", "both"], default="both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, kept = encoder.load(), True
    with tempfile.TemporaryDirectory() as folder:
        made = contenders(base, options.threads, Path(folder), TWICE if options.what == "speed" else "")
        if options.what != "speed":
            kept = accuracy(base, made)
        if options.what != "accuracy":
            speed(made, options.threads, options.rounds)
    return 0 if kept or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
