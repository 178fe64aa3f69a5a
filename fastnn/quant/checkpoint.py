"""What calibration has decided of a model's parts so far, in one file each, so that it can go on after a stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from .container import bytes_of, read, write

VERSION = 1


def digest(*parts: Any) -> str:
    """SHA-256 of what is given: tensors by their type, shape and bytes, all else as JSON."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(parts):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(bytes_of(leaf))
        else:
            found.update(json.dumps(leaf, default=repr).encode())
    return found.hexdigest()


class Folder:
    """A folder with one file for each part that is finished.

    A part's file has the digest of what it depends on: the configuration, the samples, and the weights of its own and
    of all parts before.
    """

    def __init__(self, path: Path, start: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path, self._digest = path, start

    def enter(self, index: int, root: Module) -> None:
        """Goes on to a part."""
        self._file = self._path / f"part-{index:04}.safetensors"
        held = [[name, t.detach()] for name, t in (*root.named_parameters(), *root.named_buffers())]
        self._digest = digest(self._digest, held)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was stored of the part; None where nothing was.

        Raises:
            ValueError: the file is of another run, or (FormatError) damaged.
        """
        if not self._file.exists():
            return None
        tensors, kept = read(self._file)
        if kept.get("version") != VERSION or kept.get("digest") != self._digest:
            raise ValueError(
                f"fastnn.quantize_: {self._file} is of another model, configuration or calibration: choose another "
                "folder, or empty this one"
            )
        return tensors, kept["decided"]

    def store(self, tensors: Mapping[str, Tensor], decided: Mapping[str, Any]) -> None:
        """Writes the part's file, whole or not at all."""
        write(self._file, tensors, {"version": VERSION, "digest": self._digest, "decided": dict(decided)})
