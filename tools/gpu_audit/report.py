"""The audit as a document: kernels, and the bounds of the benchmark's rows on GPUs that were not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from amd import Note, note_lines
from cubins import Found
from occupancy import ARCHS, Occupancy, occupancy

from fastnn.testing.bench_cases import Work, bench_cases, families


@dataclass(frozen=True)
class Gpu:
    """Datasheet rates: bytes, and operations per unit; dense, products accumulated in float32."""

    name: str
    memory: float
    rates: dict[str, float]

    def seconds(self, work: Work) -> tuple[float, str]:
        """The least time, and what bounds it."""
        moving, computing = work.bytes / self.memory, work.operations / self.rates[work.unit]
        return (computing, "compute") if computing > moving else (moving, "memory")


GPUS = (
    Gpu("A100 80GB", 2.039e12, {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12}),
    Gpu("H100 SXM", 3.35e12, {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12}),
    Gpu("RTX 4090", 1.008e12, {"fp32": 82.6e12, "bf16": 165e12, "fp16": 165e12}),
    Gpu("B200", 8.0e12, {"fp32": 75e12, "bf16": 2250e12, "fp16": 2250e12}),
)


def groups(found: Sequence[Found]) -> dict[tuple[str, str], list[Found]]:
    """(language, name) -> its variants on every architecture."""
    made: dict[tuple[str, str], list[Found]] = {}
    for one in sorted(found, key=lambda one: (one.language, one.name, one.kernel.arch, one.variant)):
        made.setdefault((one.language, one.name), []).append(one)
    return made


def _span(values: Sequence[float], digits: int = 0) -> str:
    low, high = min(values), max(values)
    return f"{low:.{digits}f}" if low == high else f"{low:.{digits}f}-{high:.{digits}f}"


def _fits(one: Found) -> Occupancy:
    return occupancy(one.kernel.arch, one.threads, one.kernel.registers, one.shared)


def _occupancy(here: Sequence[Found]) -> str:
    if not here:
        return ""
    least, most = (pick(map(_fits, here), key=lambda fits: fits.share) for pick in (min, max))
    if least.share == most.share:
        return f"{100 * least.share:.0f} % ({least.limiter})"
    return f"{100 * least.share:.0f} % ({least.limiter}) - {100 * most.share:.0f} %"


def _tensor(members: Sequence[Found]) -> str:
    names = sorted({name for one in members for name in one.kernel.tensor})
    return ", ".join(names) or "-"


def kernel_lines(found: Sequence[Found], archs: Sequence[int]) -> Iterator[str]:
    """One line of the table for each kernel."""
    heads = ["kernel", "variants", "threads", "registers", "spills", "shared, KiB", "128-bit", "tensor cores"]
    heads += [f"occupancy sm_{arch}" for arch in archs]
    yield "| " + " | ".join(heads) + " |"
    yield "| --- |" + " ---: |" * 6 + " --- |" * (1 + len(archs))
    for (language, name), members in groups(found).items():
        wide = [one.kernel.wide_share for one in members if one.kernel.wide_share is not None]
        paths = sum(one.kernel.has_wide for one in members)
        cells = [
            f"{name} ({language})",
            str(len({one.variant for one in members})),
            _span([one.threads for one in members]),
            _span([one.kernel.registers for one in members]),
            str(sum(one.kernel.counts["spill"] for one in members)),
            _span([one.shared / 1024 for one in members], 1),
            f"{_span([100 * share for share in wide])} %" if paths else "-",
            _tensor(members),
            *(_occupancy([one for one in members if one.kernel.arch == arch]) for arch in archs),
        ]
        yield "| " + " | ".join(cells) + " |"


def bound_lines() -> Iterator[str]:
    """One line of the table for each row of the GPU benchmark."""
    yield "| row | shape | MB | GFLOP | " + " | ".join(gpu.name for gpu in GPUS) + " |"
    yield "| --- | --- | ---: | ---: |" + " ---: |" * len(GPUS)
    for family in families():
        for case in bench_cases(family, "cuda"):
            cells = [case.row, "x".join(map(str, case.shape))]
            cells += [f"{case.work.bytes / 1e6:.0f}", f"{case.work.operations / 1e9:.3g}"]
            for gpu in GPUS:
                seconds, by = gpu.seconds(case.work)
                cells.append(f"{_three(seconds * 1e6)} us, {by}")
            yield "| " + " | ".join(cells) + " |"


def _three(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


RULES_TEXT = (
    "Rules: no spills; a block fits the multiprocessor; tensor-core instructions in matrix kernels of half precision;",
    "a path of 128-bit accesses in kernels that stream rows or tiles; launch bounds.",
)
KERNELS_TEXT = (
    "Ranges are over a kernel's variants (types, tile sizes, row lengths) and architectures. Occupancy is that of",
    "NVIDIA's calculator, with what limits it. 128-bit: of the bytes that instructions in loops (of matrix kernels: in",
    "the loops of their products) move from and to global memory, the share that moves 16 bytes at a time; a path for",
    "tails and unaligned rows counts as much as the one for the rest. What aligned rows take is counted where the CUDA",
    "kernels run on the emulator (tests/test_cuda_emu.py, tests/cuda_emu): at least 95 % of the bytes that row kernels",
    "move and matrix kernels load come 16 at a time, or the suite fails.",
)
BOUNDS_TEXT = (
    "The least time of each row of `python -m fastnn bench --device cuda` by the datasheets: its unavoidable bytes at",
    "the memory's bandwidth or its operations at the peak of its type, whichever takes longer. Bounds, no",
    "measurements.",
)


AMD_TEXT = (
    "What Triton's compiler says of its code for AMD GPUs: vector registers of a lane, of 512, registers spilled,",
    "local data share (LDS), of 64 KiB, and how many variants have a global access of 128 bits, and MFMA.",
)


def document(found: Sequence[Found], broken: Sequence[str], notes: Sequence[Note] = ()) -> str:
    """The whole page."""
    archs = [arch for arch in ARCHS if any(one.kernel.arch == arch for one in found)]
    total = len(found) + len(notes)
    names = [*(f"sm_{arch}" for arch in archs), *sorted({note.arch for note in notes})]
    lines = [
        "# Audit of the GPU kernels",
        "",
        "Made by `python tools/gpu_audit` from the machine code, without a GPU; do not edit. Nothing here is a timing.",
        "",
        f"{total} kernels and variants, for {', '.join(names)}: "
        + (f"{len(broken)} broken rules." if broken else "no rule is broken."),
        "",
        *RULES_TEXT,
        "",
        *[f"- {one}" for one in broken],
        *([""] if broken else []),
        "## Kernels",
        "",
        *KERNELS_TEXT,
        "",
        *kernel_lines(found, archs),
        "",
        *(["## AMD", "", *AMD_TEXT, "", *note_lines(notes), ""] if notes else []),
        "## Bounds",
        "",
        *BOUNDS_TEXT,
        "",
        *bound_lines(),
    ]
    return "\n".join(lines) + "\n"
