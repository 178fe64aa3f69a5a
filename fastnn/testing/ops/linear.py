"""Cases and invalid calls of linear with its activations and of the packed linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import nn
from ...ops.linear import ACTIVATIONS, linear_reference
from ...ops.linear import linear as typed_linear
from .. import block_sparse, block_sparse_int8, groupwise, int8
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, fill

Arrange = Callable[[Tensor], Tensor]

linear: Callable[..., Tensor] = typed_linear  # called with activations from a list, and wrongly


@dataclass(frozen=True)
class _Shape:
    """What the tensors of a case look like: x (*lead, k), w (n, k), b (n,) or scalar or none."""

    lead: tuple[int, ...] = (5,)
    k: int = 24
    n: int = 20
    bias: str = "row"
    """row, scalar or none."""
    kind: Fill = "normal"
    vector_weight: bool = False
    input_memory: str | Arrange = "contiguous"
    weight_memory: str | Arrange = "contiguous"
    bias_memory: str | Arrange = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def tensor(shape: Sequence[int], memory: str | Arrange, scale: float = 1.0) -> Tensor:
            values = fill(shape, dtype, generator, self.kind) * scale
            return arrange(values, memory) if isinstance(memory, str) else memory(values)

        found = {
            "input": tensor((*self.lead, self.k), self.input_memory),
            # Sums stay around 4: wider, and the activations saturate nearly everywhere.
            "weight": tensor(
                (self.k,) if self.vector_weight else (self.n, self.k),
                self.weight_memory,
                min(1.0, 4 / max(self.k, 1) ** 0.5),
            ),
        }
        if self.bias != "none":
            found["bias"] = tensor((self.n,) if self.bias == "row" else (), self.bias_memory)
        return found


def _call(activation: str | None, inputs: Inputs) -> Tensor:
    return linear(inputs["input"], inputs["weight"], inputs.get("bias"), activation=activation)


def _reference(activation: str | None, inputs: Inputs) -> Tensor:
    weight = inputs["weight"]
    if weight.dim() == 1:  # torch's own linear refuses a bias here
        return linear_reference(inputs["input"], weight.unsqueeze(0), inputs.get("bias"), activation).squeeze(-1)
    return linear_reference(inputs["input"], weight, inputs.get("bias"), activation)


def _call_packed(activation: str | None, inputs: Inputs) -> Tensor:
    """Through a frozen layer, which reads its weight from the packed copy; twice, so that the copy is reused."""
    weight, bias = inputs["weight"], inputs.get("bias")
    make: Callable[..., nn.Linear] = nn.Linear
    layer = make(weight.shape[1], weight.shape[0], bias is not None, "meta", weight.dtype, activation=activation)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer.freeze().eval()
    layer(inputs["input"])
    result: Tensor = layer(inputs["input"])
    return result


def _case(
    name: str,
    layout: str,
    shape: _Shape,
    activation: str | None = None,
    *,
    wide: bool = False,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    bites: bool = True,
) -> Case:
    return Case(
        op="linear",
        name=name,
        layout=layout,
        make=make or shape.make,
        call=partial(_call, activation),
        reference=partial(_reference, activation),
        forward_kernel="linear_fwd",
        backward_kernel="linear_bwd",
        differentiable=("input", "weight") if shape.bias == "none" else ("input", "weight", "bias"),
        wide=wide,
        bites=bites,
    )


def _packed(name: str, layout: str, shape: _Shape, activation: str | None = None, *, wide: bool = False) -> Case:
    return Case(
        op="linear",
        name=f"packed_{name}",
        layout=layout,
        make=shape.make,
        call=partial(_call_packed, activation),
        reference=partial(_reference, activation),
        forward_kernel="linear_packed_fwd",
        wide=wide,
    )


def _every_other_row(t: Tensor) -> Tensor:
    """Rows two apart with NaN between them; a vector gets stride 2."""
    base = t.new_full((2 * t.shape[0], *t.shape[1:]), float("nan"))
    base[::2].copy_(t)
    return base[::2]


def _large(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Three rows of sums around 1e3 and beyond (1e5 where the type allows), three ordinary ones: the former saturate
    every activation, the latter keep the scale of its slope, which would be all zeros and noise."""
    inputs = _Shape((6,), 17, 33).make(dtype, generator)
    values = inputs["input"].float()
    values[:3] *= 100.0 if dtype == torch.float16 else 1e4
    return {**inputs, "input": values.to(dtype)}


def _nonfinite(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN and infinities in a few rows of the input, among them the last column, and in one weight and one bias."""
    inputs = _Shape((9,), 17, 19).make(dtype, generator)
    nan, inf = float("nan"), float("inf")
    x, weight, bias = inputs["input"], inputs["weight"], inputs["bias"]
    x[0, 0], x[2, 16], x[4, 3], x[6, 16] = nan, nan, inf, -inf
    weight[7, 16], bias[3], bias[18] = -inf, nan, inf
    return inputs


def _matrix_cases() -> Iterator[Case]:
    for activation in ACTIVATIONS:
        yield _case(f"{activation}_bias", "contiguous", _Shape((7,), 33, 50), activation)
    yield _case("outliers", "contiguous", _Shape((9,), 40, 24, kind="outliers"), "gelu")
    yield _case("columns_2_apart", "strided", _Shape((5,), 19, 21, input_memory="strided"), "relu")
    both = _Shape((6,), 18, 17, input_memory="strided", weight_memory="strided", bias_memory="strided")
    yield _case("all_2_apart", "strided", both, "silu")
    yield _case("rows_2_apart", "strided", _Shape((6,), 17, 18, "none", input_memory=_every_other_row), "tanh")
    yield _case("input_stride_0", "expanded", _Shape((6,), 20, 17, input_memory="expanded"), "gelu_tanh")
    yield _case("all_stride_0", "expanded", _Shape((6,), 9, 18, "row", "normal", False, *["expanded"] * 3), "sigmoid")
    yield _case("scalar_bias", "expanded", _Shape((6,), 9, 18, "scalar"), "relu")
    yield _case("input_unaligned", "offset", _Shape((9,), 17, 19, input_memory="offset"), "relu")
    yield _case("all_unaligned", "offset", _Shape((9,), 32, 48, "row", "normal", False, *["offset"] * 3), "gelu")
    for name, m, n, k in (("m0", 0, 20, 24), ("n0", 5, 0, 24), ("k0", 5, 20, 0), ("mk0", 0, 20, 0), ("all0", 0, 0, 0)):
        yield _case(name, "empty", _Shape((m,), k, n), "gelu")
    yield _case("k0_no_bias", "empty", _Shape((5,), 0, 20, "none"), "sigmoid")
    yield _case("batch0", "empty", _Shape((3, 0), 24, 20))
    for m, n, k in ((1, 1, 1), (3, 17, 3), (7, 47, 17), (9, 49, 35)):
        yield _case(f"{m}x{n}x{k}", "tail", _Shape((m,), k, n), "gelu")
        yield _case(f"{m}x{n}x{k}_outliers", "tail", _Shape((m,), k, n, "none", "outliers"))
    yield _case("rows_apart", "padded_rows", _Shape((7,), 17, 19, "row", "normal", False, "padded_rows", "padded_rows"))
    yield _case("weight_transposed", "transposed", _Shape((7,), 33, 50, weight_memory="transposed"), "relu")
    yield _case("input_transposed", "transposed", _Shape((7,), 33, 50, input_memory="transposed"), "silu")
    yield _case("three_dims", "leading_dims", _Shape((2, 5), 12, 18), "tanh")
    yield _case("four_dims", "leading_dims", _Shape((2, 3, 4), 12, 18), "gelu_tanh")
    yield _case("inner_transposed", "leading_dims", _Shape((3, 4), 12, 18, input_memory="transposed"), "relu")
    yield _case("vector", "one_row", _Shape((), 65, 33), "silu")
    yield _case("vector_weight", "one_row", _Shape((4,), 65, 1, "scalar", vector_weight=True), "gelu")
    yield _case("vector_weight_no_bias", "one_row", _Shape((), 65, 1, "none", vector_weight=True))
    yield _case("one_row", "one_row", _Shape((1,), 129, 65), "gelu")
    for activation in ACTIVATIONS:
        yield _case(f"{activation}_saturated", "large_magnitude", _Shape(), activation, make=_large, bites=False)
        yield _case(f"{activation}_specials", "nonfinite", _Shape(), activation, make=_nonfinite, bites=False)
    yield from _packed_cases()


def _packed_cases() -> Iterator[Case]:
    yield _packed("rows", "contiguous", _Shape((7,), 33, 50), "gelu")
    yield _packed("weight_2_apart", "strided", _Shape((5,), 19, 21, "row", "normal", False, "strided", "strided"))
    yield _packed("stride_0", "expanded", _Shape((5,), 19, 21, "row", "normal", False, *["expanded"] * 3), "relu")
    yield _packed("unaligned", "offset", _Shape((9,), 17, 19, "row", "normal", False, *["offset"] * 3), "silu")
    for name, m, n, k in (("m0", 0, 20, 24), ("n0", 5, 0, 24), ("k0", 5, 20, 0)):
        yield _packed(name, "empty", _Shape((m,), k, n), "gelu")
    for m, n, k in ((1, 1, 1), (7, 47, 17), (9, 49, 35), (50, 21, 201)):
        yield _packed(f"{m}x{n}x{k}", "tail", _Shape((m,), k, n, "none"), "tanh")
    yield _packed("weight_transposed", "transposed", _Shape((7,), 33, 50, weight_memory="transposed"), "sigmoid")
    yield _packed("vector", "one_row", _Shape((), 65, 33), "gelu_tanh")


def _wide_cases() -> Iterator[Case]:
    for activation in ACTIVATIONS:
        for bias in ("row", "none"):
            shape = _Shape((19,), 70, 66, bias, "outliers")
            yield _case(f"wide_{activation}_{bias}", "contiguous", shape, activation, wide=True)
    for m in (*range(1, 10), 17, 33, 64, 65, 129, 513):
        yield _case(f"wide_m{m}", "tail", _Shape((m,), 29, 50), "gelu", wide=True)
        yield _packed(f"wide_m{m}", "tail", _Shape((m,), 29, 50), "gelu", wide=True)
    for n in (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 65, 95, 97, 193):
        yield _case(f"wide_n{n}", "tail", _Shape((10,), 29, n), "relu", wide=True)
        yield _packed(f"wide_n{n}", "tail", _Shape((10,), 29, n), "relu", wide=True)
    for k in (1, 2, 3, 5, 16, 17, 31, 63, 100, 1023, 1024, 1025, 2500):
        yield _case(f"wide_k{k}", "tail", _Shape((10,), k, 50), "silu", wide=True)
        yield _packed(f"wide_k{k}", "tail", _Shape((10,), k, 50), "silu", wide=True)
    yield _case("wide_blocks", "tail", _Shape((520,), 2051, 101), "gelu_tanh", wide=True)
    yield _packed("wide_blocks", "tail", _Shape((520,), 2051, 101), "gelu_tanh", wide=True)
    yield _case("wide_columns", "tail", _Shape((70,), 65, 3001), wide=True)
    yield _packed("wide_rows", "tail", _Shape((301,), 40, 97), wide=True)
    yield _case(
        "wide_slices", "padded_rows", _Shape((65,), 100, 97, "row", "outliers", False, "padded_rows"), wide=True
    )
    yield _case(
        "wide_transposed", "transposed", _Shape((65,), 100, 97, "row", "normal", False, *["transposed"] * 2), wide=True
    )


_FORMS = (int8, groupwise, block_sparse, block_sparse_int8)
CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases(), *(case for form in _FORMS for case in form.CASES))


def _t(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", name, call, error, ("fastnn.linear", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, w, b = _t(5, 4), _t(3, 4), _t(3)
    half = torch.float16
    yield _public("input_list", lambda: linear([1.0], w, b), TypeError, "input", "list")
    yield _public("weight_none", lambda: linear(x, None, b), TypeError, "weight", "NoneType")
    yield _public("bias_float", lambda: linear(x, w, 1.0), TypeError, "bias", "float")
    yield _public("activation", lambda: linear(x, w, b, activation="swish"), ValueError, "activation", "swish")
    yield _public("activation_code", lambda: linear(x, w, b, activation=1), (TypeError, ValueError), "activation", "1")
    yield _public(
        "activation_list",
        lambda: linear(x, w, b, activation=["relu"]),
        (TypeError, ValueError),
        "activation",
    )
    yield _public("k_differs", lambda: linear(_t(5, 3), w, b), ValueError, "input", "4", "(5, 3)")
    yield _public("input_scalar", lambda: linear(_t(), w, b), ValueError, "input", "()")
    yield _public("weight_3d", lambda: linear(x, _t(2, 3, 4), b), ValueError, "weight", "(2, 3, 4)")
    yield _public("weight_scalar", lambda: linear(x, _t(), b), ValueError, "weight", "()")
    yield _public("bias_length", lambda: linear(x, w, _t(4)), ValueError, "bias", "(3,)", "(4,)")
    yield _public("bias_length_1", lambda: linear(x, w, _t(1)), ValueError, "bias", "(3,)", "(1,)")
    yield _public("bias_2d", lambda: linear(x, w, _t(5, 3)), ValueError, "bias", "(5, 3)")
    yield _public("vector_weight_bias", lambda: linear(x, _t(4), _t(1)), ValueError, "bias", "scalar")
    yield _public("weight_dtype", lambda: linear(x, w.to(half), b), TypeError, "weight", "float16", "float32")
    yield _public("bias_dtype", lambda: linear(x, w, b.double()), TypeError, "bias", "float64", "float32")
    yield _public("weight_device", lambda: linear(x, w.to("meta"), b), TypeError, "weight", "meta", "cpu")
    yield _public("bias_device", lambda: linear(x, w, b.to("meta")), TypeError, "bias", "meta", "cpu")
    yield _public("integers", lambda: linear(x.int(), w.int(), b.int()), TypeError, "input", "int32")
    yield _public("complex", lambda: linear(*(t.to(torch.complex64) for t in (x, w, b))), TypeError, "input", "complex")
    yield _public("sparse_input", lambda: linear(x.to_sparse(), w, b), TypeError, "input", "sparse")
    yield _public("sparse_weight", lambda: linear(x, w.to_sparse(), b), TypeError, "weight", "sparse")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", name, call, error, words, raw=True)


def _fwd(*arguments: object) -> object:
    return torch.ops.fastnn.linear_fwd(*arguments)


def _bwd(
    grad: object,
    input: object,
    weight: object,
    slope: object = None,
    activation: int = 0,
    shape: tuple[int, ...] = (5, 4),
    mask: tuple[bool, ...] = (True, True, True),
) -> object:
    return torch.ops.fastnn.linear_bwd(grad, input, weight, slope, activation, shape, mask, True)


@torch.no_grad()
def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.fastnn.linear_pack(weight)
    return packed


def _packed_fwd(*arguments: object) -> object:
    return torch.ops.fastnn.linear_packed_fwd(*arguments)


_TYPES = (TypeError, NotImplementedError)


def _raw_forward_calls() -> Iterator[InvalidCall]:
    x, w, b = _t(5, 4), _t(3, 4), _t(3)
    half, double = torch.float16, torch.float64
    yield _raw("fwd_k", lambda: _fwd(_t(5, 3), w, b, 0, False, True), ValueError, "linear", "input")
    yield _raw("fwd_k_long", lambda: _fwd(_t(5, 4), _t(3, 5000), b, 0, False, True), ValueError, "linear", "input")
    yield _raw("fwd_scalar", lambda: _fwd(_t(), w, b, 0, False, True), ValueError, "linear", "input")
    yield _raw("fwd_weight_1d", lambda: _fwd(x, _t(4), None, 0, False, True), ValueError, "linear", "weight")
    yield _raw("fwd_weight_3d", lambda: _fwd(x, _t(2, 3, 4), b, 0, False, True), ValueError, "linear", "weight")
    yield _raw("fwd_bias", lambda: _fwd(x, w, _t(2), 0, False, True), ValueError, "linear", "bias")
    yield _raw("fwd_bias_scalar", lambda: _fwd(x, w, _t(), 0, False, True), ValueError, "linear", "bias")
    yield _raw("fwd_bias_2d", lambda: _fwd(x, w, _t(3, 1), 0, False, True), ValueError, "linear", "bias")
    yield _raw("fwd_activation_low", lambda: _fwd(x, w, b, -1, False, True), ValueError, "linear", "activation", "-1")
    yield _raw("fwd_activation_high", lambda: _fwd(x, w, b, 7, False, True), ValueError, "linear", "activation", "7")
    yield _raw("fwd_activation_wraps", lambda: _fwd(x, w, b, 2**32, False, True), ValueError, "linear", "activation")
    yield _raw("fwd_weight_dtype", lambda: _fwd(x, w.to(half), b, 0, False, True), _TYPES, "linear", "weight")
    yield _raw("fwd_bias_dtype", lambda: _fwd(x, w, b.to(half), 0, False, True), _TYPES, "linear", "bias")
    yield _raw(
        "fwd_float64",
        lambda: _fwd(x.to(double), w.to(double), b.to(double), 0, False, True),
        _TYPES,
        "linear",
        "float64",
    )
    yield _raw("fwd_integer", lambda: _fwd(x.int(), w.int(), b.int(), 0, False, True), _TYPES, "linear", "int32")
    yield _raw("fwd_sparse", lambda: _fwd(x.to_sparse(), w, b, 0, False, True), Exception)
    yield _raw("fwd_sparse_weight", lambda: _fwd(x, w.to_sparse(), b, 0, False, True), Exception)
    yield _raw(
        "fwd_wants_gradient",
        lambda: _fwd(_t(5, 4, requires_grad=True), w, b, 0, False),
        RuntimeError,
        "linear_fwd",
        "grad",
    )


def _raw_backward_calls() -> Iterator[InvalidCall]:
    g, x, w = _t(5, 3), _t(5, 4), _t(3, 4)
    half = torch.float16
    yield _raw("bwd_grad_columns", lambda: _bwd(_t(5, 2), x, w), ValueError, "linear", "grad")
    yield _raw("bwd_grad_rows", lambda: _bwd(_t(4, 3), x, w), ValueError, "linear", "grad")
    yield _raw("bwd_grad_scalar", lambda: _bwd(_t(), x, w), ValueError, "linear", "grad")
    yield _raw("bwd_input_short", lambda: _bwd(g, _t(1, 4), w), ValueError, "linear", "input")
    yield _raw("bwd_input_k", lambda: _bwd(g, _t(5, 3), w), ValueError, "linear", "input")
    yield _raw("bwd_weight", lambda: _bwd(g, x, _t(2, 4)), ValueError, "linear")
    yield _raw("bwd_weight_1d", lambda: _bwd(g, x, _t(4)), ValueError, "linear", "weight")
    yield _raw("bwd_shape_long", lambda: _bwd(g, x, w, shape=(5000, 4)), ValueError, "linear")
    yield _raw("bwd_shape_k", lambda: _bwd(g, x, w, shape=(5, 400)), ValueError, "linear")
    yield _raw("bwd_shape_negative", lambda: _bwd(g, x, w, shape=(-5, 4)), ValueError, "linear")
    yield _raw("bwd_shape_empty", lambda: _bwd(g, x, w, shape=()), ValueError, "linear")
    yield _raw("bwd_shape_overflow", lambda: _bwd(g, x, w, shape=(2**40, 2**40, 4)), ValueError, "linear")
    yield _raw("bwd_no_input", lambda: _bwd(g, None, w), ValueError, "linear", "input")
    yield _raw("bwd_no_slope", lambda: _bwd(g, x, w, None, 1), ValueError, "linear", "slope")
    yield _raw("bwd_slope_shape", lambda: _bwd(g, x, w, _t(2, 3), 1), ValueError, "linear", "slope")
    yield _raw("bwd_slope_dtype", lambda: _bwd(g, x, w, _t(5, 3, dtype=half), 1), _TYPES, "linear", "slope")
    yield _raw("bwd_activation_low", lambda: _bwd(g, x, w, g, -1), ValueError, "linear", "activation")
    yield _raw("bwd_activation_high", lambda: _bwd(g, x, w, g, 7), ValueError, "linear", "activation")
    yield _raw("bwd_grad_dtype", lambda: _bwd(g.to(half), x, w), _TYPES, "linear")
    yield _raw("bwd_input_dtype", lambda: _bwd(g, x.to(half), w), _TYPES, "linear", "input")
    yield _raw("bwd_mask", lambda: _bwd(g, x, w, mask=(True, True)), Exception)


def _raw_packed_calls() -> Iterator[InvalidCall]:
    x, b = _t(5, 4), _t(3)
    packed = partial(torch.zeros, dtype=torch.float32)
    yield _raw("pack_1d", lambda: _pack(_t(4)), ValueError, "linear", "weight")
    yield _raw("pack_integer", lambda: _pack(_t(3, 4).int()), _TYPES, "linear", "int32")
    yield _raw("packed_short", lambda: _packed_fwd(x, packed(1), b, 3, 0, True), ValueError, "linear", "packed")
    yield _raw("packed_empty", lambda: _packed_fwd(x, packed(0), b, 3, 0, True), ValueError, "linear", "packed")
    yield _raw("packed_long", lambda: _packed_fwd(x, packed(10**6), b, 3, 0, True), ValueError, "linear", "packed")
    yield _raw("packed_apart", lambda: _packed_fwd(x, packed(128)[::2], b, 3, 0, True), ValueError, "linear", "packed")
    yield _raw(
        "packed_other_k",
        lambda: _packed_fwd(_t(5, 400), _pack(_t(3, 4)), b, 3, 0, True),
        ValueError,
        "linear",
        "packed",
    )
    yield _raw(
        "packed_features",
        lambda: _packed_fwd(x, _pack(_t(3, 4)), _t(3000), 3000, 0, True),
        ValueError,
        "linear",
        "packed",
    )
    yield _raw("packed_negative", lambda: _packed_fwd(x, packed(64), b, -3, 0, True), ValueError, "linear")
    yield _raw(
        "packed_activation",
        lambda: _packed_fwd(x, _pack(_t(3, 4)), b, 3, 99, True),
        ValueError,
        "activation",
    )
    yield _raw("packed_dtype", lambda: _packed_fwd(x, packed(64).double(), b, 3, 0, True), _TYPES, "linear", "packed")


INVALID: tuple[InvalidCall, ...] = (
    *_public_calls(),
    *_raw_forward_calls(),
    *_raw_backward_calls(),
    *_raw_packed_calls(),
    *(call for form in _FORMS for call in form.INVALID),
)
