"""Cases and invalid calls of softmax and log_softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.softmax import log_softmax, log_softmax_reference, softmax, softmax_reference
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]


def _make(
    shape: Sequence[int], kind: Fill, layout: str | Arrange, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    values = fill(shape, dtype, generator, kind)
    return {"input": arrange(values, layout) if isinstance(layout, str) else layout(values)}


def _case(
    name: str,
    layout: str,
    make: Callable[[torch.dtype, torch.Generator], Inputs],
    dim: int,
    log: bool,
    *,
    result: torch.dtype | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    function, reference = (log_softmax, log_softmax_reference) if log else (softmax, softmax_reference)
    return Case(
        op="softmax",
        name=("log_" if log else "") + name,
        layout=layout,
        make=make,
        call=lambda inputs: function(inputs["input"], dim, result),
        reference=lambda inputs: reference(inputs["input"], dim),
        rival=None if result is None else lambda inputs: reference(inputs["input"], dim, result),
        forward_kernel="softmax_fwd",
        backward_kernel="softmax_bwd",
        differentiable=("input",),
        wide=wide,
        bites=bites,
    )


def _both(
    name: str,
    layout: str,
    shape: Sequence[int],
    dim: int = -1,
    *,
    kind: Fill = "normal",
    memory: str | Arrange | None = None,
    result: torch.dtype | None = None,
    wide: bool = False,
) -> Iterator[Case]:
    """The case for softmax and for log_softmax. Of one element, the result is 1 or 0: there is nothing to bite."""
    make = partial(_make, tuple(shape), kind, layout if memory is None else memory)
    length = shape[dim] if shape else 1
    for log in (False, True):
        yield _case(name, layout, make, dim, log, result=result, wide=wide, bites=kind == "normal" and length > 1)


def _large(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A big common offset with small differences: log(sum(exp)) is below the spacing of numbers at that size."""
    top = {torch.float16: 2048.0, torch.bfloat16: 256.0}.get(dtype, 2.0**23)
    spread = torch.randint(0, 6, (6, 40), generator=generator)
    return {"input": (top + spread).to(dtype)}


def _wide_range(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Magnitudes up to 3e4 of both signs, and rows shifted by -3e4: exp overflows unless the maximum is subtracted."""
    values = torch.randn(6, 40, generator=generator)
    values[:2] *= 1e4
    values[2:4] -= 3e4
    values[4:] += 3e4
    return {"input": values.clamp(-6e4, 6e4).to(dtype)}


def _nonfinite(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN, infinities and the lowest finite value at the head, in the body and in the tail; rows of them alone."""
    values = torch.randn(12, 37, generator=generator).double()
    inf, low = float("inf"), torch.finfo(dtype).min
    values[0, 0] = values[1, 20] = values[2, 36] = float("nan")
    values[3, 0] = values[4, 36] = inf
    values[5, :18] = values[6, 30:] = -inf
    values[7], values[8] = -inf, inf
    values[9, :30] = low
    values[10] = low
    values[11, 1], values[11, 2] = inf, -inf
    return {"input": values.to(dtype)}


def _matrix_cases() -> Iterator[Case]:
    yield from _both("rows", "contiguous", (6, 64))
    yield from _both("outliers", "contiguous", (8, 100), kind="outliers")
    yield from _both("columns", "contiguous", (40, 19), 0)
    yield from _both("every_other", "strided", (5, 50))
    yield from _both("every_other_dim0", "strided", (37, 6), 0)
    yield from _both("batch_stride_0", "expanded", (4, 33))
    yield from _both("along_stride_0", "expanded", (3, 34), memory=partial(expanded, dim=1))
    yield from _both("unaligned", "offset", (7, 33))
    yield from _both("unaligned_middle", "offset", (3, 21, 5), 1)
    for shape, dim in (((0, 5), 1), ((5, 0), 1), ((0,), 0), ((3, 0, 4), 1), ((3, 0, 4), 2)):
        yield from _both(f"{'x'.join(map(str, shape))}_dim{dim}", "empty", shape, dim)
    for length in (1, 2, 3, 5, 15, 16, 17, 31, 33):
        yield from _both(f"length_{length}", "tail", (5, length))
    yield from _both("columns_7_inner_19", "tail", (2, 7, 19), 1)
    yield from _both("rows_apart", "padded_rows", (6, 65))
    yield from _both("last", "transposed", (23, 18))
    yield from _both("first", "transposed", (23, 18), 0)
    yield from _both(
        "permuted", "transposed", (4, 18, 9), 1, memory=lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    )
    for dim in (0, 1, 2, -1, -2):
        yield from _both(f"dim_{dim}".replace("-", "m"), "leading_dims", (3, 6, 4, 17), dim)
    yield from _both("vector", "one_row", (1000,), 0)
    yield from _both("one_long_row", "one_row", (1, 4097))
    yield from _both("scalar", "one_row", (), 0)
    for log in (False, True):
        yield _case("offset_2e23", "large_magnitude", _large, -1, log, bites=False)
        yield _case("wide_range", "large_magnitude", _wide_range, 1, log, bites=False)
        yield _case("specials", "nonfinite", _nonfinite, 1, log, bites=False)
        yield _case("specials_dim0", "nonfinite", _nonfinite_columns, 0, log, bites=False)


def _nonfinite_columns(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"input": _nonfinite(dtype, generator)["input"].t().contiguous()}


def _wide_cases() -> Iterator[Case]:
    for length in (4, 7, 8, 9, 64, 100, 255, 1000, 4096, 4097):
        yield from _both(f"wide_{length}", "tail", (3, length), wide=True)
        yield from _both(f"wide_{length}_dim0", "tail", (length, 5), 0, wide=True)
    yield from _both("wide_40000", "one_row", (2, 40000), wide=True)
    yield from _both("wide_70001", "one_row", (1, 70001), wide=True)  # half precision no longer fits its row buffer
    yield from _both("wide_many_rows", "contiguous", (3000, 33), wide=True)
    yield from _both("wide_inner_1000", "contiguous", (3, 20, 1000), 1, wide=True)
    yield from _both("wide_five_dims", "leading_dims", (2, 3, 4, 5, 6), 2, wide=True)
    for dim in (0, 1):
        yield from _both(f"to_float32_dim{dim}", "contiguous", (40, 50), dim, result=torch.float32, wide=True)
        yield from _both(f"to_float32_strided_dim{dim}", "strided", (40, 50), dim, result=torch.float32, wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (3, 4), **options)


def _public(
    name: str, call: Callable[[Callable[..., Tensor]], object], error: type[Exception], *words: str
) -> Iterator[InvalidCall]:
    for function in (softmax, log_softmax):
        label = function.__name__
        yield InvalidCall("softmax", f"{label}-{name}", partial(call, function), error, (f"fastnn.{label}", *words))


def _fwd(*arguments: object) -> object:
    return torch.ops.fastnn.softmax_fwd(*arguments)


def _bwd(*arguments: object) -> object:
    return torch.ops.fastnn.softmax_bwd(*arguments)


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("softmax", name, call, error, words, raw=True)


def _invalid() -> Iterator[InvalidCall]:
    yield from _public("not_a_tensor", lambda f: f([1.0, 2.0], 0), TypeError, "input", "list")
    yield from _public("none", lambda f: f(None, 0), TypeError, "input", "NoneType")
    yield from _public("dim_none", lambda f: f(_x(), None), TypeError, "dim", "NoneType")
    yield from _public("dim_float", lambda f: f(_x(), 1.0), TypeError, "dim", "float")
    yield from _public("dim_bool", lambda f: f(_x(), True), TypeError, "dim", "bool")
    yield from _public("dim_high", lambda f: f(_x(), 2), IndexError, "dim", "2")
    yield from _public("dim_low", lambda f: f(_x(), -3), IndexError, "dim", "-3")
    yield from _public("dim_of_scalar", lambda f: f(torch.ones(()), 1), IndexError, "dim", "1")
    yield from _public("dim_huge", lambda f: f(_x(), 2**62), IndexError, "dim")
    yield from _public("integer", lambda f: f(_x(dtype=torch.int64), 1), TypeError, "input", "int64")
    yield from _public("bool", lambda f: f(_x(dtype=torch.bool), 1), TypeError, "input", "bool")
    yield from _public("complex", lambda f: f(_x(dtype=torch.complex64), 1), TypeError, "input", "complex64")
    yield from _public("dtype_integer", lambda f: f(_x(), 1, torch.int32), TypeError, "dtype", "int32")
    yield from _public("dtype_text", lambda f: f(_x(), 1, "float32"), TypeError, "dtype", "'float32'")
    yield from _public("sparse", lambda f: f(_x().to_sparse(), 1), TypeError, "input", "sparse")
    types, shapes = (TypeError, NotImplementedError), (ValueError,)
    yield _raw("fwd_integer", lambda: _fwd(_x(dtype=torch.int32), 1, False, None, True), types, "softmax", "int32")
    yield _raw("fwd_float64", lambda: _fwd(_x(dtype=torch.float64), 1, False, None, True), types, "softmax", "float64")
    yield _raw("fwd_dim_high", lambda: _fwd(_x(), 2, False, None, True), IndexError, "softmax", "dim", "2")
    yield _raw("fwd_dim_low", lambda: _fwd(_x(), -3, False, None, True), IndexError, "softmax", "dim", "-3")
    yield _raw("fwd_dtype", lambda: _fwd(_x(), 1, False, torch.int64, True), types, "softmax", "dtype")
    yield _raw("fwd_narrowing", lambda: _fwd(_x(), 1, False, torch.float16, True), types, "softmax", "dtype")
    yield _raw("fwd_sparse", lambda: _fwd(_x().to_sparse(), 1, False, None, True), (TypeError, NotImplementedError))
    yield _raw("bwd_shape", lambda: _bwd(_x(3, 3), _x(3, 4), 1, False, torch.float32, True), shapes, "grad", "3")
    yield _raw("bwd_rank", lambda: _bwd(_x(4), _x(3, 4), 1, False, torch.float32, True), shapes, "grad")
    yield _raw("bwd_huge_output", lambda: _bwd(_x(1), _x(4096, 4096), 1, False, torch.float32, True), shapes, "grad")
    yield _raw("bwd_small_output", lambda: _bwd(_x(999, 999), _x(1), 0, False, torch.float32, True), shapes, "grad")
    yield _raw(
        "bwd_dtypes",
        lambda: _bwd(_x(dtype=torch.float16), _x(), 1, False, torch.float32, True),
        types,
        "grad",
        "float16",
    )
    yield _raw(
        "bwd_float64",
        lambda: _bwd(_x(dtype=torch.float64), _x(dtype=torch.float64), 1, False, torch.float64, True),
        types,
        "softmax",
        "float64",
    )
    yield _raw("bwd_input_dtype", lambda: _bwd(_x(), _x(), 1, False, torch.int64, True), types, "input_dtype")
    yield _raw(
        "bwd_input_dtype_mix",
        lambda: _bwd(_x(dtype=torch.float16), _x(dtype=torch.float16), 1, False, torch.bfloat16, True),
        types,
        "input_dtype",
    )
    yield _raw("bwd_dim_high", lambda: _bwd(_x(), _x(), 2, False, torch.float32, True), IndexError, "dim", "2")
    yield _raw("bwd_dim_low", lambda: _bwd(_x(), _x(), -3, False, torch.float32, True), IndexError, "dim", "-3")
    yield _raw(
        "fwd_wants_gradient",
        lambda: _fwd(_x(requires_grad=True), 1, False, None),
        RuntimeError,
        "softmax_fwd",
        "grad",
    )


INVALID: tuple[InvalidCall, ...] = tuple(_invalid())
