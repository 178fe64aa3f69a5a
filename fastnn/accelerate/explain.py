"""Where a model's time goes, and which fastnn kernel would run each part of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import _extension
from .isolate import call, check_model, isolated, plain_inputs, tensors
from .survey import FASTNN, Finding, survey
from .table import Column, pattern, plain, rich_table, shortened

if TYPE_CHECKING:
    from ..bench.gpu_limits import GpuLimits
    from ..bench.limits import Limits

_RUNS = 3
_SHOWN = 14
_NEGLIGIBLE = 0.001


@dataclass(frozen=True)
class Part:
    """One module's share of a forward: the time in its own code, without the modules it calls."""

    name: str
    """Its path in the model; empty for the model itself."""
    kind: str
    """Its class."""
    calls: int
    ms: float
    """Per run of the model, all calls together."""
    share: float
    """Of the model's time, 0 to 1."""
    kernel: str
    """The fastnn kernel that would run it, with the activation fused into it; empty where there is none."""
    backend: str
    """Where the kernel would run."""
    isa: str
    """The instruction set it would run on; empty for the reference."""
    why_not: str
    """Why no kernel would run it; empty where one would."""
    limit_ms: float | None = None
    """The least that this machine could take for it; None where its work is not counted or the limits are not known."""
    note: str = ""
    """What slows the kernel down; empty where nothing does."""

    @property
    def limit_share(self) -> float | None:
        """How much of this machine's limit it reaches as it is, 0 to 1."""
        return None if self.limit_ms is None or not self.ms else self.limit_ms / self.ms


@dataclass(frozen=True)
class _Line:
    """Parts whose names differ by numbers alone, as one line of the table."""

    part: Part
    name: str
    calls: int
    ms: float
    share: float
    limit_ms: float | None


def _outcome(line: _Line) -> str:
    part = line.part
    return f"{part.kernel}{part.note and f' ({part.note})'}" if part.kernel else f"- {part.why_not}"


def _limit(line: _Line) -> str:
    return "" if line.limit_ms is None or not line.ms else f"{100 * line.limit_ms / line.ms:.0f} %"


COLUMNS: tuple[Column, ...] = (
    Column("module", lambda line: shortened(line.name, 36), style="cyan", wraps=True),
    Column("class", lambda line: line.part.kind),
    Column("ms", lambda line: f"{line.ms:.2f}", "right"),
    Column("time", lambda line: f"{100 * line.share:.1f} %", "right", "bold"),
    Column("of limit", _limit, "right"),
    Column("fastnn", _outcome, wraps=True),
)
"""The table's columns: each turns a line into text."""


@dataclass(frozen=True)
class Explanation:
    """The parts of a model's forward, the longest first. Printing it, plainly or by rich, gives a table."""

    parts: tuple[Part, ...]
    ms: float
    """One run of the model."""

    @property
    def covered(self) -> float:
        """The share of the time, 0 to 1, for which there is a fastnn kernel."""
        return sum(part.share for part in self.parts if part.kernel)

    @property
    def summary(self) -> str:
        """One line: how long a run takes and how much of it fastnn has kernels for."""
        where = sorted({f"{part.backend} {part.isa}".strip() for part in self.parts if part.kernel})
        on = f" ({', '.join(where)})" if where else ""
        return f"{self.ms:.1f} ms a run; fastnn has kernels for {100 * self.covered:.0f} % of the time{on}"

    def lines(self) -> list[_Line]:
        """The parts by the pattern of their names, the longest first."""
        groups: dict[tuple[str, ...], list[Part]] = {}
        for part in self.parts:
            groups.setdefault((pattern(part.name), part.kind, part.kernel, part.why_not, part.note), []).append(part)
        lines = [
            _Line(
                parts[0],
                (f"{key[0]}  x{len(parts)}" if len(parts) > 1 else parts[0].name) or "(the model)",
                sum(part.calls for part in parts),
                sum(part.ms for part in parts),
                sum(part.share for part in parts),
                None if any(part.limit_ms is None for part in parts) else sum(part.limit_ms or 0.0 for part in parts),
            )
            for key, parts in groups.items()
        ]
        return sorted(lines, key=lambda line: -line.ms)

    def _shown(self) -> tuple[list[_Line], str]:
        lines = self.lines()
        shown = [line for line in lines[:_SHOWN] if line.share >= _NEGLIGIBLE] or lines[:1]
        rest = lines[len(shown) :]
        known = any(line.limit_ms is not None for line in shown)
        note = "of limit: how much of this machine's limit (`python -m fastnn bench limits`) it reaches now.\n"
        more = f"{len(rest)} more lines, {100 * sum(line.share for line in rest):.1f} % of the time.\n" if rest else ""
        return shown, more + (note if known else "") + self.summary

    def __str__(self) -> str:
        shown, footer = self._shown()
        return plain("fastnn.explain", COLUMNS, shown, footer)

    def __rich__(self) -> Any:
        shown, footer = self._shown()
        return rich_table("fastnn.explain", COLUMNS, shown, footer)


def explain(model: Module, example_inputs: Any) -> Explanation:
    """Times each module's own part of a forward, and says which fastnn kernel would run it, or why none.

    The model is run a few times as it is, in its present mode and without a backward, and left as it was: parameters,
    buffers, `.grad`, hooks, random state. Activations are shown where they would be fused. The first call on a machine
    takes three seconds more: it measures the limits that the parts are held against.

    Args:
        model: any module; one that is not accelerated yet.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has lazy parameters that have no shape yet.
    """
    check_model("explain", model)
    inputs = plain_inputs(example_inputs)
    device = next((t.device.type for t in (*model.parameters(), *tensors(inputs))), "cpu")
    clock = _Clock(device)
    with isolated(model), torch.set_grad_enabled(model.training and torch.is_grad_enabled()):
        call(model, inputs)
        with clock.watching(model):
            for _ in range(_RUNS):
                with isolated(model):
                    call(model, inputs)
    findings = {finding.module: finding for finding in survey(model).findings}
    limits = _limits(device)
    total = clock.total or 1.0
    parts = []
    for name, module in model.named_modules():
        if module in clock.own:
            seconds, calls = clock.own[module]
            kernel, backend, why_not = _outlook(module, findings.get(module))
            isa = _extension._C.isa() if backend == "cpu" and _extension._C is not None else ""
            ms = 1e3 * seconds / _RUNS
            kind = type(module).__name__
            least = clock.least_ms(module, limits)
            note = _note(module, kernel, backend, module in clock.strided)
            share = seconds / total
            parts.append(Part(name, kind, calls // _RUNS, ms, share, kernel, backend, isa, why_not, least, note))
    return Explanation(tuple(sorted(parts, key=lambda part: -part.ms)), 1e3 * total / _RUNS)


def _limits(device: str) -> Limits | GpuLimits | None:
    # Not at the top: `import fastnn` has no use for the benchmarks.
    if device == "cuda":
        from ..bench.gpu_limits import gpu_limits

        return gpu_limits()
    from ..bench.limits import hasty_limits

    return hasty_limits(torch.get_num_threads())


def _outlook(module: Module, found: Finding | None) -> tuple[str, str, str]:
    """(kernel, backend, why not)."""
    if found is None:
        if next(module.children(), None) is not None:
            return "", "", "its own code"
        return "", "", "no kernel yet"
    if found.feeder is not None:
        return f"fused into {found.partner}", found.feeder.backend, ""
    if not found.backend or (found.patch is None and type(module) not in FASTNN):
        return "", "", found.reason
    kernel = "reference" if found.backend == "reference" else f"{found.op}_fwd"
    return kernel + (f" + {found.activation or 'sum'}" if found.fusion else ""), found.backend, ""


_BY_ELEMENTS = "its operands are read one element at a time: no 16-byte copies of their rows"
_COPIED = "its operands are first copied to rows that begin at 16 bytes, or read one element at a time in small tiles"
_PADDED = "its heads are first copied to rows of a multiple of 16 features"


def _note(module: Module, kernel: str, backend: str, strided: bool) -> str:
    """What a GPU's kernel does with operands that do not lie as it wants them."""
    if kernel.startswith("linear") and strided:
        return {"cuda": _BY_ELEMENTS, "triton": _COPIED}.get(backend, "")
    features = getattr(module, "head_dim", None)
    padded = kernel.startswith("attention") and backend == "triton" and isinstance(features, int) and features % 16
    return _PADDED if padded else ""


def copied_by_16_bytes(t: Tensor) -> bool:
    """Whether the CUDA kernels can copy rows of an operand of half precision by 16 bytes; csrc/cuda/linear.cu, lies."""
    strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
    steps = [stride for stride in strides if stride != 1]
    return t.data_ptr() % 16 == 0 and (len(steps) < len(strides) or not strides) and all(s % 8 == 0 for s in steps)


_Like = tuple[torch.Size, torch.dtype]


def _like(t: Tensor) -> _Like:
    return t.shape, t.dtype


class _Clock:
    """Own time and calls of each module, from hooks; on a GPU what was queued before is waited for."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.own: dict[Module, tuple[float, int]] = {}
        self.total = 0.0
        self.strided: set[Module] = set()
        """Modules on a GPU with an operand of half precision that is not copied by 16 bytes."""
        self._seen: dict[Module, list[tuple[_Like, _Like] | None]] = {}
        """Input and result of each call, by shape and type; None where they are no tensors."""
        self._open: list[list[float]] = []
        """Start of each call under way, and what the calls inside it took."""

    @contextmanager
    def watching(self, model: Module) -> Iterator[None]:
        """Hooks every module for the time of the block."""
        with ExitStack() as hooks:
            for module in model.modules():
                hooks.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
                hooks.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _enter(self, module: Module, args: Any) -> None:
        self._open.append([self._now(), 0.0])

    def _leave(self, module: Module, args: Any, output: Any) -> None:
        start, inside = self._open.pop()
        took = self._now() - start
        seconds, calls = self.own.get(module, (0.0, 0))
        self.own[module] = seconds + took - inside, calls + 1
        given = args[0] if isinstance(args, tuple) and args else None
        seen = (_like(given), _like(output)) if isinstance(given, Tensor) and isinstance(output, Tensor) else None
        self._seen.setdefault(module, []).append(seen)
        operands = [t for t in (given, getattr(module, "weight", None)) if isinstance(t, Tensor)]
        if self._device == "cuda" and any(t.itemsize == 2 and not copied_by_16_bytes(t) for t in operands):
            self.strided.add(module)
        if self._open:
            self._open[-1][1] += took
        else:
            self.total += took

    def least_ms(self, module: Module, limits: Limits | GpuLimits | None) -> float | None:
        """The least that a run's calls of the module could take; None where that is not known."""
        if limits is None:
            return None
        from ..bench.modules import work_of_call

        least = 0.0
        for seen in self._seen[module]:
            tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in seen or ()]
            work = work_of_call(module, *tensors) if seen else None
            if work is None:
                return None
            least += limits.bound(work, torch.get_num_threads()).seconds
        return 1e3 * least / _RUNS
