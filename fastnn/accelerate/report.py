"""What `fastnn.accelerate` did, layer by layer, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from .purity import ABSENT
from .table import Column, Parts, Printed, pattern


@dataclass(frozen=True)
class Entry:
    """One layer of the model: what became of it, or why nothing did."""

    name: str
    """Its path in the model; empty for the model itself."""
    was: str
    """Its class before."""
    became: str | None
    """What runs in its place; None where it was left alone."""
    kernel: str
    """The kernel of its forward, as `fastnn.record` names it; empty where it was left alone."""
    reason: str
    """Why it was left alone, or where it is fused."""
    verified: bool | None
    """Whether outputs (and gradients, of a training model) agreed; None where it was not checked or left alone."""
    activation: str | None = None
    """The activation that a linear layer applies in the same kernel."""


@dataclass(eq=False)
class Patch:
    """One change of one module: another class for the instance, a few attributes beside."""

    module: Module
    kind: type[Module]
    attributes: dict[str, Any]
    freeze: bool = False
    """Whether a linear layer is frozen as well."""
    _before: tuple[type[Module], dict[str, Any]] | None = None

    def apply(self) -> None:
        """Changes the module; parameters, hooks and everything else stay the same objects."""
        state = vars(self.module)
        touched = [*self.attributes, "packed"] if self.freeze else self.attributes
        self._before = type(self.module), {name: state.get(name, ABSENT) for name in touched}
        state.update(self.attributes)
        self.module.__class__ = self.kind
        if self.freeze:
            self.module.freeze()  # type: ignore[operator]

    def undo(self) -> bool:
        """Takes the change back; False where somebody has changed the module's class since, and it is left alone."""
        if self._before is None:
            return True
        if type(self.module) is not self.kind:
            return False
        self.module.__class__, attributes = self._before
        state = vars(self.module)
        for name, value in attributes.items():
            state.pop(name, None)
            if value is not ABSENT:
                state[name] = value
        self._before = None
        return True


@dataclass(frozen=True)
class _Group:
    """Entries that differ by the numbers in their names alone."""

    name: str
    entry: Entry
    count: int

    @property
    def layer(self) -> str:
        return self.name + (f"  x{self.count}" if self.count > 1 else "")

    def general(self, text: str) -> str:
        return pattern(text) if self.count > 1 else text


_DONE = (
    Column("layer", lambda g: g.layer, style="cyan", wraps=True),
    Column("runs as", lambda g: g.general(g.entry.became)),
    Column("kernel", lambda g: g.entry.kernel, style="green"),
)
_SKIPPED = (
    Column("layer", lambda g: g.layer, style="cyan", wraps=True),
    Column("class", lambda g: g.entry.was),
    Column("left alone because", lambda g: g.general(g.entry.reason), style="yellow", wraps=True),
)
_NOT_FUSED = (
    Column("linear layers", lambda row: str(row[1]), "right"),
    Column("not fused because", lambda row: row[0], wraps=True),
)


@dataclass
class Report(Printed):
    """What was done to a model. `restore()`, or leaving a `with` block, takes all of it back.

    Printing it, plainly or by rich, gives a table; layers that differ by a number in their names share a line.
    """

    _verb = "accelerate"

    entries: tuple[Entry, ...]
    """Every linear, softmax, norm and activation layer of the model, in the model's order."""
    verification: str
    """What was checked, or 'unverified' and why."""
    verified: bool
    """Whether outputs before and after were compared and agree."""
    max_difference: float | None
    """The largest difference between an output before and after; None where nothing was compared."""
    restored: bool = False
    """Whether the model is as it was before."""
    _patches: list[Patch] = field(default_factory=list, repr=False)

    @property
    def accelerated(self) -> tuple[Entry, ...]:
        """The layers that run on fastnn now."""
        return tuple(entry for entry in self.entries if entry.became)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """The layers that were left alone, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.became)

    @property
    def fused(self) -> int:
        """How many linear layers run with their activation in one kernel."""
        return sum(entry.activation is not None for entry in self.entries)

    @property
    def packed_bytes(self) -> int:
        """Memory that packed copies of frozen weights hold at present."""
        held = {id(p): p for patch in self._patches if (p := vars(patch.module).get("packed")) is not None}
        return sum(packed.nbytes for packed in held.values())

    def restore(self) -> None:
        """Gives every layer its class, forward and attributes back. Once is enough; twice does no harm.

        A layer whose class somebody else has changed meanwhile (a parametrization, say) is left as it is.
        """
        for patch in reversed(self._patches):
            patch.undo()
        self.restored = True

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    @property
    def summary(self) -> str:
        """One line: how much was done, whether it was checked, and what it costs."""
        done = f"{len(self.accelerated)} of {len(self.entries)} layers accelerated, {self.fused} with their activation"
        parts = [done if self._patches else "nothing new to accelerate"]
        if self.packed_bytes:
            parts.append(f"{self.packed_bytes / 2**20:.1f} MiB of packed weights")
        return "; ".join([*parts, self.verification, *(["restored"] if self.restored else [])])

    def _parts(self) -> Parts:
        unfused = Counter(pattern(e.reason) for e in self.accelerated if e.was == "Linear" and not e.activation)
        return (
            ("Accelerated", _DONE, _group(self.accelerated)),
            ("Accelerated, but not fused with an activation", _NOT_FUSED, unfused.most_common()),
            ("Left alone", _SKIPPED, _group(self.skipped)),
        )


def _group(entries: Iterable[Entry]) -> list[_Group]:
    """Entries by the pattern of their names, where everything else is the same too."""
    found: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        key = (pattern(entry.name), entry.was, pattern(entry.became or ""), entry.kernel, pattern(entry.reason))
        found.setdefault((*key, entry.verified), []).append(entry)
    return [
        _Group((key[0] if len(members) > 1 else members[0].name) or "(the model)", members[0], len(members))
        for key, members in found.items()
    ]
