"""The demo itself: explain, accelerate, compare answers, compare times."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from .. import _extension, accelerate, explain, info, record
from ..accelerate.table import Column, rich_table
from ..info import machine_line
from .encoder import Encoder, load
from .measure import Comparison, compare
from .sentences import CANDIDATES, QUERIES
from .train import Run, Training, train_classifier, train_language

COSINE_LIMIT = 1e-5
"""The largest cosine distance between an embedding before and after."""

CURVE_LIMIT = 0.01
"""The largest relative difference between a loss curve through torch and through fastnn."""

_LARGE_BATCH = 16
"""From this batch on the products, and not the calls, decide: the demo wants 1.10x there, and no loss below."""

_SHOWN_QUERIES = (1, 4)
_SHOWN_ANSWERS = 4


@dataclass(frozen=True)
class Timing:
    """One row of the table of times."""

    batch: int
    tokens: int
    target: float
    found: Comparison

    @property
    def verdict(self) -> str:
        """Whether the target is reached, in words."""
        return "reached" if self.found.ratio >= self.target else "not on this machine"


@dataclass(frozen=True)
class Agreement:
    """How far the accelerated model's answers are from the original's."""

    max_cosine_distance: float
    max_abs_difference: float
    ranking_unchanged: bool


def demonstrate(rounds: int, batch: int, threads: int | None, training: bool, text: Path | None) -> dict[str, Any]:
    """Runs and prints everything; the numbers, and under `problems` what must not be."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    console.print(Panel(f"[bold]fastnn demo[/]: the sentence encoder all-MiniLM-L6-v2\n{machine_line()}", expand=False))
    with console.status("Loading the model"):
        original = load()
    sentences = [*QUERIES, *CANDIDATES]
    tokens = original.tokens(CANDIDATES[:batch])

    with console.status("Looking where the time goes"):
        explanation = explain(original.model, example_inputs=tokens)
    console.print(explanation)
    with console.status("Accelerating a copy and checking it"):
        ours = Encoder(copy.deepcopy(original.model), original._tokenizer)
        report = accelerate(ours.model, example_inputs=tokens, freeze=True)
    console.print(report)

    with console.status("Comparing answers"):
        before = original.embed(sentences, batch)
        with record() as runs:
            after = ours.embed(sentences, batch)
    agreement = _agreement(before, after)
    console.print(_answers(before, after))
    timings = _time(original, ours, rounds, sorted({1, batch}, reverse=True), console)

    kernels = [
        {"kernel": kernel, "backend": backend, "isa": isa, "calls": calls}
        for (kernel, backend, isa), calls in Counter(runs).most_common()
    ]
    problems = _problems(agreement, report.verified, report.verification)
    console.print(_times(timings), _outcome(agreement, kernels, timings, problems))
    trainings = _trainings(text, console) if training else []
    problems += _training_problems(trainings)
    return {
        "machine": info(),
        "timings": [{**asdict(t), "verdict": t.verdict} for t in timings],
        "agreement": asdict(agreement),
        "kernels": kernels,
        "report": {
            "accelerated": len(report.accelerated),
            "skipped": len(report.skipped),
            "fused": report.fused,
            "packed_bytes": report.packed_bytes,
            "verification": report.verification,
        },
        "training": [t if isinstance(t, str) else t.numbers() for t in trainings],
        "explain": [asdict(part) for part in explanation.parts],
        "problems": problems,
    }


def _ranking(vectors: Tensor) -> Tensor:
    """(queries, candidates) candidates by falling cosine."""
    queries, candidates = vectors[: len(QUERIES)], vectors[len(QUERIES) :]
    return (queries @ candidates.T).argsort(dim=1, descending=True, stable=True)


def _agreement(before: Tensor, after: Tensor) -> Agreement:
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double())
    return Agreement(
        max(0.0, (1 - cosine).max().item()),
        (before - after).abs().max().item(),
        torch.equal(_ranking(before), _ranking(after)),
    )


def _answers(before: Tensor, after: Tensor) -> Group:
    """A few questions with the sentences nearest to them."""
    tables = []
    for i in _SHOWN_QUERIES:
        rows = []
        for rank, candidate in enumerate(_ranking(after)[i, :_SHOWN_ANSWERS].tolist()):
            was, now = (float(v[i] @ v[len(QUERIES) + candidate]) for v in (before, after))
            rows.append((str(rank + 1), CANDIDATES[candidate], f"{was:.6f}", f"{now:.6f}"))
        columns = (
            Column("", lambda row: row[0], "right", "dim"),
            Column("nearest sentences", lambda row: row[1], wraps=True),
            Column("before", lambda row: row[2], "right"),
            Column("after", lambda row: row[3], "right"),
        )
        tables.append(rich_table(f"“{QUERIES[i]}”", columns, rows))
    return Group(*tables)


def _time(original: Encoder, ours: Encoder, rounds: int, batches: list[int], console: Console) -> list[Timing]:
    columns = (TextColumn("Timing, batch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    timings = []
    with Progress(*columns, console=console, transient=True) as progress:
        for batch in batches:
            task = progress.add_task(str(batch), total=rounds)
            tokens = original.tokens(CANDIDATES[:batch])
            advance: Callable[[], None] = lambda task=task: progress.advance(task)  # type: ignore[misc] # noqa: E731
            found = compare(
                lambda tokens=tokens: original.embed_tokens(tokens),  # type: ignore[misc]
                lambda tokens=tokens: ours.embed_tokens(tokens),  # type: ignore[misc]
                rounds,
                advance,
            )
            target = 1.1 if batch >= _LARGE_BATCH else 1.0
            timings.append(Timing(batch, tokens["input_ids"].shape[1], target, found))
    return timings


def _times(timings: list[Timing]) -> Any:
    columns = (
        Column("batch", lambda t: str(t.batch), "right"),
        Column("tokens each", lambda t: str(t.tokens), "right"),
        Column("torch", lambda t: f"{t.found.before_ms:.2f} ms", "right"),
        Column("fastnn", lambda t: f"{t.found.after_ms:.2f} ms", "right"),
        Column("faster by", lambda t: f"{t.found.ratio:.2f}x", "right", "bold green"),
        Column("interval", lambda t: f"{t.found.low:.2f} to {t.found.high:.2f}", "right"),
        Column("target", lambda t: f"{t.target:.2f}x {t.verdict}", wraps=True),
    )
    return rich_table("Latency, float32", columns, timings, timings[0].found.method)


def _trainings(text: Path | None, console: Console) -> list[Training | str]:
    """Trains every model both ways; prints the table. A string says why one was not trained."""
    columns = (TextColumn("Training, {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bars = [progress.add_task(name, total=None) for name in ("digits", "GPT-2", "Llama")]

        def advance(bar: TaskID) -> Callable[[int], None]:
            return lambda total: progress.update(bar, total=total, advance=1)

        found = [
            train_classifier(advance(bars[0])),
            train_language(text, False, advance(bars[1])),
            train_language(text, True, advance(bars[2])),
        ]
    done = [t for t in found if not isinstance(t, str)]
    rows = [_TrainingRow(training, ours) for training in done for ours in (False, True)]
    console.print(rich_table("Training, float32, the same start and batches", _TRAINING_COLUMNS, rows))
    for reason in dict.fromkeys(one for one in found if isinstance(one, str)):
        console.print(f"[yellow]Not trained:[/] {reason}")
    return found


_TRAINING_COLUMNS = (
    Column("model and data", lambda row: "" if row.ours else f"{row.of.name}: {row.of.data}", wraps=True),
    Column("steps", lambda row: "" if row.ours else str(row.of.steps), "right"),
    Column("by", lambda row: "fastnn" if row.ours else "torch"),
    Column("a step", lambda row: f"{row.run.median_ms:.2f} ms", "right"),
    Column("faster by", lambda row: f"{row.of.ratio:.2f}x" if row.ours else "", "right", "bold green"),
    Column("memory", lambda row: "" if row.run.memory is None else f"{row.run.memory / 2**20:.0f} MiB", "right"),
    Column("loss", lambda row: f"{row.run.losses[-1]:.4f}", "right"),
    Column("accuracy", lambda row: "" if row.run.accuracy is None else f"{100 * row.run.accuracy:.2f} %", "right"),
)


@dataclass(frozen=True)
class _TrainingRow:
    """One way of training one model."""

    of: Training
    ours: bool

    @property
    def run(self) -> Run:
        return self.of.fastnn if self.ours else self.of.torch


def _training_problems(trainings: list[Training | str]) -> list[str]:
    return [
        f"{t.name}: the loss curves differ by {100 * t.curve_difference:.2g} %"
        for t in trainings
        if not isinstance(t, str) and not t.curve_difference <= CURVE_LIMIT
    ]


def _problems(agreement: Agreement, verified: bool, verification: str) -> list[str]:
    problems = []
    if not agreement.max_cosine_distance <= COSINE_LIMIT:
        problems.append(f"embeddings differ by a cosine distance of {agreement.max_cosine_distance:.3g}")
    if not verified or "undone" in verification:
        problems.append(verification)
    if _extension.missing:
        problems.append(_extension.missing)
    return problems


def _outcome(agreement: Agreement, kernels: list[dict[str, Any]], timings: list[Timing], problems: list[str]) -> Panel:
    lines = [
        f"Embeddings: largest cosine distance {agreement.max_cosine_distance:.1e} (limit {COSINE_LIMIT:.0e}), "
        f"largest difference {agreement.max_abs_difference:.1e}",
        f"Ranking of {len(CANDIDATES)} sentences for {len(QUERIES)} questions unchanged: "
        + ("[green]yes[/]" if agreement.ranking_unchanged else "[red]no[/]"),
        "Ran: "
        + ", ".join(f"{k['kernel']} x{k['calls']} ({k['backend']}{k['isa'] and ' ' + k['isa']})" for k in kernels),
    ]
    for timing in timings:
        if timing.found.ratio < timing.target:
            lines.append(
                f"[yellow]Batch {timing.batch}: {timing.found.ratio:.2f}x; this machine does not reach "
                f"{timing.target:.2f}x at present[/]"
            )
    lines += [f"[red]Problem: {problem}[/]" for problem in problems]
    return Panel("\n".join(lines), title="Same answers" if not problems else "Something is wrong", expand=False)
