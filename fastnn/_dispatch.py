"""Which backend runs a call: one function chooses, one context manager forces, and both can say why (not).

A backend supplies the pair (fwd, bwd) of an op and nothing else; the autograd Function, the wrapper and the reference
are shared by all. `pick` returns the pair, or None for the plain PyTorch reference.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as _forward_ad

from . import _extension

BACKENDS = ("cpu", "reference")
"""Every backend this version knows, in order of preference; `reference` is plain PyTorch."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take. Everything else (float64 above all) goes to the reference."""


class Kernels(NamedTuple):
    """What a backend supplies for one op: the handles of its raw operators."""

    fwd: Callable[..., Any]
    bwd: Callable[..., Any]


KERNELS: dict[str, dict[str, Kernels]] = {}
"""op stem -> backend -> kernels; filled by `register` at import, empty for every op where the extension is missing."""

_functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_forced: str | None = None
_warned_missing = False


def register(op: str, backend: str, kernels: Kernels) -> None:
    """Adds the kernels of `backend` for `op`."""
    KERNELS.setdefault(op, {})[backend] = kernels


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"fastnn: unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `backend` cannot run `op` on tensors of this device and dtype, in words; empty where it can."""
    _check_name(backend)
    if backend == "reference":
        return ""
    if backend not in KERNELS.get(op, {}):
        return _extension.missing or f"{op} has no {backend} kernel"
    if device.type != backend:
        return f"the tensors are on {device}"
    if dtype not in KERNEL_DTYPES:
        return f"dtype {dtype} (its kernels take float32, bfloat16, float16)"
    return ""


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active: those go to the reference (any order is right)."""
    return _functorch_active() or _forward_ad._current_level >= 0


def pick(op: str, x: torch.Tensor) -> str:
    """The backend for a call of `op` whose main tensor is `x`: a key of `KERNELS[op]`, or "reference".

    Raises NotImplementedError where a backend was forced and cannot run the call.
    """
    backend = _forced
    if backend is None:
        if x.is_cpu and x.dtype in KERNEL_DTYPES and "cpu" in KERNELS.get(op, ()) and not transformed():
            return "cpu"
        if _extension.missing:
            _warn_missing()
        return "reference"
    if backend == "reference":
        return backend
    reason = why_not(op, backend, x.device, x.dtype)
    if not reason and transformed():
        reason = "a functorch transform or forward-mode AD is active, and only the reference follows those"
    if reason:
        raise NotImplementedError(f"fastnn.{op}: backend {backend!r} was asked for and cannot run this call: {reason}")
    return backend


def refuse_if_forced(op: str, reason: str) -> None:
    """For calls that go to the reference whatever their main tensor: raises where another backend was forced."""
    if _forced not in (None, "reference"):
        raise NotImplementedError(f"fastnn.{op}: backend {_forced!r} was asked for and cannot run this call: {reason}")


def _warn_missing() -> None:
    global _warned_missing
    if not _warned_missing and not torch.compiler.is_compiling():
        _warned_missing = True
        warnings.warn(f"fastnn runs on plain PyTorch only: {_extension.missing}", RuntimeWarning, stacklevel=4)


def backend_in_force() -> str | None:
    """The forced backend's name, or None when each call chooses for itself."""
    return _forced


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces every fastnn op inside the block onto `backend` ("cpu", "reference"); None lets each call choose.

    A call that the forced backend cannot run raises NotImplementedError saying why: nothing falls back in silence.
    Under torch.compile the choice is a constant of the traced graph, guarded. `FASTNN_BACKEND` sets it for a process.
    Not thread-local: it holds for all threads.
    """
    global _forced
    if backend is not None:
        _check_name(backend)
    before = _forced
    _forced = backend
    try:
        yield
    finally:
        _forced = before


_from_environment = os.environ.get("FASTNN_BACKEND", "")
if _from_environment:
    _check_name(_from_environment)
    _forced = _from_environment
