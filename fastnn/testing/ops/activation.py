"""Cases and invalid calls of the activations and of the gated linear units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import activation as ops
from ...ops.activation import ACTIVATIONS, activation_reference, glu_reference
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": ops.relu,
    "gelu": ops.gelu,
    "gelu_tanh": partial(ops.gelu, approximate="tanh"),
    "silu": ops.silu,
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "relu2": ops.relu2,
    "hardswish": ops.hardswish,
}
"""Activation -> the public function."""

GLUS: dict[str, Callable[..., Tensor]] = {
    "silu": ops.swiglu,
    "gelu": ops.geglu,
    "gelu_tanh": partial(ops.geglu, approximate="tanh"),
    "relu": ops.reglu,
}
"""The gate's activation -> the public function."""


@dataclass(frozen=True)
class _Call:
    """What a case calls and what its tensors look like."""

    activation: str
    form: str
    """plain, bias, float32_bias, pair (gate and up) or packed (both in one tensor)."""
    shape: tuple[int, ...] = (6, 64)
    """Of the result."""
    kind: Fill = "normal"
    memory: str | Arrange = "contiguous"

    @property
    def names(self) -> tuple[str, ...]:
        forms = {"plain": ("input",), "pair": ("gate", "up"), "packed": ("gate",)}
        return forms.get(self.form, ("input", "bias"))

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        found = {}
        for name in self.names:
            shape, own = self.shape, dtype
            if name == "bias":
                shape = self.shape[-1:]
                half = dtype in (torch.bfloat16, torch.float16)
                own = torch.float32 if half and self.form == "float32_bias" else dtype
            elif self.form == "packed":
                shape = (*self.shape[:-1], 2 * self.shape[-1])
            values = fill(shape, own, generator, self.kind)
            found[name] = arrange(values, self.memory) if isinstance(self.memory, str) else self.memory(values)
        return found

    def call(self, inputs: Inputs) -> Tensor:
        if self.form in ("pair", "packed"):
            return GLUS[self.activation](inputs["gate"], inputs.get("up"))
        return FUNCTIONS[self.activation](inputs["input"], bias=inputs.get("bias"))

    def reference(self, inputs: Inputs) -> Tensor:
        """The same in plain PyTorch."""
        if self.form in ("pair", "packed"):
            return glu_reference(inputs["gate"], inputs.get("up"), self.activation)
        return activation_reference(inputs["input"], inputs.get("bias"), self.activation)


def _case(
    name: str,
    layout: str,
    call: _Call,
    *,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    return Case(
        op="activation",
        name=f"{call.activation}_{call.form}_{name}",
        layout=layout,
        make=make or call.make,
        call=call.call,
        reference=call.reference,
        forward_kernel="activation_fwd",
        backward_kernel="activation_bwd",
        differentiable=call.names,
        wide=wide,
        bites=bites,
    )


_FORMS = (("hardswish", "plain"), ("gelu", "bias"), ("silu", "pair"), ("gelu_tanh", "packed"))
"""One activation in every form: what a layout is tried with."""


def _each(
    name: str, layout: str, shape: tuple[int, ...], *, kind: Fill = "normal", memory: Any = None, **options: Any
) -> Iterator[Case]:
    for activation, form in _FORMS:
        call = _Call(activation, form, shape, kind, layout if memory is None else memory)
        yield _case(name, layout, call, **options)


def _all(shape: tuple[int, ...], kind: Fill = "normal") -> Iterator[_Call]:
    """Every activation that there is; bias and packing, which do not ask which one it is, with two of them."""
    for activation in FUNCTIONS:
        yield _Call(activation, "plain", shape, kind)
    for activation in ("gelu", "relu2"):
        yield _Call(activation, "bias", shape, kind)
    for activation in GLUS:
        yield _Call(activation, "pair", shape, kind)
    for activation in ("silu", "relu"):
        yield _Call(activation, "packed", shape, kind)


def _large(call: _Call, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """From 100 to 1e18 (6e4 in float16), both signs: cubes and exponentials leave float32's range."""
    found = call.make(dtype, generator)
    first = call.names[0]
    sizes = torch.tensor([1e2, -1e2, 1e4, -1e4, 6e4, -6e4, 1e15, -1e15, 1e18, -1e18], dtype=torch.float64)
    sizes = sizes.clamp(-6e4, 6e4) if dtype == torch.float16 else sizes
    values = found[first].double()
    flat = values.view(-1)
    flat[: sizes.numel()] = sizes
    flat[-sizes.numel() :] = sizes
    return {**found, first: values.to(dtype)}


def _nonfinite(call: _Call, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN and infinities at the head, in the body and in the tail of every operand; the others must not notice."""
    found = call.make(dtype, generator)
    nan, inf = float("nan"), float("inf")
    for at, name in enumerate(call.names):
        rows = found[name].view(-1, found[name].shape[-1])
        for i, special in enumerate((nan, inf, -inf)):
            for column in (at, 20 + at, rows.shape[1] - 1 - at):
                rows[(i + 3 * at) % rows.shape[0], column] = special
    return found


def _matrix_cases() -> Iterator[Case]:
    for call in _all((7, 67)):
        yield _case("rows", "contiguous", call)
    yield _case("rows", "contiguous", _Call("silu", "float32_bias", (7, 67)))
    yield from _each("outliers", "contiguous", (8, 100), kind="outliers")
    yield from _each("every_other", "strided", (5, 50))
    yield from _each("rows_stride_0", "expanded", (4, 33))
    yield from _each("columns_stride_0", "expanded", (4, 34), memory=lambda t: expanded(t, dim=t.dim() - 1))
    yield from _each("unaligned", "offset", (7, 33))
    for shape in ((0, 5), (5, 0), (0,), (3, 0, 4)):
        yield from _each("x".join(map(str, shape)), "empty", shape)
    for length in (1, 2, 3, 5, 15, 16, 17, 31, 33):
        yield from _each(f"length_{length}", "tail", (5, length))
    yield from _each("rows_apart", "padded_rows", (6, 65))
    yield from _each("transposed", "transposed", (23, 18))
    yield from _each("three_dims", "leading_dims", (3, 4, 17))
    yield from _each("five_dims", "leading_dims", (2, 1, 3, 2, 5))
    yield from _each("vector", "one_row", (1000,))
    yield from _each("one_long_row", "one_row", (1, 4097))
    yield _case("scalar", "one_row", _Call("tanh", "plain", ()))
    yield _case("scalar", "one_row", _Call("gelu", "pair", ()))
    for call in _all((6, 40)):
        yield _case("large", "large_magnitude", call, make=partial(_large, call), bites=False)
    for call in _all((9, 37)):
        yield _case("specials", "nonfinite", call, make=partial(_nonfinite, call), bites=False)


def _wide_cases() -> Iterator[Case]:
    for length in (4, 7, 8, 9, 63, 64, 255, 768, 1000, 4096):
        yield from _each(f"wide_{length}", "tail", (3, length), wide=True)
    yield from _each("wide_long_row", "one_row", (2, 40001), wide=True)  # blocks of 16384 columns
    yield from _each("wide_many_rows", "contiguous", (3001, 33), wide=True)  # chunks of 256 rows and 185 more
    for form in ("pair", "packed"):  # past the caches: 8 MB and more
        yield _case("wide_streamed", "contiguous", _Call("silu", form, (1400, 1024)), wide=True)
    yield from _each("wide_rows_apart", "padded_rows", (70, 97), wide=True)
    for call in _all((64, 1024)):
        yield _case("wide_values", "contiguous", call, wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (3, 4), **options)


def _public(name: str, function: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("activation", f"{function}-{name}", call, error, (f"fastnn.{function}", *words))


def _activation_calls() -> Iterator[InvalidCall]:
    x, half, double = _x(), torch.float16, torch.float64
    calls: Sequence[tuple[str, Callable[[Callable[..., Tensor]], object], Any, tuple[str, ...]]] = (
        ("input_list", lambda f: f([1.0]), TypeError, ("input", "list")),
        ("input_none", lambda f: f(None), TypeError, ("input", "NoneType")),
        ("input_integer", lambda f: f(x.int()), TypeError, ("input", "int32")),
        ("input_bool", lambda f: f(x.bool()), TypeError, ("input", "bool")),
        ("input_complex", lambda f: f(x.to(torch.complex64)), TypeError, ("input", "complex64")),
        ("input_sparse", lambda f: f(x.to_sparse()), TypeError, ("input", "sparse")),
        ("bias_list", lambda f: f(x, bias=[0.0] * 4), TypeError, ("bias", "list")),
        ("bias_number", lambda f: f(x, bias=1.0), TypeError, ("bias", "float")),
        ("bias_length", lambda f: f(x, bias=_x(3)), ValueError, ("bias", "(3,)", "(3, 4)")),
        ("bias_2d", lambda f: f(x, bias=_x(1, 4)), ValueError, ("bias", "(1, 4)")),
        ("bias_scalar", lambda f: f(torch.ones(()), bias=torch.ones(())), ValueError, ("bias", "()")),
        ("bias_integer", lambda f: f(x, bias=_x(4).int()), TypeError, ("bias", "int32")),
        ("bias_half", lambda f: f(x, bias=_x(4, dtype=half)), TypeError, ("bias", "float16", "float32")),
        ("bias_double", lambda f: f(x.to(half), bias=_x(4, dtype=double)), TypeError, ("bias", "float64")),
        ("bias_device", lambda f: f(x, bias=_x(4).to("meta")), ValueError, ("bias", "meta", "cpu")),
        ("bias_sparse", lambda f: f(x, bias=_x(4).to_sparse()), TypeError, ("bias", "sparse")),
    )
    for name in ("gelu", "silu", "relu", "relu2", "sigmoid", "tanh", "hardswish"):
        for label, call, error, words in calls if name in ("gelu", "tanh") else calls[:3]:
            yield _public(label, name, partial(call, getattr(ops, name)), error, *words)
    gelu: Callable[..., Tensor] = ops.gelu
    yield _public("approximate", "gelu", lambda: gelu(x, "erf"), ValueError, "approximate", "'erf'")
    yield _public("approximate_bool", "gelu", lambda: gelu(x, True), ValueError, "approximate", "True")


def _glu_calls() -> Iterator[InvalidCall]:
    x = _x()
    calls: Sequence[tuple[str, Callable[[Callable[..., Tensor]], object], Any, tuple[str, ...]]] = (
        ("gate_list", lambda f: f([1.0], x), TypeError, ("gate", "list")),
        ("gate_none", lambda f: f(None), TypeError, ("gate", "NoneType")),
        ("gate_integer", lambda f: f(x.int(), x), TypeError, ("gate", "int32")),
        ("gate_sparse", lambda f: f(x.to_sparse()), TypeError, ("gate", "sparse")),
        ("up_list", lambda f: f(x, [1.0]), TypeError, ("up", "list")),
        ("up_integer", lambda f: f(x, x.int()), TypeError, ("up", "int32")),
        ("up_shape", lambda f: f(x, _x(1, 4)), ValueError, ("up", "(3, 4)", "(1, 4)")),
        ("up_device", lambda f: f(x, x.to("meta")), ValueError, ("up", "meta", "cpu")),
        ("odd", lambda f: f(_x(3, 5)), ValueError, ("even", "(3, 5)")),
        ("packed_scalar", lambda f: f(torch.ones(())), ValueError, ("even", "()")),
    )
    for name in ("swiglu", "geglu", "reglu"):
        for label, call, error, words in calls:
            yield _public(label, name, partial(call, getattr(ops, name)), error, *words)
    geglu: Callable[..., Tensor] = ops.geglu
    yield _public("approximate", "geglu", lambda: geglu(x, x, approximate=1), ValueError, "approximate", "1")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("activation", name, call, error, ("activation", *words), raw=True)


def _fwd(**given: Any) -> object:
    right = {"input": _x(), "factor": None, "bias": None, "activation": 1, "packed": False, "grad_handled": True}
    return torch.ops.fastnn.activation_fwd(*{**right, **given}.values())


def _bwd(**given: Any) -> object:
    right = {"grad": _x(), "input": _x(), "factor": None, "bias": None, "activation": 1, "packed": False}
    more = {"mask": (True, False, False), "grad_handled": True}
    return torch.ops.fastnn.activation_bwd(*{**right, **more, **given}.values())


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    half, double = torch.float16, torch.float64
    shared: Sequence[tuple[str, dict[str, Any], Any, tuple[str, ...]]] = (
        ("integer", {"input": _x(dtype=torch.int32)}, _TYPES, ("input", "int32")),
        ("float64", {"input": _x(dtype=double)}, _TYPES, ("input", "float64")),
        ("code_0", {"activation": 0}, ValueError, ("activation", "0")),
        ("code_high", {"activation": len(ACTIVATIONS)}, ValueError, ("activation", str(len(ACTIVATIONS)))),
        ("code_negative", {"activation": -1}, ValueError, ("activation", "-1")),
        ("code_huge", {"activation": 2**40}, ValueError, ("activation",)),
        ("factor_shape", {"factor": _x(3, 3)}, ValueError, ("factor", "(3, 4)", "(3, 3)")),
        ("factor_rank", {"factor": _x(12)}, ValueError, ("factor", "(12,)")),
        ("factor_half", {"factor": _x(dtype=half)}, _TYPES, ("factor", "float16")),
        ("factor_and_packed", {"factor": _x(), "packed": True}, ValueError, ("packed", "factor")),
        ("factor_and_bias", {"factor": _x(), "bias": _x(4)}, ValueError, ("bias",)),
        ("packed_and_bias", {"packed": True, "bias": _x(2)}, ValueError, ("bias",)),
        ("packed_odd", {"input": _x(3, 5), "packed": True}, ValueError, ("even", "(3, 5)")),
        ("packed_scalar", {"input": torch.ones(()), "packed": True}, ValueError, ("even", "()")),
        ("bias_short", {"bias": _x(3)}, ValueError, ("bias", "(4,)", "(3,)")),
        ("bias_long", {"bias": _x(10**6)}, ValueError, ("bias", "(4,)")),
        ("bias_2d", {"bias": _x(1, 4)}, ValueError, ("bias", "(1, 4)")),
        ("bias_half", {"bias": _x(4, dtype=half)}, _TYPES, ("bias", "float16")),
    )
    for side, call in (("fwd", _fwd), ("bwd", _bwd)):
        for name, given, error, words in shared:
            yield _raw(f"{side}_{name}", partial(call, **given), error, side, *words)
    yield _raw("fwd_sparse", lambda: _fwd(input=_x().to_sparse()), Exception)
    yield _raw("bwd_grad_shape", lambda: _bwd(grad=_x(3, 3)), ValueError, "grad", "(3, 4)", "(3, 3)")
    yield _raw("bwd_grad_rank", lambda: _bwd(grad=_x(12)), ValueError, "grad", "(12,)")
    yield _raw("bwd_grad_half", lambda: _bwd(grad=_x(dtype=half)), _TYPES, "grad", "float16")
    yield _raw("bwd_grad_packed", lambda: _bwd(packed=True), ValueError, "grad", "(3, 2)", "(3, 4)")
    yield _raw("bwd_no_factor", lambda: _bwd(mask=(True, True, False)), ValueError, "factor")
    yield _raw("bwd_no_bias", lambda: _bwd(mask=(True, False, True)), ValueError, "bias")
    yield _raw("bwd_mask", lambda: _bwd(mask=(True, True)), Exception)
    yield _raw(
        "fwd_wants_gradient",
        lambda: _fwd(input=_x(requires_grad=True), grad_handled=False),
        RuntimeError,
        "activation_fwd",
        "grad",
    )


INVALID: tuple[InvalidCall, ...] = (*_activation_calls(), *_glu_calls(), *_raw_calls())
