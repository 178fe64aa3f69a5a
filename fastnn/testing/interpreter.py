"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), which runs the GPU kernels on CPU tensors.

It keeps bfloat16 as bit patterns: products and sums of them would be of the patterns, and rounding to them truncates.
It reads and writes out of bounds without a word. `repair` makes bfloat16 products right, rounds to nearest even,
raises on any other arithmetic on bfloat16 (kernels widen first), and raises IndexError where an active lane's address
is in none of the tensors that the launch was given.
"""

from __future__ import annotations

from typing import Any

_repaired = False


def repair() -> None:
    """Repairs the interpreter of this process, once. ImportError where there is no Triton."""
    global _repaired
    if _repaired:
        return
    from triton.runtime import interpreter

    _repair_bfloat16(interpreter)
    _check_bounds(interpreter)
    _repaired = True


def _repair_bfloat16(interpreter: Any) -> None:
    import numpy as np
    import triton.language as tl

    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float

    def convert_float(x: Any, source: Any, to: Any, rounding: Any) -> Any:
        if (source, to) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x).view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded)
        if (source, to) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
        return convert(x, source, to, rounding)

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, c, *rest)
        wide = [convert_float(t.data, tl.bfloat16, tl.float32, None).view(np.float32) for t in (a, b)]
        return interpreter.TensorHandle(np.matmul(*wide) + c.data, c.dtype.scalar)

    arithmetic = builder.binary_op

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise TypeError(f"arithmetic on bfloat16 in the interpreter ({op.__name__}): widen with .to(tl.float32)")
        return arithmetic(self, a, b, op)

    interpreter._convert_float = convert_float
    builder.create_dot, builder.binary_op = create_dot, binary_op


def _check_bounds(interpreter: Any) -> None:
    import numpy as np

    builder = interpreter.InterpreterBuilder
    ranges: list[tuple[int, int]] = []  # of the tensors of the launch that runs

    def check(pointers: Any, mask: Any, what: str) -> None:
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        inside = np.zeros(addresses.shape, bool)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for begin, end in ranges:
            inside |= (addresses >= begin) & (addresses + max(size, 1) <= end)
        if not inside.all():
            raise IndexError(f"{what}: {int((~inside).sum())} of {inside.size} active lanes are out of bounds")

    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest, **named)

    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [getattr(t, "base", t) for t in (*args, *kwargs.values())]  # of a tensor descriptor, its tensor
        ranges[:] = [_extent(t) for t in given if hasattr(t, "data_ptr")]
        with np.errstate(all="ignore"):  # infinities and NaN are inputs like others
            return launch(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    interpreter.GridExecutor.__call__ = call


def _extent(t: Any) -> tuple[int, int]:
    """First address and that after the last element."""
    elements = t.numel() and 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + elements * t.element_size()
