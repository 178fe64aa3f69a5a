"""A progress bar for what takes long, where it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .cli import MissingExtra

Step = Callable[[str], None]
"""Does a step of a part of that name."""


@contextmanager
def progress(shown: bool) -> Iterator[Callable[[int], Step]]:
    """Gives a function that, told how many steps there are, gives one that does a step of a part of that name.

    Raises:
        MissingExtra: a bar is to be shown, and rich is not installed.
    """
    if not shown:
        yield lambda total: lambda name: None
        return
    try:
        rich = importlib.import_module("rich.progress")
    except ImportError as error:
        raise MissingExtra("a progress bar needs rich; install with:  pip install 'fastnn[cli]'") from error
    with rich.Progress(*rich.Progress.get_default_columns(), rich.TimeElapsedColumn()) as shown_bar:

        def begin(total: int) -> Step:
            task = shown_bar.add_task("", total=total)
            return lambda name: shown_bar.update(task, advance=1, description=name)

        yield begin
