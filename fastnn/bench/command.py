"""`python -m fastnn bench`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..cli import MissingExtra
from ..testing.bench_cases import bench_cases, families
from .campaign import BadOptions, Options, chosen_families
from .campaign import run as run_benchmark
from .contenders import CONTENDERS
from .documents import write
from .gpu_limits import gpu_limits
from .gpu_machine import why_no_gpu
from .gpu_tables import limits_table as gpu_limits_table
from .gpu_tables import on_gpu
from .gpu_tables import rows_table as gpu_rows_table
from .limits import NoLimits, cache_folder, machine_limits
from .results import BadResult, Result
from .tables import limits_table, rows_table
from .verdict import Verdict

RESULTS = Path("benchmarks") / "results"
"""Where results go, below the current folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    defaults = Options()
    parser.add_argument(
        "what",
        nargs="*",
        metavar="FAMILY",
        help=f"{', '.join(families())} (all by default); or `limits`: the machine's",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="rows that contain this: softmax_fwd, 'bf16 (1,'")
    parser.add_argument("--sweep", action="store_true", help="the sweep's shapes, against eager torch alone")
    parser.add_argument("--quick", action="store_true", help="one row of each family, eager torch and ours; not saved")
    parser.add_argument(
        "--with",
        dest="contenders",
        metavar="NAMES",
        default="",
        help=f"contenders, by comma: {', '.join(CONTENDERS)}, tuned; by default everybody who is installed",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=defaults.device,
        help="cuda: the rows of GPUs, each of our backends there in a column of its own",
    )
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="of each visit of a row")
    parser.add_argument("--passes", type=int, default=defaults.passes, help="visits of each row")
    parser.add_argument(
        "--extra", type=int, default=defaults.extra, help="more visits where a verdict is open, at most"
    )
    parser.add_argument("--fresh", action="store_true", help="measure the machine's limits even where they are known")
    parser.add_argument("--list", action="store_true", help="name the rows and contenders, measure nothing")
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help=f"where the result goes; default {RESULTS}")
    parser.add_argument("--document", type=Path, nargs="+", metavar="FILE", help="fill these documents from --from")
    parser.add_argument(
        "--from", dest="sources", type=Path, nargs="+", metavar="RESULT", help="result files, instead of measuring"
    )


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    try:
        return _run(arguments)
    except (BadOptions, BadResult, NoLimits) as error:
        sys.stderr.write(f"fastnn bench: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"fastnn bench: cannot write {error.filename}: {error.strerror}\n")
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _list(_options(arguments))
    if "limits" in arguments.what:
        if len(arguments.what) > 1:
            raise BadOptions("limits goes alone: measure the rows by another call")
        return _limits(arguments)
    if arguments.document or arguments.sources:
        return _from_file(arguments)
    if not arguments.json:
        _console()
    options = _options(arguments)
    path = _path(arguments)
    with _status(arguments.json) as status:
        result = run_benchmark(options, path, status.update)
    _show(result, arguments.json)
    if path is not None:
        sys.stderr.write(f"{'kept in' if result.complete else 'what was measured is kept in'} {path}\n")
    if not result.complete:
        return 130  # as a shell says it of an interrupted program
    return 1 if any(row.verdict is Verdict.WRONG for row in result.rows()) else 0


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        families=tuple(dict.fromkeys(name.replace("-", "_") for name in arguments.what)),
        only=arguments.only,
        sweep=arguments.sweep,
        contenders=tuple(filter(None, re.split(r"[,\s]+", arguments.contenders))),
        device=arguments.device,
        threads=arguments.threads,
        rounds=arguments.rounds,
        passes=arguments.passes,
        extra=arguments.extra,
        quick=arguments.quick,
        fresh=arguments.fresh,
    )


def _path(arguments: argparse.Namespace) -> Path | None:
    if arguments.quick and arguments.results is None:
        return None
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    what = "-".join(dict.fromkeys(arguments.what)) or "all"
    kind = "-sweep" if arguments.sweep else ""
    folder: Path = arguments.results or RESULTS
    where = f"{arguments.threads}t" if arguments.device == "cpu" else arguments.device
    return folder / f"{stamp}-{what}{kind}-{where}.json"


def _console(stderr: bool = False) -> Any:
    if find_spec("rich") is None:
        raise MissingExtra("tables need rich: pip install 'fastnn[cli]' (or --json)")
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = max(console.width, 190)  # nothing wraps in a file
    return console


class _Silent:
    """Progress for nobody."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, text: str) -> None:
        """Says nothing."""


def _status(silent: bool) -> Any:
    if silent or not sys.stderr.isatty():
        return _Silent()
    return _console(stderr=True).status("")


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result.to_json(), ensure_ascii=False) + "\n")
    else:
        _console().print(gpu_rows_table(result) if on_gpu(result) else rows_table(result))


def _from_file(arguments: argparse.Namespace) -> int:
    from .results import load

    if not arguments.sources:
        raise BadOptions("--document needs --from RESULT: the numbers come from a result file")
    results = [load(source) for source in arguments.sources]
    for document in arguments.document or ():
        write(document, arguments.sources)
        sys.stderr.write(f"wrote the rows of {', '.join(map(str, arguments.sources))} into {document}\n")
    if not arguments.document:
        for result in results:
            _show(result, arguments.json)
    return 0


def _list(options: Options) -> int:
    named, device = chosen_families(options), options.device
    console = _console()
    for family in named:
        public = [case for case in bench_cases(family, device) if not case.sweep]
        sweep = {case.shape for case in bench_cases(family, device) if case.sweep}
        console.print(f"[bold]{family}[/]: {len(public)} rows, {len(sweep)} shapes in the sweep")
        for case in public:
            console.print(f"  {case.id}", highlight=False)
    console.print("[bold]contenders[/]")
    for name, who in CONTENDERS.items():
        if device in who.devices:
            console.print(f"  {name}: {who.missing() or 'installed'}", highlight=False)
    return 0


def _limits(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda":
        return _gpu_limits(arguments)
    limits = machine_limits(fresh=arguments.fresh)
    if arguments.json:
        sys.stdout.write(json.dumps(limits.to_json(), indent=1) + "\n")
        return 0
    console = _console()
    console.print(f"[bold]{limits.machine}[/], instruction set in force: {limits.isa}", highlight=False)
    for table in limits_table(limits):
        console.print(table)
    console.print(f"kept in {cache_folder()}; --fresh measures again", highlight=False)
    return 0


def _gpu_limits(arguments: argparse.Namespace) -> int:
    why = why_no_gpu()
    if why:
        raise NoLimits(f"no GPU to measure: {why}")
    limits = gpu_limits(fresh=arguments.fresh)
    if arguments.json:
        sys.stdout.write(json.dumps(limits.to_json(), indent=1) + "\n")
        return 0
    console = _console()
    console.print(gpu_limits_table(limits))
    console.print(f"kept in {cache_folder()}; --fresh measures again", highlight=False)
    return 0
