"""The rows of the performance page (docs/performance.md) for softmax and linear: fastnn against eager torch.

    python benchmarks/rows.py                 print the table
    python benchmarks/rows.py --json FILE     also write the numbers
    python benchmarks/rows.py --readme        also put the table into README.md and docs/performance.md

Method: one thread (--threads), contenders interleaved in one process, their order turning from round to round; medians;
the ratio is the median of the rounds' ratios with its 95 % interval. Outputs are fresh on every call, as they are in a
model. Whoever is wrong by the error policy gets no time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import fastnn
from fastnn.info import collect

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOOR = 0.97  # not behind eager torch: the ratio's interval must reach this

SOFTMAX_SHAPES = ((64, 32000), (49152, 512))
LINEAR_ROWS = (
    ("none", (1, 4096, 4096)),
    ("gelu_tanh", (1, 4096, 4096)),
    ("none", (32, 768, 3072)),
    ("gelu_tanh", (32, 768, 3072)),
    ("none", (128, 768, 3072)),
    ("gelu_tanh", (128, 768, 3072)),
    ("gelu", (128, 768, 3072)),
    ("relu", (128, 768, 3072)),
    ("silu", (128, 768, 3072)),
    ("none", (2048, 768, 3072)),
    ("gelu_tanh", (2048, 768, 3072)),
)


@dataclass
class Row:
    """One line of the table; times in milliseconds."""

    name: str
    shape: tuple[int, ...]
    eager_ms: float
    ours_ms: float
    ratio: float
    low: float
    high: float
    rate: str

    @property
    def verdict(self) -> str:
        """Whether the row is ahead of, level with, or behind eager torch."""
        if self.high < FLOOR:
            return "behind"
        return "ahead" if self.low > 1.0 else "level"


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median by order statistics (binomial, normal approximation)."""
    ordered = sorted(values)
    n = len(ordered)
    reach = 0.98 * math.sqrt(n)
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return ordered[max(low, 0)], ordered[min(high, n - 1)]


def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call and round of each contender; a sample lasts at least 5 ms."""
    inner = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        inner[name] = max(1, int(0.005 / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    for round_number in range(rounds):
        order = list(contenders)
        turn = round_number % len(order)
        for name in order[turn:] + order[:turn]:
            call, count = contenders[name], inner[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count)
    gc.enable()
    return times


def make_row(name: str, shape: tuple[int, ...], times: dict[str, list[float]], ours: str, work: float, unit: str) -> Row:
    """The table line of contender `ours` against eager; `work` in operations or bytes per call."""
    ratios = [e / o for e, o in zip(times["eager"], times[ours], strict=True)]
    seconds = statistics.median(times[ours])
    low, high = median_interval(ratios)
    return Row(
        name,
        shape,
        statistics.median(times["eager"]) * 1e3,
        seconds * 1e3,
        statistics.median(ratios),
        low,
        high,
        f"{work / seconds / 1e9:.0f} {unit}",
    )


def check(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, floor: float) -> None:
    """The correctness gate: no time for a wrong result."""
    allowed = 2 * (eager.double() - truth).abs().max().item() + floor * truth.abs().max().item()
    error = (ours.double() - truth).abs().max().item()
    if not error <= allowed:
        raise SystemExit(f"wrong result: error {error:.2e}, allowed {allowed:.2e}")


def softmax_rows(rounds: int) -> list[Row]:
    """Forward and backward of the softmax rows."""
    rows = []
    for shape in SOFTMAX_SHAPES:
        for dtype_name, dtype in DTYPES.items():
            x = torch.randn(shape).to(dtype)
            g = torch.randn(shape).to(dtype)
            y = torch.softmax(x, -1)
            check(fastnn.softmax(x, -1), y, torch.softmax(x.double(), -1), 8e-3 if dtype != torch.float32 else 1e-6)
            moved = x.numel() * x.element_size()
            forward = measure({"eager": lambda x=x: torch.softmax(x, -1), "ours": lambda x=x: fastnn.softmax(x, -1)}, rounds)
            rows.append(make_row(f"softmax_fwd/{dtype_name}", shape, forward, "ours", 2 * moved, "GB/s"))
            eager_bwd = torch.ops.aten._softmax_backward_data.default
            ours_bwd = torch.ops.fastnn.softmax_bwd.default
            backward = measure(
                {
                    "eager": lambda g=g, y=y, dtype=dtype: eager_bwd(g, y, 1, dtype),
                    "ours": lambda g=g, y=y, dtype=dtype: ours_bwd(g, y, 1, False, dtype, True),
                },
                rounds,
            )
            rows.append(make_row(f"softmax_bwd/{dtype_name}", shape, backward, "ours", 3 * moved, "GB/s"))
    return rows


def linear_rows(rounds: int) -> list[Row]:
    """Linear with bias and activation: the weight as it lies, and packed once (a frozen layer)."""
    rows = []
    for activation_name, (m, k, n) in LINEAR_ROWS:
        activation = None if activation_name == "none" else activation_name
        for dtype_name, dtype in DTYPES.items():
            x = torch.randn(m, k).to(dtype)
            layer = fastnn.nn.Linear(k, n, dtype=dtype, activation=activation).requires_grad_(False).eval()
            frozen = fastnn.nn.Linear(k, n, dtype=dtype, activation=activation).requires_grad_(False).eval().freeze()
            frozen.load_state_dict(layer.state_dict())
            eager = eager_linear(x, layer.weight, layer.bias, activation)
            truth = eager_linear(x.double(), layer.weight.double(), layer.bias.double(), activation)()
            for module in (layer, frozen):
                check(module(x), eager(), truth, 8e-3 if dtype != torch.float32 else 1e-6)
            times = measure({"eager": eager, "ours": lambda f=layer, x=x: f(x), "packed": lambda f=frozen, x=x: f(x)}, rounds)
            for contender, label in (("ours", ""), ("packed", ", packed")):
                name = f"linear+{activation_name}/{dtype_name}{label}"
                rows.append(make_row(name, (m, k, n), times, contender, 2 * m * k * n, "GFLOP/s"))
    return rows


def eager_linear(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, activation: str | None
) -> Callable[[], torch.Tensor]:
    """Eager torch's two or one kernels for the same thing."""
    functions: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
    }
    if activation is None:
        return lambda: F.linear(x, w, b)
    function = functions[activation]
    return lambda: function(F.linear(x, w, b))


def markdown(rows: list[Row], machine: str) -> str:
    """The table for README and docs."""
    lines = [
        machine,
        "",
        "| row | shape | eager ms | fastnn ms | eager / fastnn (95 % interval) | rate | |",
        "| --- | --- | ---: | ---: | --- | ---: | --- |",
    ]
    for r in rows:
        shape = ", ".join(map(str, r.shape))
        interval = f"{r.ratio:.2f} ({r.low:.2f} .. {r.high:.2f})"
        lines.append(f"| {r.name} | ({shape}) | {r.eager_ms:.3f} | {r.ours_ms:.3f} | {interval} | {r.rate} | {r.verdict} |")
    return "\n".join(lines)


def put_between_markers(path: Path, text: str) -> None:
    """Replaces what stands between `<!-- rows:begin -->` and `<!-- rows:end -->`."""
    before = path.read_text()
    pattern = re.compile(r"(<!-- rows:begin -->\n).*?(\n<!-- rows:end -->)", re.S)
    if not pattern.search(before):
        raise SystemExit(f"{path}: no rows:begin and rows:end markers")
    path.write_text(pattern.sub(lambda m: m[1] + text + m[2], before))


def print_table(rows: list[Row], machine: str) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="eager torch against fastnn", caption=machine)
    for column in ("row", "shape", "eager ms", "fastnn ms", "eager / fastnn", "rate", ""):
        table.add_column(column, justify="left" if column in ("row", "shape", "") else "right", no_wrap=True)
    colours = {"ahead": "green", "level": "yellow", "behind": "bold red"}
    for r in rows:
        table.add_row(
            r.name,
            "x".join(map(str, r.shape)),
            f"{r.eager_ms:.3f}",
            f"{r.ours_ms:.3f}",
            f"{r.ratio:.2f} ({r.low:.2f}-{r.high:.2f})",
            r.rate,
            f"[{colours[r.verdict]}]{r.verdict}[/]",
        )
    Console(width=110).print(table)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose family starts so: softmax, linear")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    info = collect()
    machine = (
        f"{info['cpu']}, {options.threads} thread(s), {info['isa']}, torch {info['torch']}, fastnn {info['version']}, "
        f"{date.today()}; {options.rounds} interleaved rounds, plain allocator, fresh outputs"
    )
    rows = []
    with torch.no_grad():
        if "softmax".startswith(options.only):
            rows += softmax_rows(options.rounds)
        if "linear".startswith(options.only):
            rows += linear_rows(options.rounds)
    print_table(rows, machine)
    behind = [r.name for r in rows if r.verdict == "behind"]
    print(f"{len(rows)} rows, {len(behind)} behind eager torch" + (": " + ", ".join(behind) if behind else ""))
    if options.json:
        result = {"machine": machine, "rows": [asdict(r) | {"verdict": r.verdict} for r in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.readme:
        root = Path(__file__).resolve().parent.parent
        for name in ("README.md", "docs/performance.md"):
            put_between_markers(root / name, markdown(rows, machine))


if __name__ == "__main__":
    main()
