"""Cases and invalid calls of layer_norm, rms_norm and both of a residual sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import norm as ops
from ...ops.norm import NormOptions, norm_reference
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]

layer_norm: Callable[..., Tensor] = ops.layer_norm  # called wrongly too
rms_norm: Callable[..., Tensor] = ops.rms_norm
add_layer_norm: Callable[..., tuple[Tensor, Tensor]] = ops.add_layer_norm
add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = ops.add_rms_norm


@dataclass(frozen=True)
class _Norm:
    """What a case calls and what its tensors look like."""

    lead: tuple[int, ...] = (6,)
    row: tuple[int, ...] = (64,)
    """normalized_shape."""
    rms: bool = False
    add: bool = False
    weight: str = "own"
    """own (the input's type), float32 or none."""
    bias: bool = True
    eps: float | None = 1e-5
    kind: Fill = "normal"
    memory: str | Arrange = "contiguous"
    """Of input and residual."""
    weight_memory: str | Arrange = "contiguous"

    @property
    def options(self) -> NormOptions:
        return NormOptions(len(self.row), self.eps, self.rms)

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        shape = (*self.lead, *self.row)
        found = {"input": _arranged(fill(shape, dtype, generator, self.kind) + 1, self.memory)}
        if self.add:
            found["residual"] = _arranged(fill(shape, dtype, generator, self.kind), self.memory)
        half = dtype in (torch.bfloat16, torch.float16)
        own = torch.float32 if half and self.weight == "float32" else dtype
        if self.weight != "none":
            found["weight"] = _arranged(fill(self.row, own, generator), self.weight_memory)
        if self.bias and not self.rms:
            found["bias"] = _arranged(fill(self.row, own, generator), self.weight_memory)
        return found

    def call(self, inputs: Inputs) -> Tensor:
        """The result; of a residual sum, the sum after it."""
        x, weight, bias = inputs["input"], inputs.get("weight"), inputs.get("bias")
        if self.add:
            residual = inputs["residual"]
            if self.rms:
                return torch.stack(add_rms_norm(x, residual, weight, self.eps))
            return torch.stack(add_layer_norm(x, residual, weight, bias, self.eps))
        if self.rms:
            return rms_norm(x, self.row, weight, self.eps)
        return layer_norm(x, self.row, weight, bias, self.eps)

    def reference(self, inputs: Inputs) -> Tensor:
        """The same in plain PyTorch."""
        x = inputs["input"] + inputs["residual"] if self.add else inputs["input"]
        found = norm_reference(x, inputs.get("weight"), inputs.get("bias"), self.options)
        return torch.stack((found, x)) if self.add else found


def _arranged(t: Tensor, memory: str | Arrange) -> Tensor:
    return arrange(t, memory) if isinstance(memory, str) else memory(t)


def _case(
    name: str,
    layout: str,
    norm: _Norm,
    *,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    wanted = [("input", True), ("residual", norm.add), ("weight", norm.weight != "none")]
    wanted.append(("bias", norm.bias and not norm.rms))
    return Case(
        op="norm",
        name=("add_" if norm.add else "") + ("rms_" if norm.rms else "layer_") + name,
        layout=layout,
        make=make or norm.make,
        call=norm.call,
        reference=norm.reference,
        forward_kernel="norm_fwd",
        backward_kernel="norm_bwd",
        differentiable=tuple(name for name, is_there in wanted if is_there),
        wide=wide,
        bites=bites,
    )


def _each(name: str, layout: str, norm: _Norm, *, adds: bool = True, **options: Any) -> Iterator[Case]:
    """The case for layer norm and RMS norm, alone and of a residual sum."""
    for add in (False, True) if adds else (False,):
        for rms in (False, True):
            yield _case(name, layout, replace(norm, rms=rms, add=add), **options)


def _far_from_zero(norm: _Norm, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A big common offset with small differences: a plain sum of squares loses the variance. The first element of a
    row, among those about which the moments are taken, is an outlier in two of them."""
    top = {torch.float16: 1024.0, torch.bfloat16: 128.0}.get(dtype, 1e4)
    inputs = norm.make(dtype, generator)
    values = top + torch.randint(0, 8, inputs["input"].shape, generator=generator)
    values[2:4, 0] = -top
    return {**inputs, "input": values.to(dtype)}


def _huge(norm: _Norm, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Values whose squares overflow float32 (1e30), or the type's largest: torch's own result is NaN or 0 there."""
    inputs = norm.make(dtype, generator)
    return {**inputs, "input": (inputs["input"].double() * (1e4 if dtype == torch.float16 else 1e30)).to(dtype)}


def _constant(norm: _Norm, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Every row one number, none of them exact in binary."""
    inputs = norm.make(dtype, generator)
    rows = torch.linspace(-30.1, 70.3, inputs["input"].shape[0], dtype=torch.float64)
    return {**inputs, "input": rows[:, None].expand(inputs["input"].shape).to(dtype)}


def _nonfinite(norm: _Norm, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN and infinities at the head, in the body and in the tail of some rows; the others must not notice."""
    inputs = norm.make(dtype, generator)
    x, nan, inf = inputs["input"], float("nan"), float("inf")
    x[0, 0], x[1, 20], x[2, 36] = nan, nan, nan
    x[3, 0], x[4, 36], x[5, 3] = inf, -inf, inf
    x[5, 4] = -inf
    return inputs


def _matrix_cases() -> Iterator[Case]:
    yield from _each("rows", "contiguous", _Norm())
    yield from _each("outliers", "contiguous", _Norm((8,), (100,), kind="outliers"))
    yield from _each("float32_weight", "contiguous", _Norm((7,), (33,), weight="float32"))
    yield from _each("plain", "contiguous", _Norm((7,), (33,), weight="none", bias=False))
    yield _case("bias_only", "contiguous", _Norm((7,), (33,), weight="none"))
    yield _case("no_bias", "contiguous", _Norm((7,), (33,), bias=False))
    yield _case("default_eps", "contiguous", _Norm((7,), (33,), rms=True, eps=None))
    yield from _each("every_other", "strided", _Norm((5,), (50,), memory="strided", weight_memory="strided"))
    yield from _each("rows_stride_0", "expanded", _Norm((4,), (33,), memory="expanded", weight_memory="expanded"))
    yield from _each("columns_stride_0", "expanded", _Norm((4,), (34,), memory=partial(expanded, dim=1)))
    yield from _each("unaligned", "offset", _Norm((7,), (33,), memory="offset", weight_memory="offset"))
    for lead, row in (((0,), (5,)), ((5,), (0,)), ((), (0,)), ((3, 0), (4,))):
        yield from _each("x".join(map(str, (*lead, *row))), "empty", _Norm(lead, row))
    # Of one element: layer norm gives the bias, RMS norm the sign, so that its epsilon must be felt.
    yield _case("length_1", "tail", _Norm((5,), (1,)), bites=False)
    yield _case("length_1", "tail", _Norm((5,), (1,), rms=True, eps=0.5))
    for length in (2, 3, 5, 15, 16, 17, 31, 33, 65):
        yield from _each(f"length_{length}", "tail", _Norm((5,), (length,), eps=0.1))
    yield from _each("rows_apart", "padded_rows", _Norm((6,), (65,), memory="padded_rows"))
    yield from _each("transposed", "transposed", _Norm((23,), (18,), memory="transposed"))
    yield from _each("three_dims", "leading_dims", _Norm((3, 4), (17,)))
    yield from _each("two_normalized", "leading_dims", _Norm((5,), (4, 9)), adds=False)
    yield from _each(
        "two_transposed",
        "leading_dims",
        _Norm((5, 2), (6, 7), memory="transposed", weight_memory="transposed"),
        adds=False,
    )
    yield from _each("all_normalized", "one_row", _Norm((), (3, 5, 7)), adds=False)
    yield from _each("vector", "one_row", _Norm((), (1000,)))
    yield from _each("one_long_row", "one_row", _Norm((1,), (4097,)))
    for rms in (False, True):
        norm = _Norm((6,), (40,), rms=rms)
        for summed in (norm, replace(norm, add=True)):
            yield _case("far_from_zero", "large_magnitude", summed, make=partial(_far_from_zero, summed))
        yield _case("huge", "large_magnitude", norm, make=partial(_huge, norm), bites=False)
        yield _case("constant", "large_magnitude", norm, make=partial(_constant, norm))
        norm = _Norm((9,), (37,), rms=rms)
        for summed in (norm, replace(norm, add=True)):
            yield _case("specials", "nonfinite", summed, make=partial(_nonfinite, summed), bites=False)


def _wide_cases() -> Iterator[Case]:
    for length in (4, 7, 8, 9, 63, 64, 255, 384, 768, 1000, 1024, 4096, 4097):
        yield from _each(f"wide_{length}", "tail", _Norm((3,), (length,)), wide=True)
    yield from _each("wide_128k", "one_row", _Norm((2,), (131072,)), wide=True)
    yield from _each(
        "wide_many_rows", "contiguous", _Norm((3001,), (33,)), wide=True
    )  # chunks of 256 rows and 185 more
    yield from _each("wide_chunks", "contiguous", _Norm((130,), (3072,), weight="float32"), wide=True)  # of 64 rows
    yield from _each("wide_rows_apart", "padded_rows", _Norm((70,), (97,), memory="padded_rows"), wide=True)
    yield from _each("wide_four_dims", "leading_dims", _Norm((2, 3, 4), (5, 6)), adds=False, wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (3, 4), **options)


def _public(name: str, function: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("norm", f"{function}-{name}", call, error, (f"fastnn.{function}", *words))


def _norm_calls() -> Iterator[InvalidCall]:
    """What layer_norm and rms_norm refuse alike."""
    x, w = _x(), _x(4)
    calls: Sequence[tuple[str, Callable[[Callable[..., Tensor]], object], Any, tuple[str, ...]]] = (
        ("input_list", lambda f: f([1.0], (1,)), TypeError, ("input", "list")),
        ("input_integer", lambda f: f(x.int(), (4,)), TypeError, ("input", "int32")),
        ("input_complex", lambda f: f(x.to(torch.complex64), (4,)), TypeError, ("input", "complex64")),
        ("input_sparse", lambda f: f(x.to_sparse(), (4,)), TypeError, ("input", "sparse")),
        ("input_scalar", lambda f: f(torch.ones(()), (1,)), ValueError, ("normalized_shape", "(1,)", "()")),
        ("shape_int", lambda f: f(x, 4), TypeError, ("normalized_shape", "int")),
        ("shape_none", lambda f: f(x, None), TypeError, ("normalized_shape", "NoneType")),
        ("shape_empty", lambda f: f(x, ()), ValueError, ("normalized_shape", "()")),
        ("shape_other", lambda f: f(x, (3,)), ValueError, ("normalized_shape", "(3,)", "(3, 4)")),
        ("shape_long", lambda f: f(x, (2, 3, 4)), ValueError, ("normalized_shape", "(2, 3, 4)", "(3, 4)")),
        ("shape_text", lambda f: f(x, ("4",)), ValueError, ("normalized_shape",)),
        ("weight_list", lambda f: f(x, (4,), [1.0] * 4), TypeError, ("weight", "list")),
        ("weight_length", lambda f: f(x, (4,), _x(3)), ValueError, ("weight", "(4,)", "(3,)")),
        ("weight_2d", lambda f: f(x, (3, 4), w), ValueError, ("weight", "(3, 4)", "(4,)")),
        ("weight_integer", lambda f: f(x, (4,), w.int()), TypeError, ("weight", "int32")),
        ("weight_device", lambda f: f(x, (4,), w.to("meta")), ValueError, ("weight", "meta", "cpu")),
        ("weight_sparse", lambda f: f(x, (4,), w.to_sparse()), TypeError, ("weight", "sparse")),
        ("eps_text", lambda f: f(x, (4,), w, eps="1e-5"), TypeError, ("eps", "str")),
        ("eps_bool", lambda f: f(x, (4,), w, eps=True), TypeError, ("eps", "bool")),
    )
    for function in (layer_norm, rms_norm):
        for name, call, error, words in calls:
            yield _public(name, function.__name__, partial(call, function), error, *words)


def _public_calls() -> Iterator[InvalidCall]:
    yield from _norm_calls()
    x, w = _x(), _x(4)
    half, double = torch.float16, torch.float64
    name = "layer_norm"
    yield _public("bias_list", name, lambda: layer_norm(x, (4,), w, [0.0] * 4), TypeError, "bias", "list")
    yield _public("bias_length", name, lambda: layer_norm(x, (4,), w, _x(1)), ValueError, "bias", "(4,)", "(1,)")
    yield _public("bias_device", name, lambda: layer_norm(x, (4,), w, w.to("meta")), ValueError, "bias", "meta")
    yield _public("weight_half", name, lambda: layer_norm(x, (4,), w.to(half)), TypeError, "weight", "float16")
    yield _public("bias_double", name, lambda: layer_norm(x, (4,), None, w.to(double)), TypeError, "bias", "float64")
    yield _public(
        "bias_differs",
        name,
        lambda: layer_norm(x.to(half), (4,), w.to(half), w),
        TypeError,
        "bias",
        "float16",
        "float32",
    )
    yield _public("eps_none", name, lambda: layer_norm(x, (4,), eps=None), TypeError, "eps", "NoneType")
    for function in (add_layer_norm, add_rms_norm):
        name = function.__name__
        yield _public("input_none", name, partial(function, None, x), TypeError, "input", "NoneType")
        yield _public("residual_none", name, partial(function, x, None), TypeError, "residual", "NoneType")
        yield _public(
            "residual_shape", name, partial(function, x, _x(1, 4)), ValueError, "residual", "(3, 4)", "(1, 4)"
        )
        yield _public("residual_integer", name, partial(function, x, x.int()), TypeError, "residual", "int32")
        yield _public("residual_device", name, partial(function, x, x.to("meta")), ValueError, "residual", "meta")
        yield _public("scalar", name, partial(function, torch.ones(()), torch.ones(())), ValueError, "()")
        yield _public("weight_shape", name, partial(function, x, x, _x(3)), ValueError, "weight", "(4,)", "(3,)")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("norm", name, call, error, ("norm", *words), raw=True)


def _fwd(**given: Any) -> object:
    right = {"input": _x(), "residual": None, "weight": _x(4), "bias": _x(4), "dims": 1, "eps": 1e-5}
    more = {"rms": False, "save_stats": True, "grad_handled": True}
    return torch.ops.fastnn.norm_fwd(*{**right, **more, **given}.values())


def _bwd(**given: Any) -> object:
    right = {"grad": _x(), "grad_total": None, "input": _x(), "weight": _x(4), "stats": _x(3, 2), "dims": 1}
    more = {"rms": False, "weight_dtype": torch.float32, "mask": (True, True, True), "grad_handled": True}
    return torch.ops.fastnn.norm_bwd(*{**right, **more, **given}.values())


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    half, double = torch.float16, torch.float64
    shared: Sequence[tuple[str, dict[str, Any], Any, tuple[str, ...]]] = (
        ("integer", {"input": _x(dtype=torch.int32)}, _TYPES, ("input", "int32")),
        ("float64", {"input": _x(dtype=double)}, _TYPES, ("input", "float64")),
        ("scalar", {"input": torch.ones(())}, ValueError, ("dims", "0")),
        ("dims_0", {"dims": 0}, ValueError, ("dims", "2", "0")),
        ("dims_negative", {"dims": -1}, ValueError, ("dims", "-1")),
        ("dims_3", {"dims": 3}, ValueError, ("dims", "3")),
        ("dims_huge", {"dims": 2**40}, ValueError, ("dims",)),
        ("weight_short", {"weight": _x(3)}, ValueError, ("weight", "(4,)", "(3,)")),
        ("weight_long", {"weight": _x(10**6)}, ValueError, ("weight", "(4,)")),
        ("weight_2d", {"weight": _x(1, 4)}, ValueError, ("weight", "(4,)", "(1, 4)")),
        ("weight_scalar", {"weight": torch.ones(())}, ValueError, ("weight", "()")),
        ("weight_half", {"weight": _x(4, dtype=half)}, _TYPES, ("weight", "float16")),
    )
    for side, call in (("fwd", _fwd), ("bwd", _bwd)):
        for name, given, error, words in shared:
            yield _raw(f"{side}_{name}", partial(call, **given), error, side, *words)
    yield _raw("fwd_sparse", lambda: _fwd(input=_x().to_sparse()), Exception)
    yield _raw("fwd_bias_short", lambda: _fwd(bias=_x(3)), ValueError, "bias", "(4,)", "(3,)")
    yield _raw("fwd_bias_half", lambda: _fwd(bias=_x(4, dtype=half)), _TYPES, "bias", "float16")
    yield _raw(
        "fwd_bias_differs",
        lambda: _fwd(input=_x(dtype=half), weight=_x(4, dtype=half)),
        _TYPES,
        "bias",
        "float16",
        "float32",
    )
    yield _raw("fwd_rms_bias", lambda: _fwd(rms=True), ValueError, "bias")
    yield _raw("fwd_residual_shape", lambda: _fwd(residual=_x(3, 3)), ValueError, "residual", "(3, 4)", "(3, 3)")
    yield _raw("fwd_residual_rank", lambda: _fwd(residual=_x(4)), ValueError, "residual", "(4,)")
    yield _raw("fwd_residual_half", lambda: _fwd(residual=_x(dtype=half)), _TYPES, "residual", "float16")
    yield _raw("bwd_grad_shape", lambda: _bwd(grad=_x(3, 3)), ValueError, "grad", "(3, 4)", "(3, 3)")
    yield _raw("bwd_grad_rank", lambda: _bwd(grad=_x(12)), ValueError, "grad", "(12,)")
    yield _raw("bwd_grad_half", lambda: _bwd(grad=_x(dtype=half)), _TYPES, "grad", "float16")
    yield _raw("bwd_grad_total_shape", lambda: _bwd(grad_total=_x(4, 3)), ValueError, "grad_total", "(4, 3)")
    yield _raw("bwd_grad_total_half", lambda: _bwd(grad_total=_x(dtype=half)), _TYPES, "grad_total", "float16")
    yield _raw("bwd_input_shape", lambda: _bwd(input=_x(300, 4)), ValueError, "(300, 2)")
    yield _raw("bwd_stats_short", lambda: _bwd(stats=_x(2, 2)), ValueError, "stats", "(3, 2)", "(2, 2)")
    yield _raw("bwd_stats_flat", lambda: _bwd(stats=_x(6)), ValueError, "stats", "(6,)")
    yield _raw("bwd_stats_half", lambda: _bwd(stats=_x(3, 2, dtype=half)), (ValueError, *_TYPES), "stats", "float16")
    yield _raw("bwd_stats_apart", lambda: _bwd(stats=_x(3, 4)[:, ::2]), ValueError, "stats")
    yield _raw("bwd_weight_dtype", lambda: _bwd(weight_dtype=half), _TYPES, "weight_dtype", "float16")
    yield _raw("bwd_weight_dtype_int", lambda: _bwd(weight=None, weight_dtype=torch.int64), _TYPES, "weight_dtype")
    yield _raw("bwd_mask", lambda: _bwd(mask=(True, True)), Exception)
    yield _raw(
        "fwd_wants_gradient",
        lambda: _fwd(input=_x(requires_grad=True), grad_handled=False),
        RuntimeError,
        "norm_fwd",
        "grad",
    )


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
