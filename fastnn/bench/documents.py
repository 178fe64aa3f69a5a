"""Numbers in documents: written from a result file, and checked against it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import gpu_tables
from .files import write_atomically
from .results import BadResult, Result, load
from .tables import markdown

BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"

_BLOCK = re.compile(rf"({re.escape(BEGIN)}\n).*?(\n{re.escape(END)})", re.DOTALL)
_SOURCE = re.compile(r"<!-- from (\S+) -->")


def block(results: Sequence[tuple[str, Result]]) -> str:
    """What stands between the markers for results by the names of their files."""
    return "\n\n".join(f"<!-- from {name} -->\n{_markdown(result)}" for name, result in results)


def _markdown(result: Result) -> str:
    return gpu_tables.markdown(result) if gpu_tables.on_gpu(result) else markdown(result)


def write(document: Path, sources: Sequence[Path]) -> None:
    """Puts the rows of the result files `sources` between the markers of `document`.

    Raises:
        BadResult: one of `sources` is no complete result, or `document` has no markers.
        OSError: `document` cannot be read or written.
    """
    results = [(source.name, load(source)) for source in sources]
    for source, (_, result) in zip(sources, results, strict=True):
        if not result.complete:
            raise BadResult(f"{source}: the run is not complete: {result.stopped or 'it was stopped'}")
    text = document.read_text("utf-8")
    if not _BLOCK.search(text):
        raise BadResult(f"{document}: no line {BEGIN} followed by one {END}")
    write_atomically(document, _BLOCK.sub(lambda m: m[1] + block(results) + m[2], text))


def problem_with(document: Path, results: Path) -> str:
    """Why a document's numbers are not those of the files they name, in the folder `results`; empty if they are."""
    found = _BLOCK.search(document.read_text("utf-8"))
    if found is None:
        return ""
    text = found[0][len(found[1]) : -len(found[2])]
    sources = _SOURCE.findall(text)
    if not sources:
        return "" if "|" not in text else f"{document.name}: numbers that name no result file"
    try:
        expected = block([(source, load(results / source)) for source in sources])
    except BadResult as error:
        return f"{document.name}: {error}"
    return "" if text == expected else f"{document.name}: differs from what {' and '.join(sources)} gives"
