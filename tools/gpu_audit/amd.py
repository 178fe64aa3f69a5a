"""AMD's part of the audit: what Triton's compiler made for AMD GPUs, as `tools/triton_aot.py --out` noted it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rules import MATRIX, SMALL

SHARED = 65536
"""Bytes of local data share that a workgroup may have, on gfx90a and gfx942."""


@dataclass(frozen=True)
class Note:
    """A kernel in one configuration."""

    kernel: str
    config: str
    arch: str
    """gfx942 and the like."""
    warps: int
    """Of 64 lanes."""
    registers: int
    """Vector registers of a lane, accumulation registers included."""
    spills: int
    shared: int
    mfma: bool
    """Whether it has matrix instructions."""
    wide: bool
    """Whether it has a global access of 128 bits."""
    half: bool
    """Whether its operands are of half precision."""


def notes(paths: Sequence[Path]) -> list[Note]:
    """Every AMD kernel below the paths."""
    files = sorted(file for path in paths for file in path.glob("*.gfx*.json"))
    read = [json.loads(file.read_text("utf-8")) for file in files]
    return [Note(**{name: one[name] for name in Note.__dataclass_fields__}) for one in read]


def broken_notes(found: Sequence[Note]) -> list[str]:
    """Every broken rule, in words."""
    return [f"{one.arch} Triton {one.kernel}<{one.config}>: {how}" for one in found for how in _broken(one)]


def _broken(one: Note) -> Iterator[str]:
    if one.spills:
        yield f"no spills: {one.spills} registers"
    if one.shared > SHARED:
        yield f"can be launched: {one.shared} bytes of local data share"
    if SMALL.search(one.kernel):
        return
    if MATRIX.search(one.kernel) and one.half and not one.mfma:
        yield "matrix instructions in matrix kernels"
    if not one.wide:
        yield "a path of 128-bit accesses"


def note_lines(found: Sequence[Note]) -> Iterator[str]:
    """One line of the table for each kernel."""
    yield "| kernel | variants | lanes | vector registers | spills | LDS, KiB | with 128-bit accesses | MFMA |"
    yield "| --- |" + " ---: |" * 6 + " --- |"
    for name in sorted({one.kernel for one in found}):
        here = [one for one in found if one.kernel == name]
        cells = [
            name,
            str(len(here)),
            _span([64 * one.warps for one in here]),
            _span([one.registers for one in here]),
            str(sum(one.spills for one in here)),
            _span([one.shared // 1024 for one in here]),
            f"{sum(one.wide for one in here)} of {len(here)}",
            f"{count} of {len(here)}" if (count := sum(one.mfma for one in here)) else "-",
        ]
        yield "| " + " | ".join(cells) + " |"


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"
