"""Where a case can run: the reference, each instruction set of the CPU kernels, each backend for GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import _dispatch, _extension
from .._dispatch import use_backend
from .cases import DTYPES, REFERENCE_DTYPES, Case, op_names


@dataclass(frozen=True)
class Target:
    """A backend, for the CPU kernels the instruction set, and where the tensors are."""

    backend: str
    isa: str = ""
    device: str = "cpu"
    """One of `fastnn.testing.devices.DEVICES`."""

    def __str__(self) -> str:
        if self.device not in ("cpu", self.backend):
            return f"{self.backend}-{self.device}"
        return self.isa or self.backend

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes that are tested here."""
        return tuple(REFERENCE_DTYPES if self.backend == "reference" else DTYPES)

    def takes(self, case: Case) -> bool:
        """Whether a case can run here: the op has a kernel; packed weights are a format of the CPU's."""
        stem = case.forward_kernel.removesuffix("_fwd")
        op = stem if stem in _dispatch.KERNELS else case.op  # a form of the op with kernels of its own
        if self.backend not in ("cpu", "reference") and _dispatch.why_no_kernel(op, self.backend):
            return False
        return self.device == "cpu" or case.forward_kernel == f"{case.op}_fwd"

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


INTERPRETED = Target("triton")
"""The Triton kernels on CPU tensors, in a process with TRITON_INTERPRET=1 (`fastnn.testing.interpreter`)."""


GPU_BACKENDS = ("cuda", "triton")
"""The backends whose kernels run on GPUs."""


def targets(device: str = "cpu") -> tuple[Target, ...]:
    """What can run on `device`, the reference first.

    On the CPU each instruction set that is compiled in and that this CPU has, in rising order; on `cuda` each backend
    that has kernels for GPUs; nothing where there is no GPU.
    """
    if device == "cuda":
        return _gpu_targets()
    if _extension._C is None:
        return (REFERENCE,)
    return (REFERENCE, *(Target("cpu", isa) for isa in _extension._C.isa_supported()))


def _gpu_targets() -> tuple[Target, ...]:
    if not torch.cuda.is_available():
        return ()
    found = [backend for backend in GPU_BACKENDS if not why_no_op(backend)]
    return (Target("reference", device="cuda"), *(Target(backend, device="cuda") for backend in found))


def why_no_op(backend: str) -> str:
    """Why no op has kernels of `backend` in this installation; empty where one has."""
    reasons = [_dispatch.why_no_kernel(op, backend) for op in op_names()]
    return "" if "" in reasons else reasons[0]


def best() -> Target:
    """The target a call on CPU tensors chooses by itself."""
    return targets()[-1]


def unavailable(device: str = "cpu") -> dict[Target, str]:
    """The targets that were compiled in, or that this version knows for GPUs, and cannot run here, with the reason."""
    if device == "cuda":
        return _unavailable_on_gpus()
    if _extension._C is None:
        return {Target("cpu"): _extension.missing}
    supported = _extension._C.isa_supported()
    missing = [isa for isa in _extension._C.isa_compiled() if isa not in supported]
    return {Target("cpu", isa): f"this CPU lacks {isa}" for isa in missing}


def _unavailable_on_gpus() -> dict[Target, str]:
    if not torch.cuda.is_available():
        return {Target(backend, device="cuda"): "torch sees no GPU" for backend in GPU_BACKENDS}
    here = {target.backend for target in _gpu_targets()}
    return {Target(backend, device="cuda"): why_no_op(backend) for backend in GPU_BACKENDS if backend not in here}
