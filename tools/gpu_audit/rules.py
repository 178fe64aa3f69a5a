"""What every kernel must keep: the rules, as a list, and who breaks them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cubins import Found
from occupancy import occupancy

MATRIX = re.compile(r"^(gemm_kernel|attention_(fwd|dkv|dq)\w*kernel)$|matmul\.|attention\.")
"""Kernels whose products belong on the tensor cores; plain float32 products (`gemm_f32_kernel`) do not."""

FLOAT32 = re.compile(r"f32|float32|fp32|\bfloat\b")
"""In a name or variant: a kernel of float32 operands."""

SMALL = re.compile(r"reduce|sum|combine|delta|finish|partial|parts|slope|columns|total|params|seed|each|meet|weights")
"""Kernels that move little beside the ones they follow, or walk along a strided dimension: no rule on their width."""


@dataclass(frozen=True)
class Rule:
    """One promise; `broken` says how it is broken, in words, or nothing."""

    name: str
    broken: Callable[[Found], str]


def _spills(found: Found) -> str:
    count = found.kernel.counts["spill"]
    return f"{count} loads and stores of local memory, {found.kernel.stack} bytes of stack" if count else ""


def _launches(found: Found) -> str:
    if found.name == "gemm_kernel" and "Large" in found.variant and found.kernel.arch in (86, 89, 120):
        return ""  # never chosen there (tests/cuda_emu/test_linear.py, test_policy)
    fits = occupancy(found.kernel.arch, found.threads, found.kernel.registers, found.shared)
    return "" if fits.blocks else f"cannot be launched: {fits.limiter}"


def _tensor(found: Found) -> str:
    if not MATRIX.search(found.name) or FLOAT32.search(found.name) or FLOAT32.search(found.variant):
        return ""
    if SMALL.search(found.name):
        return ""
    return "" if found.kernel.counts["tensor"] else "no tensor-core instruction in a matrix kernel"


def _wide(found: Found) -> str:
    moves = sum(found.kernel.counts[kind] for kind in ("global load", "global store", "async copy"))
    if SMALL.search(found.name) or not moves:
        return ""
    return "" if found.kernel.has_wide else "no global access of 128 bits"


def _bounds(found: Found) -> str:
    return "" if found.language != "CUDA" or found.kernel.max_threads else "no __launch_bounds__"


RULES: Sequence[Rule] = (
    Rule("no spills", _spills),
    Rule("can be launched", _launches),
    Rule("tensor cores in matrix kernels", _tensor),
    Rule("a path of 128-bit accesses", _wide),
    Rule("launch bounds", _bounds),
)


def broken(found: Sequence[Found]) -> list[str]:
    """Every broken rule, in words."""
    return [
        f"sm_{one.kernel.arch} {one.language} {one.name}<{one.variant}>: {rule.name}: {how}"
        for one in found
        for rule in RULES
        if (how := rule.broken(one))
    ]
