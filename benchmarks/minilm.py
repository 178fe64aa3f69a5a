"""all-MiniLM-L6-v2 quantised: what it costs in accuracy and size, and what it gains in speed.

    FASTNN_DATA=... python benchmarks/minilm.py [accuracy | speed] [--threads 1] [--rounds 9] [--check]

accuracy: Spearman's correlation of cosine similarities with the scores of STS benchmark's development sets (English,
and machine-translated to Chinese), and the size of the file that `fastnn.save` writes. GPTQ is calibrated on the
demo's sentences, none of which is in these sets. speed: 8 sentences of 128 tokens, every contender in turns in one
process; onnxruntime (with onnx) and torchao take part where they are installed. --check: exit status 1 where an
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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

import fastnn
from fastnn.demo import encoder
from fastnn.demo.sentences import CANDIDATES, QUERIES

BARS = {"int8": (0.005, 1.0), "int4": (0.02, 0.25), "int4, GPTQ": (0.01, 0.25), "int4 x int8": (0.02, 0.25)}
"""The most that Spearman's correlation may lose, and the largest file, of the float32 one."""
LANGUAGES = ("en", "zh")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# ---- accuracy


def pairs(language: str) -> tuple[list[str], list[str], Tensor]:
    path = Path(os.environ["FASTNN_DATA"]) / f"stsb-{language}-dev.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [a for a, _, _ in rows], [b for _, b, _ in rows], torch.tensor([float(score) for *_, score in rows])


def ranks(values: Tensor) -> Tensor:
    """Each value's place in the order, ties sharing the mean of theirs."""
    _, place, count = torch.unique(values.double(), return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]


def spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1])


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


def file_bytes(model: Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fastnn.save(model, path)
        return path.stat().st_size


def quantized(base: encoder.Encoder, name: str) -> Module:
    model = copy.deepcopy(base.model)
    if name == "int4, GPTQ":
        sentences = [*QUERIES, *CANDIDATES]
        samples = [base.tokens(sentences[i : i + 8]) for i in range(0, len(sentences), 8)]
        fastnn.quantize_(model, fastnn.Int4WeightOnly(64, rounding=fastnn.Gptq()), calibration=samples)
    else:
        configs = {
            "int8": fastnn.Int8Dynamic(), "int4": fastnn.Int4WeightOnly(64), "int4 x int8": fastnn.Int4Int8Dynamic(64),
        }  # fmt: skip
        fastnn.quantize_(model, configs[name])
    return model


def accuracy(base: encoder.Encoder) -> bool:
    """Prints the table; whether every bar is kept."""
    whole, before = file_bytes(base.model), scores(base)
    say(f"{'':14} {'en':>7} {'zh':>7} {'en lost':>8} {'zh lost':>8} {'file':>9} {'of fp32':>8}")
    say(f"{'fp32':14} {before['en']:7.4f} {before['zh']:7.4f} {'':8} {'':8} {whole / 1e6:6.1f} MB")
    kept = True
    for name, (most, size) in BARS.items():
        model = quantized(base, name)
        after, stored = scores(encoder.Encoder(model, base._tokenizer)), file_bytes(model)
        lost = {language: before[language] - after[language] for language in LANGUAGES}
        good = max(lost.values()) <= most and stored <= size * whole
        kept &= good
        say(
            f"{name:14} {after['en']:7.4f} {after['zh']:7.4f} {lost['en']:8.4f} {lost['zh']:8.4f} "
            f"{stored / 1e6:6.1f} MB {stored / whole:8.1%}  {'ok' if good else f'MISSES {most} or {size:.0%}'}"
        )
    return kept


# ---- speed


def torch_ao(model: Module) -> Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    return made


def torchao(model: Module) -> Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def onnxruntime_int8(model: Module, tokens: dict[str, Tensor], threads: int, folder: Path) -> Callable[[], object]:
    """onnxruntime's own quantize_dynamic of torch's own export, a scale for each output."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class Plain(Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    names = ("input_ids", "attention_mask")
    float_file, int8_file = folder / "float.onnx", folder / "int8.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = tuple(tokens[name] for name in names)
        torch.onnx.export(Plain().eval(), given, float_file, input_names=list(names), dynamo=True, external_data=False)
    quantize_dynamic(float_file, int8_file, per_channel=True, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(int8_file), options, providers=["CPUExecutionProvider"])
    wanted = {one.name for one in session.get_inputs()}
    feed = {name: tokens[name].numpy() for name in names if name in wanted}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def ours(model: Module, config: object | None) -> Module:
    """fastnn's: attention, norms and fused layers by accelerate, dense layers by the configuration."""
    model = copy.deepcopy(model)
    if config is not None:
        fastnn.quantize_(model, config)
    fastnn.accelerate(model, freeze=True)
    return model


def contenders(
    model: Module, tokens: dict[str, Tensor], threads: int, folder: Path
) -> Iterator[tuple[str, Callable[[], object]]]:
    def calls(made: Module) -> Callable[[], object]:
        return lambda: made(**tokens).last_hidden_state

    dense = {"*embedding*": None, "*": fastnn.Int8Dynamic()}
    yield "eager fp32", calls(model)
    yield "fastnn fp32", calls(ours(model, None))
    yield "fastnn int8", calls(ours(model, dense))
    yield "fastnn int4 x int8", calls(ours(model, {"*embedding*": None, "*": fastnn.Int4Int8Dynamic(64)}))
    yield "torch.ao int8", calls(torch_ao(model))
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        yield "onnxruntime int8", onnxruntime_int8(model, tokens, threads, folder)
    if importlib.util.find_spec("torchao"):
        yield "torchao int8", calls(torchao(model))


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
def speed(base: encoder.Encoder, threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    ids = torch.randint(1000, 30000, (8, 128), generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        ready = dict(contenders(base.model, tokens, threads, Path(folder)))
    truth = base.model(**tokens).last_hidden_state
    errors = {name: float((torch.as_tensor(call()) - truth).norm() / truth.norm()) for name, call in ready.items()}
    times = in_turns(ready, rounds)
    middle = {name: statistics.median(found) for name, found in times.items()}
    mine, best = "fastnn int8", min((t, n) for n, t in middle.items() if "int8" in n and not n.startswith("fastnn"))
    say(f"8 x 128 tokens, {threads} threads, {rounds} rounds in turns; error: of the last states, relative")
    for name, found in times.items():
        say(f"{name:20} {min(found):8.1f} ms best {middle[name]:8.1f} median  error {errors[name]:.2e}")
    for other, bar in (("eager fp32", 2.5), ("fastnn fp32", 1.6), (best[1], 1.2)):
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
    if options.what != "speed":
        kept = accuracy(base)
    if options.what != "accuracy":
        speed(base, options.threads, options.rounds)
    return 0 if kept or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
