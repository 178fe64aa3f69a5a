"""Tables, as plain text and for rich, from one list of columns."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Column:
    """One column of a table of things of one kind."""

    title: str
    text: Callable[[Any], str]
    justify: Literal["left", "right"] = "left"
    style: str = ""
    wraps: bool = False
    """Whether its cells may take several lines; the others are never broken."""


Parts = Iterable[tuple[str, Sequence[Column], Sequence[Any]]]
"""Title, columns and rows of tables."""


class Printed:
    """What prints as tables and a summary below them, as plain text and for rich."""

    _verb: ClassVar[str]
    """What made it, `quantize_`: stands before the summary in plain text."""

    @property
    def summary(self) -> str:
        """What is below the tables."""
        raise NotImplementedError

    def _parts(self) -> Parts:
        """The tables; those without rows are left out."""
        raise NotImplementedError

    def _tables(self, make: Callable[..., Any]) -> list[Any]:
        return [make(title, columns, rows) for title, columns, rows in self._parts() if rows]

    def __str__(self) -> str:
        return "\n\n".join([*self._tables(plain), f"fastnn.{self._verb}: {self.summary}"])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(*self._tables(rich_table), Text(self.summary, style="bold"))


def size_text(nbytes: int | None) -> str:
    """Bytes, for a cell."""
    if nbytes is None:
        return "unknown"
    return f"{nbytes / 2**20:.2f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"


def ms_text(ms: float | None) -> str:
    """Milliseconds, for a cell; empty where nothing was measured."""
    return "" if ms is None else f"{ms:.3g}"


def pattern(name: str) -> str:
    """A module's name without the numbers in it: `encoder.layer.3.dense` as `encoder.layer.*.dense`."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def shortened(name: str, width: int) -> str:
    """A dotted name without as many of its first parts as it takes to fit."""
    parts = name.split(".")
    while len(name) > width and len(parts) > 1:
        parts = parts[1:]
        name = "…" + ".".join(parts)
    return name


def plain(title: str, columns: Sequence[Column], rows: Sequence[Any], footer: str = "") -> str:
    """The table as text, no wider than the terminal where the wrapping columns allow it."""
    columns = _used(columns, rows)
    cells = [[column.text(row) for column in columns] for row in rows]
    widths = [max([len(c.title), *(len(line[i]) for line in cells)]) for i, c in enumerate(columns)]
    excess = sum(widths) + 2 * (len(widths) - 1) - shutil.get_terminal_size((100, 24)).columns
    for i, column in enumerate(columns):
        if column.wraps and excess > 0:
            shrunk = max(24, widths[i] - excess)
            excess -= widths[i] - shrunk
            widths[i] = min(widths[i], shrunk)
    lines = [title, _line([c.title for c in columns], widths, columns), "  ".join("-" * width for width in widths)]
    for row in cells:
        parts = [textwrap.wrap(text, width) or [""] for text, width in zip(row, widths, strict=True)]
        height = max(map(len, parts))
        lines += [_line([p[i] if i < len(p) else "" for p in parts], widths, columns) for i in range(height)]
    return "\n".join([*lines, footer] if footer else lines)


def _line(cells: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> str:
    padded = [
        text.rjust(width) if column.justify == "right" else text.ljust(width)
        for text, width, column in zip(cells, widths, columns, strict=True)
    ]
    return "  ".join(padded).rstrip()


def rich_table(title: str, columns: Sequence[Column], rows: Sequence[Any], footer: str = "") -> Any:
    """The table for rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # As tight as can be: tables have to fit 80 columns.
    table = Table(
        title=title,
        caption=footer or None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.title_justify = table.caption_justify = "left"
    table.title_style, table.caption_style = "bold", "dim"
    used = _used(columns, rows)
    for column in used:
        table.add_column(
            column.title,
            justify=column.justify,
            style=column.style,
            no_wrap=not column.wraps,
            min_width=14 if column.wraps else None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in used))
    return table


def _used(columns: Sequence[Column], rows: Sequence[Any]) -> list[Column]:
    """The columns that say something for some row."""
    return [column for column in columns if any(column.text(row) for row in rows)] or list(columns)
