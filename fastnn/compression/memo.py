"""What a search has measured so far, in one file, so that the same call goes on after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..quant.container import replace

VERSION = 1
Found = TypeVar("Found")


class Memo:
    """Answers by name. A search is a function of what it measured, so that one with the same answers goes the same way.

    Args:
        path: the file; None keeps nothing.
        fingerprint: of all that the answers depend on.

    Raises:
        ValueError: the file is of another model, calibration or options, or it is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint
        self._answers: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            kept = json.loads(path.read_text("utf-8"))
            version, mark, answers = kept["version"], kept["fingerprint"], kept["answers"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"fastnn.compress: {path} is no state of a search ({type(error).__name__})") from None
        if version != VERSION or mark != fingerprint or not isinstance(answers, dict):
            raise ValueError(
                f"fastnn.compress: {path} is of another model, calibration or options: give resume= another file, or "
                "delete this one"
            )
        self._answers = answers

    def __contains__(self, name: str) -> bool:
        return name in self._answers

    def get(self, name: str, find: Callable[[], Found]) -> Found:
        """The answer that is known, or the one found now, which is written to the disk at once."""
        if name not in self._answers:
            self._answers[name] = find()
            self._write()
        return self._answers[name]

    def _write(self) -> None:
        if self._path is not None:
            kept = {"version": VERSION, "fingerprint": self._fingerprint, "answers": self._answers}
            replace(self._path, [json.dumps(kept, indent=0).encode()])
