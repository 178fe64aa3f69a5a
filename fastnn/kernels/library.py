"""How a Triton operator is registered: the schema and shape-only kernel of its C++ twin, checks, device, recording."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from .. import _dispatch
from .._record import note_triton

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether the kernels of this process run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 at import."""

LIBRARY = torch.library.Library("fastnn_triton", "DEF")
"""Holds the operators; alive as long as the package."""

DTYPES = _dispatch.KERNEL_DTYPES


def _device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than the tensor's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def register(op: str, fwd: tuple[str, Callable[..., Any], Any], bwd: tuple[str, Callable[..., Any], Any]) -> None:
    """Defines `<op>_fwd` and `<op>_bwd`, each given as (schema after the name, function, fake), for dispatch.

    The last parameter of a schema is `grad_handled`, as in the C++ operators.
    """
    for direction, (schema, function, fake) in (("fwd", fwd), ("bwd", bwd)):
        _define(f"{op}_{direction}", schema, function, fake)
    ops = torch.ops.fastnn_triton
    kernels = _dispatch.Kernels(getattr(ops, f"{op}_fwd").default, getattr(ops, f"{op}_bwd").default)
    _dispatch.register(op, "triton", kernels)


def _define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.define(f"{name}{schema}")
    count = len(torch._C._get_schema(f"fastnn_triton::{name}", "").arguments)

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        grad_handled = args[-1] if len(args) == count else False
        if not grad_handled and torch.is_grad_enabled():
            raise RuntimeError(
                f"fastnn_triton::{name} is a raw operator without gradients: call the public function of fastnn, or "
                "run it under torch.no_grad()"
            )
        x: Tensor = args[0]
        if x.dtype not in DTYPES:
            raise TypeError(f"fastnn_triton::{name}: {x.dtype} is none of the types that the kernels take")
        note_triton(name)
        with _device(x):
            return function(*(args[:-1] if len(args) == count else args))

    LIBRARY.impl(name, run, "CUDA")
    if INTERPRETED:
        LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"fastnn_triton::{name}", fake, lib=LIBRARY)


def narrow(columns: int, *tensors: Tensor | None) -> bool:
    """Whether Triton reads or writes rows of `columns` neighbours in these tensors one element at a time.

    It knows of multiples of 16 alone: of a mask's edge, a stride (in elements) and an address (in bytes).
    """
    if columns % 16:
        return True
    for t in tensors:
        if t is None:
            continue
        strides = (stride for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
        if t.data_ptr() % 16 or any(stride % 16 for stride in strides):
            return True
    return False


def unit_of(columns: int, t: Tensor) -> int:
    """Elements of 16 bytes where rows of `columns` neighbours in `t` are made of such pieces, else 1.

    A kernel that writes `n // UNIT * UNIT` for a number that UNIT divides tells Triton so, and 1000 classes are read
    16 bytes at a time though 16 does not divide them.
    """
    unit = 16 // t.element_size()
    strides = (stride for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    return 1 if columns % unit or any(stride % unit for stride in strides) else unit


def rows_of(t: Tensor, columns: int) -> Tensor:
    """`t`, not empty, as (rows, columns) with neighbouring columns; copied only where no stride describes the rows."""
    rows = t.reshape(-1, columns)
    return rows if rows.stride(1) == 1 or columns == 1 else rows.contiguous()
