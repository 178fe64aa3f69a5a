"""Cases and invalid calls of linear with a weight of int8 codes; `fastnn.testing.ops.linear` lists them.

The truth rounds the inputs as the op is defined to, in float32 (`quantize_rows_reference`), so it has the kernel's
codes and the policy's bound is that of the arithmetic after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..ops.linear import ACTIVATIONS
from ..ops.linear_int8 import linear_int8 as typed_linear_int8
from ..ops.linear_int8 import linear_int8_reference, quantize_rows_reference
from .cases import Case, Inputs, InvalidCall
from .inputs import Fill, arrange, fill

linear_int8: Callable[..., Tensor] = typed_linear_int8  # called with activations from a list, and wrongly


@dataclass(frozen=True)
class _Shape:
    """What the tensors of a case look like: input (*lead, k), codes (n, k), scale (n,), bias (n,) or none."""

    lead: tuple[int, ...] = (5,)
    k: int = 24
    n: int = 20
    bias: bool = True
    kind: Fill = "normal"
    input_memory: str = "contiguous"
    weight_memory: str = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        weight = fill((self.n, self.k), torch.float32, generator, self.kind) * min(1.0, 4 / max(self.k, 1) ** 0.5)
        codes, scale = quantize_rows_reference(weight)
        found = {
            "input": arrange(fill((*self.lead, self.k), dtype, generator, self.kind), self.input_memory),
            "codes": arrange(codes, self.weight_memory),
            "scale": arrange(scale, self.weight_memory),
        }
        if self.bias:
            found["bias"] = arrange(fill((self.n,), dtype, generator), self.weight_memory)
        return found


def _call(activation: str | None, inputs: Inputs) -> Tensor:
    return linear_int8(inputs["input"], inputs["codes"], inputs["scale"], inputs.get("bias"), activation=activation)


def _call_layer(activation: Any, inputs: Inputs) -> Tensor:
    """Through a layer, which keeps its packed copy; twice, so that the copy is reused."""
    n, k = inputs["codes"].shape
    layer = nn.Int8Linear(k, n, False, "meta", activation=activation)
    layer.weight, layer.weight_scale = inputs["codes"], inputs["scale"]
    if "bias" in inputs:
        layer.bias = torch.nn.Parameter(inputs["bias"], requires_grad=False)
    layer(inputs["input"])
    result: Tensor = layer(inputs["input"])
    return result


def _reference(activation: str | None, inputs: Inputs) -> Tensor:
    return linear_int8_reference(inputs["input"], inputs["codes"], inputs["scale"], inputs.get("bias"), activation)


def _case(
    name: str,
    layout: str,
    shape: _Shape,
    activation: str | None = None,
    *,
    call: Callable[[str | None, Inputs], Tensor] = _call,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    return Case(
        op="linear",
        name=f"int8_{name}",
        layout=layout,
        make=make or shape.make,
        call=partial(call, activation),
        reference=partial(_reference, activation),
        forward_kernel="linear_int8_fwd",
        wide=wide,
        bites=bites,
    )


def _specials(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Rows of zeros, with one outlier, with values next to zero, with NaN, with infinities; three ordinary ones."""
    inputs = _Shape((9,), 35, 19).make(dtype, generator)
    x = inputs["input"]
    x[1] = 0
    x[2, 34] = 6e4
    x[3] = x[3].sign() * torch.finfo(dtype).smallest_normal
    x[4, 34], x[5, 0], x[6, 17] = float("nan"), float("inf"), float("-inf")
    inputs["codes"][7] = 0
    return inputs


def _matrix_cases() -> Iterator[Case]:
    for activation in ACTIVATIONS:
        yield _case(f"{activation}_bias", "contiguous", _Shape((7,), 33, 50), activation)
    yield _case("layer", "contiguous", _Shape((7,), 33, 50), "gelu", call=_call_layer)
    yield _case("outliers", "contiguous", _Shape((9,), 40, 24, kind="outliers"))
    for memory, layout in (("strided", "strided"), ("expanded", "expanded"), ("offset", "offset")):
        yield _case(f"input_{memory}", layout, _Shape((6,), 19, 21, input_memory=memory))
        yield _case(f"all_{memory}", layout, _Shape((6,), 18, 17, True, "normal", memory, memory), "silu")
    for name, m, n, k in (("m0", 0, 20, 24), ("n0", 5, 0, 24), ("k0", 5, 20, 0), ("all0", 0, 0, 0)):
        yield _case(name, "empty", _Shape((m,), k, n), "gelu")
        yield _case(f"layer_{name}", "empty", _Shape((m,), k, n), call=_call_layer)
    for m, n, k in ((1, 1, 1), (3, 17, 3), (7, 47, 18), (9, 49, 35)):
        yield _case(f"{m}x{n}x{k}", "tail", _Shape((m,), k, n, False), "silu")
    yield _case("rows_apart", "padded_rows", _Shape((7,), 17, 19, True, "normal", "padded_rows", "padded_rows"))
    yield _case("weight_transposed", "transposed", _Shape((7,), 33, 50, weight_memory="transposed"), "relu")
    yield _case("input_transposed", "transposed", _Shape((7,), 33, 50, input_memory="transposed"))
    yield _case("four_dims", "leading_dims", _Shape((2, 3, 4), 12, 18), "gelu_tanh")
    yield _case("vector", "one_row", _Shape((), 65, 33), "silu")
    yield _case("one_row", "one_row", _Shape((1,), 129, 65), call=_call_layer)
    yield _case("specials", "nonfinite", _Shape(), make=_specials, bites=False)


def _wide_cases() -> Iterator[Case]:
    for m in (*range(1, 10), 17, 33, 65, 129, 513):
        yield _case(f"wide_m{m}", "tail", _Shape((m,), 29, 50), wide=True)
    for n in (1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 65, 97, 193):
        yield _case(f"wide_n{n}", "tail", _Shape((10,), 29, n), "relu", wide=True)
    for k in (1, 2, 3, 4, 5, 16, 31, 63, 100, 1023, 1025, 4097):
        yield _case(f"wide_k{k}", "tail", _Shape((10,), k, 50), "silu", wide=True)
    yield _case("wide_blocks", "tail", _Shape((520,), 4101, 101), wide=True)
    yield _case("wide_columns", "tail", _Shape((70,), 65, 3001), "gelu_tanh", wide=True, call=_call_layer)
    yield _case("wide_deep", "tail", _Shape((6,), 17000, 35), wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _t(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def _codes(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int8)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", f"int8_{name}", call, error, ("fastnn.linear_int8", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, w, s, b = _t(5, 4), _codes(3, 4), _t(3), _t(3)
    yield _public("input_list", lambda: linear_int8([1.0], w, s), TypeError, "input", "list")
    yield _public("codes_float", lambda: linear_int8(x, _t(3, 4), s), TypeError, "codes", "float32")
    yield _public("codes_uint8", lambda: linear_int8(x, w.to(torch.uint8), s), TypeError, "codes", "uint8")
    yield _public("codes_1d", lambda: linear_int8(x, _codes(4), s), ValueError, "codes", "(4,)")
    yield _public("codes_deep", lambda: linear_int8(x, _codes(1, 131073), s), ValueError, "codes", "131072")
    yield _public("k_differs", lambda: linear_int8(_t(5, 3), w, s), ValueError, "input", "4", "(5, 3)")
    yield _public("input_scalar", lambda: linear_int8(_t(), w, s), ValueError, "input", "()")
    yield _public("input_integer", lambda: linear_int8(x.int(), w, s), TypeError, "input", "int32")
    yield _public("scale_length", lambda: linear_int8(x, w, _t(4)), ValueError, "scale", "(3,)", "(4,)")
    yield _public("scale_half", lambda: linear_int8(x, w, s.half()), TypeError, "scale", "float16")
    yield _public("scale_none", lambda: linear_int8(x, w, None), TypeError, "scale", "NoneType")
    yield _public(
        "scale_grad", lambda: linear_int8(x, w, _t(3, requires_grad=True)), NotImplementedError, "scale", "grad"
    )
    yield _public("bias_length", lambda: linear_int8(x, w, s, _t(1)), ValueError, "bias", "(3,)", "(1,)")
    yield _public("bias_dtype", lambda: linear_int8(x, w, s, b.double()), TypeError, "bias", "float64")
    yield _public("codes_device", lambda: linear_int8(x, w.to("meta"), s), TypeError, "codes", "meta", "cpu")
    yield _public("activation", lambda: linear_int8(x, w, s, activation="swish"), ValueError, "activation", "swish")
    yield _public("sparse_input", lambda: linear_int8(x.to_sparse(), w, s), TypeError, "input", "sparse")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", f"int8_{name}", call, error, words, raw=True)


def _fwd(*arguments: object) -> object:
    return torch.ops.fastnn.linear_int8_fwd(*arguments, True)


def _pack(*arguments: object) -> Any:
    return torch.ops.fastnn.linear_int8_pack(*arguments, True)


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    x, w, s, b = _t(5, 4), _codes(3, 4), _t(3), _t(3)
    op, pack = "linear_int8_fwd", "linear_int8_pack"
    yield _raw("pack_float", lambda: _pack(_t(3, 4), s), TypeError, pack, "codes", "float32")
    yield _raw("pack_1d", lambda: _pack(_codes(4), s), ValueError, pack, "codes", "(4,)")
    yield _raw("pack_scale", lambda: _pack(w, _t(4)), ValueError, pack, "scale", "(4,)")
    yield _raw("pack_scale_2d", lambda: _pack(w, _t(3, 1)), ValueError, pack, "scale", "(3, 1)")
    yield _raw("pack_scale_half", lambda: _pack(w, s.half()), _TYPES, pack, "scale", "float16")
    yield _raw("pack_deep", lambda: _pack(_codes(1, 131073), _t(1)), ValueError, pack, "131072")
    yield _raw("pack_sparse", lambda: _pack(w.to_sparse(), s), Exception)
    yield _raw("fwd_short", lambda: _fwd(x, _t(4), b, 3, 0), ValueError, op, "packed")
    yield _raw("fwd_other_k", lambda: _fwd(_t(5, 400), _pack(w, s), b, 3, 0), ValueError, op, "packed")
    yield _raw("fwd_features", lambda: _fwd(x, _pack(w, s), _t(3000), 3000, 0), ValueError, op, "packed")
    yield _raw("fwd_negative", lambda: _fwd(x, _pack(w, s), b, -3, 0), ValueError, op, "-3")
    yield _raw("fwd_apart", lambda: _fwd(x, _t(96)[::2], b, 3, 0), ValueError, op, "packed")
    yield _raw("fwd_deep", lambda: _fwd(_t(1, 131073), _t(48), b, 3, 0), ValueError, op, "131072")
    yield _raw("fwd_scalar", lambda: _fwd(_t(), _pack(w, s), b, 3, 0), ValueError, op, "input")
    yield _raw("fwd_float64", lambda: _fwd(x.double(), _pack(w, s), b, 3, 0), _TYPES, op, "float64")
    yield _raw("fwd_bias", lambda: _fwd(x, _pack(w, s), _t(2), 3, 0), ValueError, op, "bias")
    yield _raw("fwd_bias_half", lambda: _fwd(x, _pack(w, s), b.half(), 3, 0), _TYPES, op, "bias", "float16")
    yield _raw("fwd_activation", lambda: _fwd(x, _pack(w, s), b, 3, 7), ValueError, op, "activation", "7")
    yield _raw(
        "quantize_scalar",
        lambda: torch.ops.fastnn.linear_int8_quantize(_t(), True),
        ValueError,
        "linear_int8_quantize",
        "input",
    )


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
