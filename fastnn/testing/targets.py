"""Where a case can run: the reference, and each instruction set of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .. import _extension
from .._dispatch import use_backend
from .cases import DTYPES, REFERENCE_DTYPES


@dataclass(frozen=True)
class Target:
    """A backend and, for the CPU kernels, the instruction set."""

    backend: str
    isa: str = ""

    def __str__(self) -> str:
        return self.isa or self.backend

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes that are tested here."""
        return tuple(REFERENCE_DTYPES if self.backend == "reference" else DTYPES)

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Makes every fastnn call inside the block run here, or raise."""
        if not self.isa:
            with use_backend(self.backend):
                yield
            return
        extension = _extension.require()
        before = extension.isa()
        extension.set_isa(self.isa)
        try:
            with use_backend(self.backend):
                yield
        finally:
            extension.set_isa(before)


REFERENCE = Target("reference")
"""Plain PyTorch."""


def targets() -> tuple[Target, ...]:
    """The reference and each instruction set that is compiled in and that this CPU has, in rising order."""
    if _extension._C is None:
        return (REFERENCE,)
    return (REFERENCE, *(Target("cpu", isa) for isa in _extension._C.isa_supported()))


def best() -> Target:
    """The target a call chooses by itself."""
    return targets()[-1]


def unavailable() -> dict[Target, str]:
    """The targets that were compiled in and cannot run here, with the reason."""
    if _extension._C is None:
        return {Target("cpu"): _extension.missing}
    supported = _extension._C.isa_supported()
    missing = [isa for isa in _extension._C.isa_compiled() if isa not in supported]
    return {Target("cpu", isa): f"this CPU lacks {isa}" for isa in missing}
