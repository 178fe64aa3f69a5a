"""Numbers in documents: written from a result file, and checked against it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from . import gpu_tables
from .files import write_atomically
from .results import BadResult, Result, Row, load
from .tables import markdown, summary

Named = tuple[str, Result]
"""A result and the name of its file."""

_SOURCE = re.compile(r"<!-- from (\S+) -->")


def _last(results: Sequence[Named]) -> list[list[Row]]:
    """The rows of each result that none after it has measured again."""
    found: list[list[Row]] = []
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for _, result in reversed(results):
        rows = result.rows()
        found.append([row for row in rows if (row.name, row.shape) not in seen])
        seen.update((row.name, row.shape) for row in rows)
    return found[::-1]


def _rows(results: Sequence[Named]) -> str:
    return "\n\n".join(
        f"<!-- from {name} -->\n" + (gpu_tables.markdown(one) if gpu_tables.on_gpu(one) else markdown(one, rows))
        for (name, one), rows in zip(results, _last(results), strict=True)
    )


def _summary(results: Sequence[Named]) -> str:
    sources = "".join(f"<!-- from {name} -->\n" for name, _ in results)
    return sources + summary([row for rows in _last(results) for row in rows])


_BLOCKS: dict[str, Callable[[Sequence[Named]], str]] = {"rows": _rows, "summary": _summary}
"""What may stand between `<!-- NAME:begin -->` and `<!-- NAME:end -->`: every row, or a line for each family."""


def markers(kind: str) -> tuple[str, str]:
    """The lines before and after a block."""
    return f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->"


def _pattern(kind: str) -> re.Pattern[str]:
    begin, end = map(re.escape, markers(kind))
    return re.compile(rf"({begin}\n).*?(\n{end})", re.DOTALL)


def write(document: Path, sources: Sequence[Path]) -> None:
    """Fills the blocks of `document` from the result files `sources`; of a row that several have, the last counts.

    Raises:
        BadResult: one of `sources` is no complete result, or `document` has no block.
        OSError: `document` cannot be read or written.
    """
    results = [(source.name, load(source)) for source in sources]
    for source, (_, result) in zip(sources, results, strict=True):
        if not result.complete:
            raise BadResult(f"{source}: the run is not complete: {result.stopped or 'it was stopped'}")
    text = document.read_text("utf-8")
    if not any(_pattern(kind).search(text) for kind in _BLOCKS):
        lines = " or ".join(" followed by ".join(markers(kind)) for kind in _BLOCKS)
        raise BadResult(f"{document}: no line {lines}")
    for kind, block in _BLOCKS.items():
        text = _pattern(kind).sub(lambda m, block=block: m[1] + block(results) + m[2], text)  # type: ignore[misc]
    write_atomically(document, text)


def problem_with(document: Path, results: Path) -> str:
    """Why a document's numbers are not those of the files they name, in the folder `results`; empty if they are."""
    whole = document.read_text("utf-8")
    for kind, block in _BLOCKS.items():
        found = _pattern(kind).search(whole)
        text = "" if found is None else found[0][len(found[1]) : -len(found[2])]
        sources = _SOURCE.findall(text)
        if not sources and "|" in text:
            return f"{document.name}: numbers that name no result file"
        try:
            expected = block([(source, load(results / source)) for source in sources]) if sources else text
        except BadResult as error:
            return f"{document.name}: {error}"
        if text != expected:
            return f"{document.name}: differs from what {' and '.join(sources)} gives"
    return ""
