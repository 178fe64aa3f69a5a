"""`python -m fastnn compress MODEL --budget DROP --out FILE`: what a search within a budget makes of a model.

What the budget is about depends on what is given, and the command says it:

--sts FILE    a CSV of pairs (sentence, sentence, score): Spearman's correlation of cosine similarities of mean states
              with the scores. The search sees every other pair; the others judge the result.
--text FILE   a text a line: agreement, the mean cosine of the model's outputs with those that it gave before, row by
              row, 1 for the model itself. Every other line is for the search, the others judge the result.
neither       the same on random token ids, which says little about text.

--text and --sts need the folder's tokenizer.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..quant.chain import run as run_model
from ..quant.files import load, save
from .judge import CompressError
from .report import Report
from .verb import compress

_BATCH, _CALIBRATION, _RANDOM = 32, 64, 64
"""Texts of a batch, texts that candidates are measured on, random texts where none are given."""

Evaluate = Callable[[Module], float]
Tokens = dict[str, Tensor]


def add_arguments(parser: argparse.ArgumentParser, kind: Any) -> None:
    """The options; --budget goes to `kind`, a group of which one is given."""
    kind.add_argument("--budget", type=_drop, metavar="DROP", help="search, with the metric falling by at most so much")
    parser.add_argument(
        "--target", choices=["latency", "size"], default="latency", help="of --budget (default latency)"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--sts", type=Path, metavar="CSV", help="of --budget: pairs and scores, Spearman's correlation")
    data.add_argument("--text", type=Path, metavar="FILE", help="of --budget: texts, agreement with the model before")
    parser.add_argument("--evaluations", type=int, default=20, metavar="N", help="of --budget, at most (default 20)")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="of --budget: keeps what was measured, to go on from"
    )
    parser.add_argument(
        "--report",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="of --budget: a .json, .md or .png file",
    )


def _drop(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def why_not(arguments: argparse.Namespace) -> str:
    """What is wrong with the options, in words; empty where nothing is."""
    given = [name for name in ("sts", "text", "resume", "report") if getattr(arguments, name)]
    if arguments.budget is None:
        return f"--{given[0]} goes with --budget" if given else ""
    if arguments.onnx is not None:
        return "--onnx goes with --int8 or --int4"
    if arguments.evaluations < 1:
        return "--evaluations must be at least 1"
    for path in (arguments.sts, arguments.text):
        if path is not None and not path.is_file():
            return f"there is no file {path}"
    for path in arguments.report:
        if path.suffix not in (".json", ".md", ".png") or not path.parent.is_dir():
            return f"--report {path}: a .json, .md or .png file in a folder that exists"
    return ""


def run(arguments: argparse.Namespace, console: Any, model: Any, example: Tokens | None) -> int:
    """The command, once the model is there: 0 where the file's model keeps the budget on what was not searched on."""
    if example is None:
        raise ValueError("--budget is for models that take token ids")
    calib, searched, unseen, what = _measures(arguments, model, example)
    console.print(what)
    before = _value(unseen, model)
    try:
        report = compress(
            model,
            calib=calib,
            evaluate=searched,
            example_inputs=example,
            max_drop=arguments.budget,
            target=arguments.target,
            max_evaluations=arguments.evaluations,
            resume=arguments.resume,
            progress=console.is_terminal,
        )
    except CompressError as error:
        sys.stderr.write(f"fastnn compress: {error}\n")
        return 1
    save(model, arguments.out, shapes=report.shapes)
    console.print(report)
    for path in arguments.report:
        _write(report, path)
    fresh = load(arguments.out, type(model)(model.config).to(_dtype(model)).eval())
    after = _value(unseen, fresh)
    size = arguments.out.stat().st_size
    console.print(f"{arguments.out}: {size / 2**20:.1f} MiB, read back into a fresh model.")
    console.print(f"That one, on what the search did not see: {before:.4f} before, {after:.4f} after.")
    if not before - after <= arguments.budget:
        sys.stderr.write(f"fastnn compress: that is beyond the budget of {arguments.budget:g}\n")
        return 1
    return 0


def _write(report: Report, path: Path) -> None:
    if path.suffix == ".png":
        report.plot(path)
    elif path.suffix == ".md":
        path.write_text(report.to_markdown(), "utf-8")
    else:
        path.write_text(json.dumps(report.to_json(), indent=1), "utf-8")


def _measures(arguments: Any, model: Any, example: Tokens) -> tuple[list[Tokens], Evaluate, Evaluate, str]:
    """Calibration, the measure of the search, the one on what it does not see, and what they are, in words."""
    if arguments.sts is not None:
        tokenizer = _tokenizer(arguments.model)
        pairs = _pairs(arguments.sts)
        sentences = [sentence for a, b, _ in pairs[::2] for sentence in (a, b)][:_CALIBRATION]
        halves = [correlation(half, tokenizer) for half in (pairs[::2], pairs[1::2])]
        count = f"{len(pairs[::2])} of the {len(pairs)} pairs of {arguments.sts}"
        return (
            _batches(sentences, tokenizer),
            halves[0],
            halves[1],
            f"The budget is of Spearman's correlation on {count}.",
        )
    if arguments.text is not None:
        tokenizer = _tokenizer(arguments.model)
        lines = [line for line in arguments.text.read_text("utf-8").splitlines() if line.strip()]
        if len(lines) < 2:
            raise ValueError(f"{arguments.text} has {len(lines)} lines, at least 2 are needed")
        one, other = (_batches(half, tokenizer) for half in (lines[::2], lines[1::2]))
        what = f"The budget is of the agreement with the outputs before (mean cosine) on {len(lines[::2])} lines."
    else:
        shape = (2 * _RANDOM // _BATCH, _BATCH, example["input_ids"].shape[1])
        ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        one, other = ([{"input_ids": batch} for batch in ids[half::2]] for half in (0, 1))
        what = (
            "The budget is of the agreement with the outputs before (mean cosine) on random token ids, which says "
            "little about text: give --text or --sts."
        )
    most = max(1, _CALIBRATION // _BATCH)
    return one[:most], agreement(model, one), agreement(model, other), what


def _tokenizer(name: str) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)


def _pairs(path: Path) -> list[tuple[str, str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    try:
        pairs = [(a, b, float(score)) for a, b, score in rows]
    except ValueError:
        raise ValueError(f"{path}: each row must be a sentence, a sentence and a number") from None
    if len(pairs) < 4:
        raise ValueError(f"{path} has {len(pairs)} pairs, at least 4 are needed")
    return pairs


def _batches(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """Token ids of texts in the order given, padded to the longest of a batch."""
    parts = [list(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return [dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts]


def first(output: Any) -> Tensor:
    """The main tensor of what a model gives."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def agreement(model: Module, samples: Sequence[Tokens]) -> Evaluate:
    """Mean cosine of output rows with those that the model gives now, padding apart; 0 for rows that are not finite."""
    true = [_rows(model, sample) for sample in samples]

    def evaluate(other: Module) -> float:
        found = [
            torch.nn.functional.cosine_similarity(_rows(other, sample), rows, dim=-1)
            for sample, rows in zip(samples, true, strict=True)
        ]
        return float(torch.cat(found).nan_to_num(0).mean())

    return evaluate


@torch.no_grad()
def _rows(model: Module, sample: Tokens) -> Tensor:
    rows = first(run_model(model, sample)).double()
    mask = sample.get("attention_mask")
    return rows.flatten(0, -2) if mask is None or rows.dim() < 3 else rows[mask.bool()]


def correlation(pairs: Sequence[tuple[str, str, float]], tokenizer: Any) -> Evaluate:
    """Spearman's correlation of cosines of mean states with the scores; batches of like lengths."""
    texts = sorted({text for a, b, _ in pairs for text in (a, b)}, key=len)
    place = {text: i for i, text in enumerate(texts)}
    left, right = torch.tensor([place[a] for a, _, _ in pairs]), torch.tensor([place[b] for _, b, _ in pairs])
    scores, batches = torch.tensor([score for *_, score in pairs]), _batches(texts, tokenizer)

    def evaluate(model: Module) -> float:
        rows = torch.cat([_embedded(model, batch) for batch in batches])
        return spearman((rows[left] * rows[right]).sum(1), scores)

    return evaluate


@torch.no_grad()
def _embedded(model: Module, batch: Tokens) -> Tensor:
    states, mask = first(model(**batch)), batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks."""
    return float(torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Each value's place in the order, ties sharing the mean of theirs."""
    _, place, count = torch.unique(values.double(), return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]


def _value(evaluate: Evaluate, model: Module) -> float:
    with torch.no_grad():
        return evaluate(model)


def _dtype(model: Module) -> torch.dtype:
    return next(t.dtype for t in model.parameters() if t.is_floating_point())
