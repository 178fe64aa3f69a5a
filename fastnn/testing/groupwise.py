"""Cases and invalid calls of linear with a weight of codes in groups; `fastnn.testing.ops.linear` lists them.

The truth of an int8 input rounds it as the op is defined to (`quantize_rows_reference`); any other is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..ops.groups import quantize_groups
from ..ops.linear_groupwise import linear_groupwise as typed_linear_groupwise
from ..ops.linear_groupwise import linear_groupwise_reference
from .cases import Case, Inputs, InvalidCall
from .inputs import Fill, arrange, fill

linear_groupwise: Callable[..., Tensor] = typed_linear_groupwise  # called with activations from a list, and wrongly


@dataclass(frozen=True)
class _Shape:
    """A case: input (*lead, k), a weight (n, k) in groups, bias (n,) or none."""

    lead: tuple[int, ...] = (5,)
    k: int = 40
    n: int = 20
    group: int = 16
    bits: int = 4
    symmetric: bool = True
    int8_input: bool = False
    bias: bool = True
    kind: Fill = "normal"
    input_memory: str = "contiguous"
    bias_memory: str = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        weight = fill((self.n, self.k), torch.float32, generator, self.kind) * min(1.0, 4 / max(self.k, 1) ** 0.5)
        codes, scale, offset = quantize_groups(weight, self.group, bits=self.bits, symmetric=self.symmetric)
        x = arrange(fill((*self.lead, self.k), dtype, generator, self.kind), self.input_memory)
        found = {"input": x, "codes": codes, "scale": scale}
        if offset is not None:
            found["offset"] = offset
        if self.bias:
            found["bias"] = arrange(fill((self.n,), dtype, generator), self.bias_memory)
        return found


def _call(shape: _Shape, activation: str | None, i: Inputs) -> Tensor:
    return linear_groupwise(
        i["input"],
        i["codes"],
        i["scale"],
        i.get("offset"),
        i.get("bias"),
        group_size=shape.group,
        int8_input=shape.int8_input,
        activation=activation,
    )


def _call_layer(shape: _Shape, activation: Any, i: Inputs) -> Tensor:
    """Through a layer, which keeps its packed copy; twice, so that the copy is reused."""
    n, k = i["codes"].shape[0], i["input"].shape[-1]
    layer: nn.GroupwiseLinear
    if shape.bits == 8:
        layer = nn.Int8WeightOnlyLinear(k, n, False, "meta", group_size=shape.group, activation=activation)
    else:
        options: Any = {"group_size": shape.group, "symmetric": shape.symmetric, "int8_input": shape.int8_input}
        layer = nn.Int4Linear(k, n, False, "meta", activation=activation, **options)
    layer.weight, layer.weight_scale, layer.weight_offset = i["codes"], i["scale"], i.get("offset")
    if "bias" in i:
        layer.bias = torch.nn.Parameter(i["bias"], requires_grad=False)
    layer(i["input"])
    result: Tensor = layer(i["input"])
    return result


def _reference(shape: _Shape, activation: str | None, i: Inputs) -> Tensor:
    return linear_groupwise_reference(
        i["input"],
        i["codes"],
        i["scale"],
        i.get("offset"),
        i.get("bias"),
        shape.group,
        shape.int8_input,
        activation,
    )


def _case(
    name: str,
    layout: str,
    shape: _Shape,
    activation: str | None = None,
    *,
    call: Callable[[_Shape, str | None, Inputs], Tensor] = _call,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    return Case(
        op="linear",
        name=f"groupwise_{name}",
        layout=layout,
        make=make or shape.make,
        call=partial(call, shape, activation),
        reference=partial(_reference, shape, activation),
        forward_kernel="linear_groupwise_fwd",
        wide=wide,
        bites=bites,
    )


_SPECIAL = _Shape((9,), 35, 19)


def _specials(shape: _Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Rows of zeros, with one outlier, with values next to zero, with NaN, with infinities; groups of zeros."""
    inputs = shape.make(dtype, generator)
    x = inputs["input"]
    x[1] = 0
    x[2, 34] = 6e4
    x[3] = x[3].sign() * torch.finfo(dtype).smallest_normal
    x[4, 34], x[5, 0], x[6, 17] = float("nan"), float("inf"), float("-inf")
    inputs["scale"][7] = 0
    return inputs


_FORMS = {
    "int4": _Shape(),
    "int4_offset": _Shape(symmetric=False),
    "int4_int8": _Shape(int8_input=True),
    "int4_offset_int8": _Shape(symmetric=False, int8_input=True),
    "int8": _Shape(bits=8),
}


def _matrix_cases() -> Iterator[Case]:
    for name, form in _FORMS.items():
        yield _case(f"{name}_bias", "contiguous", replace(form, lead=(7,), k=33, n=50), "relu")
        yield _case(f"{name}_layer", "one_row", replace(form, lead=(1,), k=129, n=65), "gelu", call=_call_layer)
        specials = replace(form, lead=(9,), k=35, n=19)
        yield _case(f"{name}_specials", "nonfinite", specials, make=partial(_specials, specials), bites=False)
    form = _FORMS["int4"]
    yield _case("outliers", "contiguous", replace(form, kind="outliers"))
    for memory, layout in (("strided", "strided"), ("expanded", "expanded"), ("offset", "offset")):
        yield _case(f"input_{memory}", layout, replace(form, input_memory=memory, bias_memory=memory))
    yield _case("rows_apart", "padded_rows", replace(form, input_memory="padded_rows"))
    yield _case("input_transposed", "transposed", replace(form, lead=(7,), input_memory="transposed"))
    for name, m, n, k in (("m0", 0, 20, 24), ("n0", 5, 0, 24), ("k0", 5, 20, 0), ("all0", 0, 0, 0)):
        yield _case(name, "empty", replace(form, lead=(m,), k=k, n=n), "gelu")
        yield _case(f"layer_{name}", "empty", replace(form, lead=(m,), k=k, n=n), call=_call_layer)
    for m, n, k, group in ((1, 1, 1, 1), (3, 17, 3, 2), (9, 49, 35, 300)):
        yield _case(f"{m}x{n}x{k}", "tail", replace(form, lead=(m,), k=k, n=n, group=group, bias=False), "silu")
    yield _case("four_dims", "leading_dims", replace(form, lead=(2, 3, 4), k=12), "gelu_tanh")
    yield _case("vector", "one_row", replace(form, lead=(), k=65, n=33), "silu")


def _wide_cases() -> Iterator[Case]:
    for name, form in _FORMS.items():
        for m in (2, 3, 5, 8, 130):
            yield _case(f"wide_{name}_m{m}", "tail", replace(form, lead=(m,), k=70, n=34, group=32), wide=True)
        for k, group in ((64, 64), (200, 7), (1000, 300)):
            yield _case(f"wide_{name}_k{k}", "tail", replace(form, k=k, group=group), "silu", wide=True)
    for k, group in ((1, 5), (2, 1), (576, 64), (1100, 2000), (4097, 128)):
        yield _case(f"wide_k{k}", "tail", replace(_FORMS["int4"], k=k, group=group), wide=True)
    yield _case("wide_columns", "tail", replace(_FORMS["int4"], lead=(20,), k=65, n=1001), wide=True, call=_call_layer)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _t(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def _codes(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.uint8)


def _half(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", f"groupwise_{name}", call, error, ("fastnn.linear_groupwise", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, w, s, b = _t(5, 6), _codes(3, 3), _half(3, 2), _t(3)
    call = partial(linear_groupwise, group_size=4)
    graded = _half(3, 2).requires_grad_()
    yield _public("input_list", lambda: call([1.0], w, s), TypeError, "input", "list")
    yield _public("input_integer", lambda: call(x.int(), w, s), TypeError, "input", "int32")
    yield _public("input_scalar", lambda: call(_t(), w, s), ValueError, "input", "()")
    yield _public("k_differs", lambda: call(_t(5, 7), w, s), ValueError, "codes", "7", "(3, 3)")
    yield _public("codes_float", lambda: call(x, _t(3, 3), s), TypeError, "codes", "float32")
    yield _public("codes_1d", lambda: call(x, _codes(3), s), ValueError, "codes", "(3,)")
    yield _public("scale_float", lambda: call(x, w, s.float()), TypeError, "scale", "float32")
    yield _public("scale_groups", lambda: call(x, w, _half(3, 3)), ValueError, "scale", "(3, 2)", "(3, 3)")
    yield _public("scale_grad", lambda: call(x, w, graded), NotImplementedError, "scale", "grad")
    yield _public("offset_groups", lambda: call(x, w, s, _half(3, 1)), ValueError, "offset", "(3, 1)")
    yield _public("offset_int8", lambda: call(x, _t(3, 6).char(), s, s), ValueError, "offset")
    yield _public("int8_by_int8", lambda: call(x, _t(3, 6).char(), s, int8_input=True), ValueError, "linear_int8")
    yield _public("group_zero", lambda: linear_groupwise(x, w, s, group_size=0), ValueError, "group_size", "0")
    yield _public("group_float", lambda: linear_groupwise(x, w, s, group_size=4.0), ValueError, "group_size", "4.0")
    yield _public("bias_length", lambda: call(x, w, s, None, _t(1)), ValueError, "bias", "(3,)", "(1,)")
    yield _public("bias_dtype", lambda: call(x, w, s, None, b.double()), TypeError, "bias", "float64")
    yield _public("codes_device", lambda: call(x, w.to("meta"), s), TypeError, "codes", "meta", "cpu")
    yield _public("activation", lambda: call(x, w, s, activation="swish"), ValueError, "activation", "swish")
    yield _public("sparse_input", lambda: call(x.to_sparse(), w, s), TypeError, "input", "sparse")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", f"groupwise_{name}", call, error, words, raw=True)


def _fwd(*arguments: object) -> object:
    return torch.ops.fastnn.linear_groupwise_fwd(*arguments, True)


def _pack(*arguments: object) -> Any:
    return torch.ops.fastnn.linear_groupwise_pack(*arguments, True)


def _rows(*arguments: object) -> Any:
    return torch.ops.fastnn.linear_groupwise_rows(*arguments, True)


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    x, w, s, b = _t(5, 6), _codes(3, 3), _half(3, 2), _t(3)
    op, pack, rows = "linear_groupwise_fwd", "linear_groupwise_pack", "linear_groupwise_rows"
    options = (3, 4, 4, False, False, 0)
    yield _raw("pack_float", lambda: _pack(_t(3, 3), s, None, 6, 4, 4), TypeError, pack, "codes", "float32")
    yield _raw("pack_1d", lambda: _pack(_codes(3), s, None, 6, 4, 4), ValueError, pack, "codes", "(3,)")
    yield _raw("pack_apart", lambda: _pack(_codes(3, 6)[:, ::2], s, None, 6, 4, 4), ValueError, pack, "contiguous")
    yield _raw("pack_scale", lambda: _pack(w, _half(3, 3), None, 6, 4, 4), ValueError, pack, "scale", "(3, 3)")
    yield _raw("pack_scale_float", lambda: _pack(w, s.float(), None, 6, 4, 4), TypeError, pack, "scale", "float32")
    yield _raw("pack_offset", lambda: _pack(w, s, _half(2, 2), 6, 4, 4), ValueError, pack, "offset", "(2, 2)")
    yield _raw("pack_group", lambda: _pack(w, s, None, 6, 0, 4), ValueError, pack, "group_size", "0")
    yield _raw("pack_bits", lambda: _pack(w, s, None, 6, 4, 3), ValueError, pack, "bits", "3")
    yield _raw("pack_negative", lambda: _pack(w, s, None, -6, 4, 4), ValueError, pack, "-6")
    yield _raw("pack_sparse", lambda: _pack(w.to_sparse(), s, None, 6, 4, 4), Exception)
    yield _raw("fwd_short", lambda: _fwd(x, _t(4), b, *options), ValueError, op, "packed")
    yield _raw(
        "fwd_other_k", lambda: _fwd(_t(5, 600), _pack(w, s, None, 6, 4, 4), b, *options), ValueError, op, "packed"
    )
    yield _raw("fwd_negative", lambda: _fwd(x, _t(4), b, -3, 4, 4, False, False, 0), ValueError, op, "-3")
    yield _raw("fwd_scalar", lambda: _fwd(_t(), _t(4), b, *options), ValueError, op, "input")
    yield _raw("fwd_float64", lambda: _fwd(x.double(), _t(4), b, *options), _TYPES, op, "float64")
    yield _raw("fwd_bias", lambda: _fwd(x, _pack(w, s, None, 6, 4, 4), _t(2), *options), ValueError, op, "bias", "(2,)")
    yield _raw("fwd_activation", lambda: _fwd(x, _t(4), b, *options[:-1], 7), ValueError, op, "activation", "7")
    yield _raw("fwd_int8", lambda: _fwd(x, _t(4), b, 3, 4, 8, False, True, 0), ValueError, op, "bits", "8")
    index = torch.tensor([0, 2])
    yield _raw("rows_far", lambda: _rows(index + 1, w, s, None, 6, 4, 4, 0), IndexError, rows, "3", "out of range")
    yield _raw("rows_below", lambda: _rows(index - 1, w, s, None, 6, 4, 4, 0), IndexError, rows, "-1")
    yield _raw("rows_int32", lambda: _rows(index.int(), w, s, None, 6, 4, 4, 0), TypeError, rows, "index", "int32")
    yield _raw("rows_dtype", lambda: _rows(index, w, s, None, 6, 4, 4, 3), ValueError, rows, "dtype", "3")


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
