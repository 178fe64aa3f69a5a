"""Numbers in documents: written from a result file, and checked against it."""

from __future__ import annotations

import re
from pathlib import Path

from .files import write_atomically
from .results import BadResult, Result, load
from .tables import markdown

BEGIN, END = "<!-- rows:begin -->", "<!-- rows:end -->"

_BLOCK = re.compile(rf"({re.escape(BEGIN)}\n).*?(\n{re.escape(END)})", re.DOTALL)
_SOURCE = re.compile(r"<!-- from (\S+) -->")


def block(result: Result, name: str) -> str:
    """What stands between the markers for a result whose file is called `name`."""
    return f"<!-- from {name} -->\n{markdown(result)}"


def write(document: Path, source: Path) -> None:
    """Puts the rows of the result file `source` between the markers of `document`.

    Raises:
        BadResult: `source` is no complete result, or `document` has no markers.
        OSError: `document` cannot be read or written.
    """
    result = load(source)
    if not result.complete:
        raise BadResult(f"{source}: the run is not complete: {result.stopped or 'it was stopped'}")
    text = document.read_text("utf-8")
    if not _BLOCK.search(text):
        raise BadResult(f"{document}: no line {BEGIN} followed by one {END}")
    write_atomically(document, _BLOCK.sub(lambda m: m[1] + block(result, source.name) + m[2], text))


def problem_with(document: Path, results: Path) -> str:
    """Why the numbers in a document are not those of the file they name, in the folder `results`; empty if they are."""
    found = _BLOCK.search(document.read_text("utf-8"))
    if found is None:
        return ""
    text = found[0][len(found[1]) : -len(found[2])]
    source = _SOURCE.search(text)
    if source is None:
        return "" if "|" not in text else f"{document.name}: numbers that name no result file"
    try:
        expected = block(load(results / source[1]), source[1])
    except BadResult as error:
        return f"{document.name}: {error}"
    return "" if text == expected else f"{document.name}: differs from what {source[1]} gives"
