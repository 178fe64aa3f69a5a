"""Cases and invalid calls of linear with a weight of blocks of int8 codes; `fastnn.testing.ops.linear` lists them.

As in `fastnn.testing.int8`, the truth rounds the inputs as the op is defined to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..ops.block_sparse_int8 import block_sparse_linear_int8 as typed_block_sparse_linear_int8
from ..ops.block_sparse_int8 import block_sparse_linear_int8_reference
from ..sparse import block_grid, to_int8_blocks
from .cases import Case, Inputs, InvalidCall
from .inputs import Fill, arrange, fill

block_sparse_linear_int8: Callable[..., Tensor] = typed_block_sparse_linear_int8  # called wrongly, too
_PARTS = ("input", "codes", "columns", "starts", "scale")


@dataclass(frozen=True)
class _Shape:
    """A case: input (*lead, k), a weight (n, k) of which a part `density` of the blocks is kept, bias (n,) or none."""

    lead: tuple[int, ...] = (5,)
    k: int = 40
    n: int = 36
    depth: int = 4
    density: float = 0.5
    bias: bool = True
    kind: Fill = "normal"
    input_memory: str = "contiguous"
    weight_memory: str = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        weight = fill((self.n, self.k), torch.float32, generator, self.kind)
        weight = weight * min(1.0, 4 / max(self.k * self.density, 1) ** 0.5)
        grid = block_grid(self.n, self.k, self.depth)
        mask = torch.rand(grid, generator=generator) < self.density
        mask[1:2] = False  # a strip without blocks
        mask[:1] |= self.density > 0  # and a full one
        codes, columns, starts, scale = to_int8_blocks(weight, mask, depth=self.depth)
        found = {
            "input": arrange(fill((*self.lead, self.k), dtype, generator, self.kind), self.input_memory),
            "codes": arrange(codes, self.weight_memory),
            "columns": columns,
            "starts": starts,
            "scale": arrange(scale, self.weight_memory),
        }
        if self.bias:
            found["bias"] = arrange(fill((self.n,), dtype, generator), self.weight_memory)
        return found


def _call(activation: str | None, i: Inputs) -> Tensor:
    return block_sparse_linear_int8(*(i[name] for name in _PARTS), i.get("bias"), activation=activation)


def _call_layer(activation: Any, i: Inputs) -> Tensor:
    """Through a layer, which keeps the sums of its codes; twice, so that they are reused."""
    n, k, depth = i["scale"].shape[0], i["input"].shape[-1], i["codes"].shape[1] * 4
    layer = nn.Int8BlockSparseLinear(k, n, False, blocks=0, depth=depth, activation=activation)
    layer.weight, layer.columns, layer.starts, layer.weight_scale = (i[name] for name in _PARTS[1:])
    if "bias" in i:
        layer.bias = torch.nn.Parameter(i["bias"], requires_grad=False)
    layer(i["input"])
    result: Tensor = layer(i["input"])
    return result


def _reference(activation: str | None, i: Inputs) -> Tensor:
    x, codes, columns, starts, scale = (i[name] for name in _PARTS)
    return block_sparse_linear_int8_reference(x, codes, columns, starts, scale, i.get("bias"), activation)


def _case(
    name: str,
    layout: str,
    shape: _Shape,
    activation: str | None = None,
    *,
    call: Callable[[str | None, Inputs], Tensor] = _call,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
) -> Case:
    return Case(
        op="linear",
        name=f"block_sparse_int8_{name}",
        layout=layout,
        make=make or shape.make,
        call=partial(call, activation),
        reference=partial(_reference, activation),
        forward_kernel="linear_block_sparse_int8_fwd",
        wide=wide,
        bites=shape.density > 0 and make is None,
    )


def _specials(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Rows of zeros, with an outlier, with NaN and with infinities, where a block is and where none is."""
    inputs = _Shape((8,), 35, 40).make(dtype, generator)
    x = inputs["input"]
    x[1] = 0
    x[2, 34] = 6e4
    x[3, 34], x[4, 0], x[5, 17] = float("nan"), float("inf"), float("-inf")
    return inputs


def _matrix_cases() -> Iterator[Case]:
    form = _Shape()
    yield _case("plain", "contiguous", form)
    yield _case("layer", "one_row", replace(form, lead=(1,), k=129, n=65), "gelu", call=_call_layer)
    yield _case("outliers", "large_magnitude", replace(form, kind="outliers", depth=8))
    yield _case("specials", "nonfinite", form, make=_specials)
    for memory, layout in (("strided", "strided"), ("expanded", "expanded"), ("offset", "offset")):
        yield _case(f"input_{memory}", layout, replace(form, input_memory=memory))
    yield _case("all_offset", "offset", replace(form, input_memory="offset", weight_memory="offset"), "silu")
    yield _case("input_transposed", "transposed", replace(form, lead=(7,), input_memory="transposed"))
    yield _case("rows_apart", "padded_rows", replace(form, input_memory="padded_rows", weight_memory="padded_rows"))
    for name, m, n, k in (("m0", 0, 20, 24), ("n0", 5, 0, 24), ("k0", 5, 20, 0), ("all0", 0, 0, 0)):
        yield _case(name, "empty", replace(form, lead=(m,), k=k, n=n), "gelu")
    yield _case("no_blocks", "empty", replace(form, density=0.0), "sigmoid")
    for m, n, k, depth in ((1, 1, 1, 4), (3, 17, 3, 8), (9, 49, 35, 16), (26, 33, 21, 4)):
        yield _case(f"{m}x{n}x{k}", "tail", replace(form, lead=(m,), k=k, n=n, depth=depth, bias=False), "silu")
    yield _case("four_dims", "leading_dims", replace(form, lead=(2, 3, 4), k=12), "gelu_tanh")
    yield _case("vector", "one_row", replace(form, lead=(), k=65, n=33, density=1.0), "tanh")


def _wide_cases() -> Iterator[Case]:
    for m in (2, 3, 6, 8, 12, 19, 24, 130):
        yield _case(f"wide_m{m}", "tail", _Shape((m,), 70, 50, (4, 8, 16)[m % 3]), wide=True)
    yield _case("wide_long", "tail", _Shape((3,), 4101, 50, 16, 0.9), "relu", wide=True)
    yield _case("wide_columns", "tail", _Shape((20,), 65, 1001, 4, 0.2), wide=True, call=_call_layer)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _t(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def _i(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _codes(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int8)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    name = f"block_sparse_int8_{name}"
    return InvalidCall("linear", name, call, error, ("fastnn.block_sparse_linear_int8", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, w, c, s, a, b = _t(5, 12), _codes(3, 1, 16, 4), _i(0, 2, 1), _i(0, 2, 3), _t(20), _t(20)
    call = block_sparse_linear_int8
    yield _public("input_list", lambda: call([1.0], w, c, s, a), TypeError, "input", "list")
    yield _public("input_integer", lambda: call(x.int(), w, c, s, a), TypeError, "input", "int32")
    yield _public("input_scalar", lambda: call(_t(), w, c, s, a), ValueError, "input", "()")
    yield _public("input_deep", lambda: call(_t(1, 131073), w, c, s, a), ValueError, "input", "131072")
    yield _public("input_sparse", lambda: call(x.to_sparse(), w, c, s, a), TypeError, "input", "sparse")
    yield _public("codes_none", lambda: call(x, None, c, s, a), TypeError, "codes", "NoneType")
    yield _public("codes_float", lambda: call(x, w.float(), c, s, a), TypeError, "codes", "float32")
    yield _public("codes_depth", lambda: call(x, _codes(3, 3, 16, 4), c, s, a), ValueError, "codes", "4, 8, 16", "3, 3")
    yield _public("codes_values", lambda: call(x, _codes(3, 2, 16), c, s, a), ValueError, "codes", "(3, 2, 16)")
    yield _public("columns_int64", lambda: call(x, w, c.long(), s, a), TypeError, "columns", "int64")
    yield _public("columns_count", lambda: call(x, w, c[:2], s, a), ValueError, "columns", "(3,)", "(2,)")
    yield _public("starts_count", lambda: call(x, w, c, s[:2], a), ValueError, "starts", "(3,)", "(2,)")
    yield _public("starts_device", lambda: call(x, w, c, s.to("meta"), a), TypeError, "starts", "meta", "cpu")
    yield _public("scale_2d", lambda: call(x, w, c, s, _t(20, 1)), ValueError, "scale", "(20, 1)")
    yield _public("scale_half", lambda: call(x, w, c, s, a.half()), TypeError, "scale", "float16")
    grad = _t(20, requires_grad=True)
    yield _public("scale_grad", lambda: call(x, w, c, s, grad), NotImplementedError, "scale", "grad")
    yield _public("bias_length", lambda: call(x, w, c, s, a, _t(1)), ValueError, "bias", "(20,)", "(1,)")
    yield _public("bias_dtype", lambda: call(x, w, c, s, a, b.double()), TypeError, "bias", "float64")
    yield _public("activation", lambda: call(x, w, c, s, a, activation="swish"), ValueError, "activation", "swish")
    d = x.double()  # on the reference, which has its own look at the indices
    yield _public("columns_far", lambda: call(d, w, _i(0, 3, 1), s, a), IndexError, "columns", "[0, 3)", "3")
    yield _public("columns_falling", lambda: call(d, w, _i(2, 0, 1), s, a), ValueError, "columns", "rise")
    yield _public("starts_end", lambda: call(d, w, c, _i(0, 2, 4), a), ValueError, "starts", "3")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", f"block_sparse_int8_{name}", call, error, words, raw=True)


def _fwd(*arguments: object) -> object:
    return torch.ops.fastnn.linear_block_sparse_int8_fwd(*arguments, True)


def _pack(*arguments: object) -> Any:
    return torch.ops.fastnn.linear_block_sparse_int8_pack(*arguments, True)


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    x, w, c, s, a, b = _t(5, 12), _codes(3, 1, 16, 4), _i(0, 2, 1), _i(0, 2, 3), _t(20), _t(20)
    fwd, pack, p, end = "linear_block_sparse_int8_fwd", "linear_block_sparse_int8_pack", _t(64), (20, 0)
    yield _raw("pack_float", lambda: _pack(w.float(), s, a), TypeError, pack, "codes", "float32")
    yield _raw("pack_depth", lambda: _pack(_codes(3, 3, 16, 4), s, a), ValueError, pack, "codes", "(3, 3, 16, 4)")
    yield _raw("pack_starts", lambda: _pack(w, s[:2], a), ValueError, pack, "starts", "(3,)")
    yield _raw("pack_end", lambda: _pack(w, _i(0, 2, 4), a), ValueError, pack, "starts", "4")
    yield _raw("pack_fall", lambda: _pack(w, _i(0, 4, 3), a), ValueError, pack, "starts", "4")
    yield _raw("pack_scale", lambda: _pack(w, s, _t(20, 1)), ValueError, pack, "scale", "(20, 1)")
    yield _raw("pack_scale_half", lambda: _pack(w, s, a.half()), _TYPES, pack, "scale", "float16")
    yield _raw("fwd_scalar", lambda: _fwd(_t(), w, c, s, p, b, *end), ValueError, fwd, "input")
    yield _raw("fwd_deep", lambda: _fwd(_t(1, 131073), w, c, s, p, b, *end), ValueError, fwd, "131072")
    yield _raw("fwd_float64", lambda: _fwd(x.double(), w, c, s, p, b, *end), _TYPES, "float64")
    yield _raw("fwd_codes", lambda: _fwd(x, w.char()[..., :2], c, s, p, b, *end), ValueError, fwd, "codes", "16, 2")
    apart = _codes(3, 1, 16, 8)[..., ::2]
    yield _raw("fwd_apart", lambda: _fwd(x, apart, c, s, p, b, *end), ValueError, fwd, "codes", "contiguous")
    yield _raw("fwd_far", lambda: _fwd(x, w, _i(0, 3, 1), s, p, b, *end), IndexError, fwd, "columns", "[0, 3)", "3")
    yield _raw("fwd_below", lambda: _fwd(x, w, _i(-1, 2, 1), s, p, b, *end), IndexError, fwd, "columns", "-1")
    yield _raw("fwd_fall", lambda: _fwd(x, w, c, _i(0, 4, 3), p, b, *end), ValueError, fwd, "starts", "4")
    yield _raw("fwd_packed", lambda: _fwd(x, w, c, s, _t(63), b, *end), ValueError, fwd, "packed", "(63,)")
    yield _raw("fwd_negative", lambda: _fwd(x, w, c, s, p, b, -20, 0), ValueError, fwd, "-20")
    yield _raw("fwd_bias", lambda: _fwd(x, w, c, s, p, _t(2), *end), ValueError, fwd, "bias", "(2,)")
    yield _raw("fwd_bias_half", lambda: _fwd(x, w, c, s, p, b.half(), *end), _TYPES, fwd, "bias", "float16")
    yield _raw("fwd_activation", lambda: _fwd(x, w, c, s, p, b, 20, 7), ValueError, fwd, "activation", "7")


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
