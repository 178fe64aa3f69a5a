"""Which backend runs a call: one function chooses, one context manager forces, and both can say why (not).

A backend supplies the pair (fwd, bwd) of an op and nothing else; the autograd Function, the wrapper and the reference
are shared by all. `pick` names the backend of a call, "reference" for plain PyTorch.

CPU tensors run on the C++ kernels, CUDA tensors on the CUDA kernels or on Triton, whichever is faster and there.
Triton is imported by the first call that could run on it, never with the package.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as _forward_ad

from . import _extension

BACKENDS = ("cpu", "cuda", "triton", "reference")
"""Every backend this version knows; `reference` is plain PyTorch."""

GPU_PREFERENCE = {
    # Their CUDA kernels have been run on the emulator and not yet on a GPU.
    "softmax": ("triton", "cuda"),
    "cross_entropy": ("triton", "cuda"),
    "norm": ("triton", "cuda"),
    "activation": ("triton", "cuda"),
    # No compiler runs at the first call of a shape, and a launch takes 10 us where Triton's takes 50 and more.
    "linear": ("cuda", "triton"),
    "attention": ("cuda", "triton"),
}
"""op stem -> the order in which backends are asked for a CUDA tensor; on AMD GPUs only Triton runs."""

TRITON_FROM = {"linear": 1 << 23, "attention": 1 << 22}
"""op stem -> elements of the main tensor from which Triton comes first on Hopper and Blackwell datacenter GPUs.

Its products use wgmma or tcgen05 there, CUDA's mma.sync. On an H100, bf16: linear of 4096 x 4096 x 4096 runs at 622
TFLOP/s against 446, of 8192 x 8192 x 8192 at 763 against 478; attention of (4, 16, 4096, 128) forward and backward in
5.8 ms against 7.8. Below, launching costs more than that gains.
"""

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


def register_raw(op: str) -> None:
    """Adds the kernels of `op` that the extension has: `cpu`, and `cuda` where it was built with CUDA."""
    library = torch.ops.fastnn
    kernels = Kernels(getattr(library, f"{op}_fwd").default, getattr(library, f"{op}_bwd").default)
    register(op, "cpu", kernels)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{op}_fwd", "CUDA"):
        register(op, "cuda", kernels)  # one operator, two dispatch keys


_triton_missing: str | None = None
_triton_interprets = False


def _load_triton() -> str:
    """Imports the Triton kernels, which register themselves, once; why there are none, in words, or ""."""
    global _triton_missing, _triton_interprets
    if _triton_missing is None:
        try:
            kernels = importlib.import_module("fastnn.kernels")
            _triton_missing, _triton_interprets = "", kernels.INTERPRETED
        except ImportError as error:
            _triton_missing = f"the Triton kernels could not be imported ({error}); `pip install triton` adds them"
    return _triton_missing


# torch.compile must not trace an import. (torch.compiler.assume_constant_result does this, and imports dynamo.)
_load_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"fastnn: unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def why_no_kernel(op: str, backend: str) -> str:
    """Why `op` has no kernel of `backend` in this installation, in words, or "". May import Triton."""
    if backend == "triton" and (reason := _load_triton()):
        return reason
    if backend in KERNELS.get(op, {}):
        return ""
    if backend == "cuda" and not _extension.missing:
        return "this build of fastnn._C has no CUDA kernels (FASTNN_CUDA=ON builds them)"
    return (_extension.missing if backend != "triton" else "") or f"{op} has no {backend} kernel"


def _runs_on(backend: str, device: str) -> bool:
    if backend == "triton":
        return device == "cuda" or (device == "cpu" and _triton_interprets)
    return device == backend


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `backend` cannot run `op` on tensors of this device and dtype, in words; empty where it can."""
    _check_name(backend)
    if backend == "reference":
        return ""
    if reason := why_no_kernel(op, backend):
        return reason
    if not _runs_on(backend, device.type):
        return f"the tensors are on {device}"
    if dtype not in KERNEL_DTYPES:
        return f"dtype {dtype} (its kernels take float32, bfloat16, float16)"
    return too_old(device.index) if device.type == "cuda" else ""


@functools.cache
def _too_old(index: int | None) -> str:
    if torch.version.hip or not torch.cuda.is_available():  # without a driver there are fake tensors only
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return "" if major >= 8 else f"the GPU's compute capability is {major}.{minor}, the kernels need 8.0"


def too_old(index: int | None) -> str:
    """Why the kernels cannot run on that GPU, in words, or "": they use the instructions of compute capability 8.0."""
    return _too_old(index)


too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        if x.is_cuda and x.dtype in KERNEL_DTYPES and not transformed():
            return _pick_gpu(op, x)
        if _extension.missing and not x.is_cuda:
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


def is_plain(op: str, input: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a layer's call of `op` needs nothing but the CPU kernel, given an input of the layer's type and features.

    One row through a layer takes as long as its weight takes from memory, and so does Python's own code after that went
    through the caches: without the checks that packing or the kernel makes anyway a call takes 12 us in place of 16.
    """
    return (
        not torch.is_grad_enabled()
        and isinstance(input, torch.Tensor)
        and input.layout is torch.strided
        and input.dim() > 0
        and pick(op, input) == "cpu"
        and (bias is None or bias.is_cpu)
        and not torch.is_autocast_enabled("cpu")
    )


def order(op: str, device: str) -> tuple[str, ...]:
    """The backends that are asked for a call of `op` on tensors of that device type, first one first."""
    if device != "cuda":
        return ("cpu",)
    return ("triton",) if torch.version.hip else GPU_PREFERENCE.get(op, ("cuda", "triton"))


@functools.cache
def _has_wide_products(index: int | None) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(index)[0] in (9, 10)


def has_wide_products(index: int | None) -> bool:
    """Whether that GPU has matrix instructions that Triton uses and the CUDA kernels do not: see `TRITON_FROM`."""
    return not torch.version.hip and _has_wide_products(index)


has_wide_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pick_gpu(op: str, x: torch.Tensor) -> str:
    backends = order(op, "cuda")
    if op in TRITON_FROM and x.numel() >= TRITON_FROM[op] and has_wide_products(x.device.index):
        backends = ("triton", "cuda")
    for backend in backends:
        if backend == "triton" and _load_triton():
            continue
        if backend in KERNELS.get(op, ()) and not too_old(x.device.index):
            return backend
    return "reference"


def allows_tf32() -> bool:
    """Whether torch lets float32 products on CUDA be computed in TF32.

    Every way of saying so ends here: `torch.backends.cuda.matmul.fp32_precision` and `allow_tf32`,
    `torch.backends.fp32_precision`, `torch.set_float32_matmul_precision`. (`allow_tf32` raises when it is read after
    `fp32_precision` was set.) CUDA and Triton kernels ask at each call.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


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
    """Forces every fastnn op inside the block onto `backend` (of `BACKENDS`); None lets each call choose.

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
