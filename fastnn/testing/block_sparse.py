"""Cases and invalid calls of linear with a block-sparse weight; `fastnn.testing.ops.linear` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..ops.block_sparse import block_sparse_linear as typed_block_sparse_linear
from ..ops.block_sparse import block_sparse_linear_reference
from ..sparse import block_grid, to_blocks
from .cases import Case, Inputs, InvalidCall
from .inputs import Fill, arrange, fill

block_sparse_linear: Callable[..., Tensor] = typed_block_sparse_linear  # called with activations from a list, wrongly


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
    bias_memory: str = "contiguous"
    values_memory: str = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        weight = fill((self.n, self.k), torch.float32, generator, self.kind)
        weight = weight * min(1.0, 4 / max(self.k * self.density, 1) ** 0.5)
        grid = block_grid(self.n, self.k, self.depth)
        mask = torch.rand(grid, generator=generator) < self.density
        mask[1:2] = False  # a strip without blocks
        mask[:1] |= self.density > 0  # and a full one
        values, columns, starts = to_blocks(weight.to(dtype), mask, depth=self.depth)
        x = arrange(fill((*self.lead, self.k), dtype, generator, self.kind), self.input_memory)
        found = {"input": x, "values": arrange(values, self.values_memory), "columns": columns, "starts": starts}
        if self.bias:
            found["bias"] = arrange(fill((self.n,), dtype, generator), self.bias_memory)
        return found


def _call(shape: _Shape, activation: str | None, i: Inputs) -> Tensor:
    return block_sparse_linear(
        i["input"],
        i["values"],
        i["columns"],
        i["starts"],
        i.get("bias"),
        out_features=shape.n,
        activation=activation,
    )


def _call_layer(shape: _Shape, activation: Any, i: Inputs) -> Tensor:
    values, bias = i["values"], i.get("bias")
    layer = nn.BlockSparseLinear(
        shape.k, shape.n, False, "meta", blocks=len(values), depth=shape.depth, activation=activation
    )
    del layer.values, layer.bias  # the tensors themselves, whose gradients are looked at
    layer.values, layer.columns, layer.starts, layer.bias = values, i["columns"], i["starts"], bias  # type: ignore[assignment]
    result: Tensor = layer(i["input"])
    return result


def _reference(shape: _Shape, activation: str | None, i: Inputs) -> Tensor:
    return block_sparse_linear_reference(
        i["input"], i["values"], i["columns"], i["starts"], i.get("bias"), shape.n, activation
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
) -> Case:
    return Case(
        op="linear",
        name=f"block_sparse_{name}",
        layout=layout,
        make=make or shape.make,
        call=partial(call, shape, activation),
        reference=partial(_reference, shape, activation),
        forward_kernel="linear_block_sparse_fwd",
        backward_kernel="linear_block_sparse_bwd",
        differentiable=("input", "values", "bias") if shape.bias else ("input", "values"),
        wide=wide,
        bites=shape.density > 0,
    )


def _specials(shape: _Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Rows with NaN and with infinities, where every block is kept: what is not kept takes no part (the op's page)."""
    inputs = shape.make(dtype, generator)
    x = inputs["input"]
    x[0, 3], x[1, 4], x[2, 39] = float("nan"), float("inf"), float("-inf")
    return inputs


def _matrix_cases() -> Iterator[Case]:
    form = _Shape()
    yield _case("plain", "contiguous", form)
    yield _case("layer", "one_row", replace(form, lead=(1,), k=129, n=65), "gelu", call=_call_layer)
    yield _case("outliers", "large_magnitude", replace(form, kind="outliers", depth=8))
    every = replace(form, n=16, density=1.0)
    yield _case("specials", "nonfinite", every, make=partial(_specials, every))
    for memory, layout in (("strided", "strided"), ("expanded", "expanded"), ("offset", "offset")):
        yield _case(f"input_{memory}", layout, replace(form, input_memory=memory, bias_memory=memory))
    yield _case("rows_apart", "padded_rows", replace(form, input_memory="padded_rows"))
    yield _case("input_transposed", "transposed", replace(form, lead=(7,), input_memory="transposed"))
    yield _case("values_apart", "padded_rows", replace(form, values_memory="padded_rows"), "relu")
    for name, m, n, k in (("m0", 0, 20, 24), ("n0", 5, 0, 24), ("k0", 5, 20, 0), ("all0", 0, 0, 0)):
        yield _case(name, "empty", replace(form, lead=(m,), k=k, n=n), "gelu")
    yield _case("no_blocks", "empty", replace(form, density=0.0), "sigmoid")
    for m, n, k, depth in ((1, 1, 1, 2), (3, 17, 3, 2), (9, 49, 35, 16), (26, 33, 21, 4)):
        yield _case(f"{m}x{n}x{k}", "tail", replace(form, lead=(m,), k=k, n=n, depth=depth, bias=False), "silu")
    yield _case("four_dims", "leading_dims", replace(form, lead=(2, 3, 4), k=12, depth=2), "gelu_tanh")
    yield _case("vector", "one_row", replace(form, lead=(), k=65, n=33, density=1.0), "tanh")


def _wide_cases() -> Iterator[Case]:
    for m in (2, 6, 8, 12, 19, 24, 130):
        depth = (2, 4, 8, 16)[m % 4]
        yield _case(f"wide_m{m}", "tail", _Shape((m,), 70, 50, depth), wide=True)
    for depth in (2, 16):  # sums that are cut: of a strip, of a column, of rows
        yield _case(f"wide_long{depth}", "tail", _Shape((3,), 1500, 50, depth, 0.9), wide=True)
    yield _case("wide_tall", "tail", _Shape((3,), 6, 3300, 2, 1.0), "silu", wide=True)
    yield _case("wide_columns", "tail", _Shape((20,), 65, 1001, 4, 0.2), wide=True, call=_call_layer)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _t(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def _i(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", f"block_sparse_{name}", call, error, ("fastnn.block_sparse_linear", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, v, c, s, b = _t(5, 6), _t(3, 2, 16), _i(0, 2, 1), _i(0, 2, 3), _t(20)
    call = partial(block_sparse_linear, out_features=20)
    yield _public("input_list", lambda: call([1.0], v, c, s), TypeError, "input", "list")
    yield _public("input_integer", lambda: call(x.int(), v, c, s), TypeError, "input", "int32")
    yield _public("input_scalar", lambda: call(_t(), v, c, s), ValueError, "input", "()")
    yield _public("input_sparse", lambda: call(x.to_sparse(), v, c, s), TypeError, "input", "sparse")
    yield _public("values_none", lambda: call(x, None, c, s), TypeError, "values", "NoneType")
    yield _public("values_dtype", lambda: call(x, v.double(), c, s), TypeError, "values", "float64")
    yield _public("values_depth", lambda: call(x, _t(3, 3, 16), c, s), ValueError, "values", "(3, 3, 16)")
    yield _public("values_outputs", lambda: call(x, _t(3, 2, 8), c, s), ValueError, "values", "(3, 2, 8)")
    yield _public("columns_int64", lambda: call(x, v, c.long(), s), TypeError, "columns", "int64")
    yield _public("columns_count", lambda: call(x, v, c[:2], s), ValueError, "columns", "(3,)", "(2,)")
    yield _public("starts_count", lambda: call(x, v, c, s[:2]), ValueError, "starts", "(3,)", "(2,)")
    yield _public("starts_device", lambda: call(x, v, c, s.to("meta")), TypeError, "starts", "meta", "cpu")
    yield _public("bias_length", lambda: call(x, v, c, s, _t(1)), ValueError, "bias", "(20,)", "(1,)")
    yield _public("bias_dtype", lambda: call(x, v, c, s, b.double()), TypeError, "bias", "float64")
    yield _public("outputs_float", lambda: call(x, v, c, s, out_features=20.0), ValueError, "out_features", "20.0")
    yield _public("activation", lambda: call(x, v, c, s, activation="swish"), ValueError, "activation", "swish")
    d, w = x.double(), v.double()  # on the reference, which has its own look at the indices
    yield _public("columns_far", lambda: call(d, w, _i(0, 3, 1), s), IndexError, "columns", "[0, 3)", "3")
    yield _public("columns_falling", lambda: call(d, w, _i(2, 0, 1), s), ValueError, "columns", "rise")
    yield _public("starts_end", lambda: call(d, w, c, _i(0, 2, 4)), ValueError, "starts", "3")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("linear", f"block_sparse_{name}", call, error, words, raw=True)


def _fwd(*arguments: object) -> object:
    return torch.ops.fastnn.linear_block_sparse_fwd(*arguments, True)


def _bwd(*arguments: object) -> object:
    return torch.ops.fastnn.linear_block_sparse_bwd(*arguments, True)


def _raw_calls() -> Iterator[InvalidCall]:
    x, v, c, s, b = _t(5, 6), _t(3, 2, 16), _i(0, 2, 1), _i(0, 2, 3), _t(20)
    fwd, bwd, end = "linear_block_sparse_fwd", "linear_block_sparse_bwd", (20, 0, False)
    yield _raw("fwd_scalar", lambda: _fwd(_t(), v, c, s, b, *end), ValueError, fwd, "input")
    yield _raw("fwd_float64", lambda: _fwd(x.double(), v, c, s, b, *end), (TypeError, NotImplementedError), "float64")
    yield _raw("fwd_values", lambda: _fwd(x, _t(3, 3, 16), c, s, b, *end), ValueError, fwd, "values", "(3, 3, 16)")
    apart = _t(3, 2, 32)[..., ::2]
    yield _raw("fwd_apart", lambda: _fwd(x, apart, c, s, b, *end), ValueError, fwd, "values", "contiguous")
    yield _raw("fwd_dtype", lambda: _fwd(x, v.bfloat16(), c, s, b, *end), TypeError, fwd, "values", "bfloat16")
    yield _raw("fwd_int64", lambda: _fwd(x, v, c.long(), s, b, *end), TypeError, fwd, "columns", "int64")
    yield _raw("fwd_starts", lambda: _fwd(x, v, c, s[:2], b, *end), ValueError, fwd, "starts", "(3,)")
    yield _raw("fwd_far", lambda: _fwd(x, v, _i(0, 3, 1), s, b, *end), IndexError, fwd, "columns", "[0, 3)", "3")
    yield _raw("fwd_below", lambda: _fwd(x, v, _i(-1, 2, 1), s, b, *end), IndexError, fwd, "columns", "-1")
    yield _raw("fwd_twice", lambda: _fwd(x, v, _i(1, 1, 1), s, b, *end), ValueError, fwd, "columns", "rise")
    yield _raw("fwd_end", lambda: _fwd(x, v, c, _i(0, 2, 4), b, *end), ValueError, fwd, "starts", "4")
    yield _raw("fwd_begin", lambda: _fwd(x, v, c, _i(1, 2, 3), b, *end), ValueError, fwd, "starts", "1")
    yield _raw("fwd_fall", lambda: _fwd(x, v, c, _i(0, 4, 3), b, *end), ValueError, fwd, "starts", "4")
    yield _raw("fwd_negative", lambda: _fwd(x, v, c, s, b, -20, 0, False), ValueError, fwd, "-20")
    yield _raw("fwd_bias", lambda: _fwd(x, v, c, s, _t(2), *end), ValueError, fwd, "bias", "(2,)")
    yield _raw("fwd_activation", lambda: _fwd(x, v, c, s, b, 20, 7, False), ValueError, fwd, "activation", "7")
    g, all3 = _t(5, 20), [True] * 3
    yield _raw("bwd_grad", lambda: _bwd(_t(4, 20), x, v, c, s, None, 0, [5, 6], all3), ValueError, bwd, "grad")
    yield _raw("bwd_outputs", lambda: _bwd(_t(5, 40), x, v, c, s, None, 0, [5, 6], all3), ValueError, bwd, "starts")
    yield _raw("bwd_input", lambda: _bwd(g, None, v, c, s, None, 0, [5, 6], all3), ValueError, bwd, "input", "None")
    yield _raw("bwd_slope", lambda: _bwd(g, x, v, c, s, None, 1, [5, 6], all3), ValueError, bwd, "slope", "None")
    yield _raw("bwd_far", lambda: _bwd(g, x, v, _i(0, 9, 1), s, None, 0, [5, 6], all3), IndexError, bwd, "9")
    yield _raw("bwd_mask", lambda: _bwd(g, x, v, c, s, None, 0, [5, 6], [True]), (ValueError, RuntimeError))


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
