"""Cases and invalid calls of rope."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.rope import RopeOptions, rope_reference, rope_tables
from ...ops.rope import rope as public_rope
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]

rope: Callable[..., tuple[Tensor, Tensor | None]] = public_rope  # called wrongly too


@dataclass(frozen=True)
class _Rope:
    """What a case calls and what its tensors look like."""

    batch: int = 2
    heads: tuple[int, int] = (3, 1)
    """Of query and key."""
    length: int = 5
    features: int = 16
    rotary: int | None = None
    """Of the features, where not all."""
    interleaved: bool = False
    half_tables: bool = False
    batch_tables: bool = False
    table_type: str = "own"
    """own (the query's) or float32."""
    free_tables: bool = False
    """Whether every entry is its own, so that no pair is rotated by one angle."""
    rows: int | None = None
    """Of the tables, where positions are given."""
    heads_dim: int = 1
    kind: Fill = "normal"
    memory: str | Arrange = "contiguous"
    table_memory: str = "contiguous"

    @property
    def turned(self) -> int:
        return self.features if self.rotary is None else self.rotary

    @property
    def options(self) -> RopeOptions:
        return RopeOptions(self.turned, self.interleaved, self.heads_dim)

    def _tables(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        pairs = self.turned // 2
        lead = (self.batch,) if self.batch_tables else ()
        shape = (*lead, self.length if self.rows is None else self.rows, pairs)
        if self.free_tables:
            drawn = [torch.randn((*shape[:-1], self.turned), generator=generator) for _ in ("cos", "sin")]
        else:
            angles = 100 * torch.randn(shape, generator=generator)
            drawn = [angles.cos(), angles.sin()]
            if not self.half_tables:
                drawn = [t.repeat_interleave(2, -1) if self.interleaved else torch.cat((t, t), -1) for t in drawn]
        half = dtype in (torch.bfloat16, torch.float16)
        own = torch.float32 if half and self.table_type == "float32" else dtype
        cos, sin = (arrange(t.to(own), self.table_memory) for t in drawn)
        return {"cos": cos, "sin": sin}

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        found = {}
        for name, heads in zip(("query", "key"), self.heads, strict=True):
            shape = [self.batch, self.length, self.features]
            shape.insert(self.heads_dim, heads)
            values = fill(shape, dtype, generator, self.kind)
            found[name] = arrange(values, self.memory) if isinstance(self.memory, str) else self.memory(values)
        found |= self._tables(dtype, generator)
        if self.rows is not None:
            shape = [self.batch, self.length] if self.batch > 1 else [self.length]
            found["positions"] = torch.randint(self.rows, shape, generator=generator)
        return found

    def call(self, inputs: Inputs) -> Tensor:
        """Query and key in one tensor, one head after another."""
        rotary = self.turned if self.half_tables or self.rotary is not None else None
        options: dict[str, Any] = {"positions": inputs.get("positions"), "rotary_dim": rotary}
        tables = inputs["cos"], inputs["sin"], self.heads_dim
        found = rope(inputs["query"], inputs["key"], *tables, interleaved=self.interleaved, **options)
        return torch.cat(found, self.heads_dim)  # type: ignore[arg-type]  # there is a key

    def reference(self, inputs: Inputs) -> Tensor:
        """The same in plain PyTorch."""
        tables = inputs["cos"], inputs["sin"], inputs.get("positions"), self.options
        return torch.cat([rope_reference(inputs[name], *tables) for name in ("query", "key")], self.heads_dim)


def _case(
    name: str,
    layout: str,
    call: _Rope,
    *,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    return Case(
        op="rope",
        name=("neighbours_" if call.interleaved else "halves_") + name,
        layout=layout,
        make=make or call.make,
        call=call.call,
        reference=call.reference,
        forward_kernel="rope_fwd",
        backward_kernel="rope_bwd",
        differentiable=("query", "key"),
        wide=wide,
        bites=bites,
    )


def _each(name: str, layout: str, call: _Rope, **options: Any) -> Iterator[Case]:
    """Pairs of halves and of neighbours."""
    for interleaved in (False, True):
        yield _case(name, layout, replace(call, interleaved=interleaved), **options)


def _by_positions(t: Tensor) -> Tensor:
    """The values of `t` with the heads of a position side by side in memory, as a linear layer gives them."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _spoilt(call: _Rope, values: Sequence[float], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """With these values at the head, in the body and in the tail of some rows; the others must not notice."""
    found = call.make(dtype, generator)
    for at, name in enumerate(("query", "key")):
        rows = found[name].view(-1, call.features)
        for i, value in enumerate(values):
            for column in (at, 20 + at, call.features - 1 - at):
                rows[(2 * i + 3 * at) % rows.shape[0], column] = value
    return found


def _large(call: _Rope, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    sizes = (3e4, -3e4, 1e2) if dtype == torch.float16 else (1e30, -1e30, 1e15)
    return _spoilt(call, sizes, dtype, generator)


def _nonfinite(call: _Rope, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return _spoilt(call, (float("nan"), float("inf"), float("-inf")), dtype, generator)


def _matrix_cases() -> Iterator[Case]:
    yield from _each("rows", "contiguous", _Rope(features=64))
    yield _case("outliers", "contiguous", _Rope(features=24, kind="outliers"))
    yield from _each("half_tables", "contiguous", _Rope(features=34, half_tables=True))
    yield from _each("float32_tables", "contiguous", _Rope(features=34, table_type="float32"))
    mixed = _Rope(features=38, table_type="float32", half_tables=True, interleaved=True)
    yield _case("half_float32_tables", "contiguous", mixed)
    yield from _each("free_tables", "contiguous", _Rope(features=36, free_tables=True))
    yield _case("batch_tables", "contiguous", _Rope(features=20, batch_tables=True))
    yield from _each("partial", "contiguous", _Rope(features=50, rotary=34))
    yield from _each("positions", "contiguous", _Rope(rows=40, length=19))
    yield _case("positions_of_all", "contiguous", replace(mixed, batch=1, rows=7))
    yield from _each("every_other", "strided", _Rope(memory="strided", table_memory="strided"))
    yield from _each("rows_stride_0", "expanded", _Rope(memory=partial(expanded, dim=2), table_memory="expanded"))
    yield from _each("heads_stride_0", "expanded", _Rope(heads=(3, 2), memory=partial(expanded, dim=1)))
    yield from _each("unaligned", "offset", _Rope(features=34, memory="offset", table_memory="offset"))
    for batch, heads, length in ((0, (3, 1), 5), (2, (3, 1), 0), (2, (0, 2), 4)):
        empty = _Rope(batch, heads, length, 6)
        yield from _each(f"{batch}x{heads[0]}x{length}", "empty", empty, bites=heads[0] == 0)
    yield from _each("nothing_turned", "empty", _Rope(rotary=0))
    for features in (2, 4, 6, 8, 14, 16, 18, 30, 32, 34, 62, 66):
        yield from _each(f"features_{features}", "tail", _Rope(length=3, features=features))
    for rotary in (2, 16, 30):
        yield from _each(f"partial_{rotary}", "tail", _Rope(length=3, features=33, rotary=rotary, half_tables=True))
    yield from _each("rows_apart", "padded_rows", _Rope(memory="padded_rows", table_memory="padded_rows"))
    yield from _each("features_apart", "transposed", _Rope(memory="transposed", table_memory="transposed"))
    yield from _each("by_positions", "leading_dims", _Rope(length=19, memory=_by_positions))
    yield from _each("heads_last", "leading_dims", _Rope(length=19, heads_dim=2))
    yield from _each("heads_last_by_heads", "leading_dims", _Rope(heads_dim=2, memory=_by_positions))
    yield from _each("one_token", "one_row", _Rope(batch=1, length=1, features=64, rows=9))
    yield from _each("one_head", "one_row", _Rope(batch=1, heads=(1, 1), length=33))
    large = _Rope(features=40)
    yield from _each("large", "large_magnitude", large)
    for interleaved in (False, True):
        call = replace(large, interleaved=interleaved)
        yield _case("huge", "large_magnitude", call, make=partial(_large, call), bites=False)
        yield _case("specials", "nonfinite", call, make=partial(_nonfinite, call), bites=False)


def _wide_cases() -> Iterator[Case]:
    for features in (10, 20, 64, 80, 96, 128, 256):
        yield from _each(f"wide_{features}", "tail", _Rope(length=17, features=features), wide=True)
    yield from _each("wide_blocks", "contiguous", _Rope(heads=(5, 2), length=67, features=32, rows=99), wide=True)
    # Past the caches: 8 MB and more.
    streamed = _Rope(batch=1, heads=(8, 4), length=1100, features=128)
    yield from _each("wide_streamed", "contiguous", replace(streamed, memory=_by_positions), wide=True)
    yield from _each("wide_streamed_partial", "contiguous", replace(streamed, rotary=64), wide=True)
    yield from _each("wide_rows_apart", "padded_rows", _Rope(length=40, features=66, memory="padded_rows"), wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (2, 3, 5, 8), **options)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("rope", name, call, error, ("fastnn.rope", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, t, at = _x(), _x(5, 8), torch.arange(5)
    half = torch.float16
    yield _public("query_list", lambda: rope([1.0], x, t, t), TypeError, "query", "list")
    yield _public("query_integer", lambda: rope(x.int(), x, t, t), TypeError, "query", "int32")
    yield _public("query_sparse", lambda: rope(x.to_sparse(), x, t, t), TypeError, "query", "sparse")
    yield _public("query_2d", lambda: rope(t, None, t, t), ValueError, "query", "(5, 8)")
    yield _public("query_5d", lambda: rope(x[None], None, t, t), ValueError, "query", "(1, 2, 3, 5, 8)")
    yield _public("key_list", lambda: rope(x, [1.0], t, t), TypeError, "key", "list")
    yield _public("key_half", lambda: rope(x, x.to(half), t, t), TypeError, "key", "float16", "float32")
    yield _public("key_length", lambda: rope(x, _x(2, 3, 4, 8), t, t), ValueError, "key", "(2, 3, 4, 8)")
    yield _public("key_features", lambda: rope(x, _x(2, 3, 5, 6), t, t), ValueError, "key", "(2, 3, 5, 6)")
    yield _public("key_3d", lambda: rope(x, _x(3, 5, 8), t, t), ValueError, "key", "(3, 5, 8)")
    yield _public("key_4d", lambda: rope(x[0], x, t, t, 0), ValueError, "key", "(2, 3, 5, 8)")
    yield _public("key_device", lambda: rope(x, x.to("meta"), t, t), ValueError, "key", "meta", "cpu")
    yield _public("cos_none", lambda: rope(x, x, None, t), TypeError, "cos", "NoneType")
    yield _public("cos_integer", lambda: rope(x, x, t.int(), t), TypeError, "cos", "int32")
    yield _public("cos_1d", lambda: rope(x, x, _x(8), _x(8)), ValueError, "cos", "(8,)")
    yield _public("cos_rows", lambda: rope(x, x, _x(4, 8), _x(4, 8)), ValueError, "cos", "(4, 8)")
    yield _public("cos_batch", lambda: rope(x, x, _x(3, 5, 8), _x(3, 5, 8)), ValueError, "cos", "(3, 5, 8)")
    yield _public("cos_width", lambda: rope(x, x, t, t, rotary_dim=6), ValueError, "cos", "6", "(5, 8)")
    yield _public("cos_wide", lambda: rope(x, x, _x(5, 10), _x(5, 10)), ValueError, "rotary_dim", "10")
    yield _public("cos_odd", lambda: rope(x, x, _x(5, 3), _x(5, 3)), ValueError, "rotary_dim", "3")
    yield _public("cos_narrow", lambda: rope(x, x, _x(5, 4), _x(5, 4)), ValueError, "rotary_dim", "4", "8")
    yield _public("sin_shape", lambda: rope(x, x, t, _x(1, 8)), ValueError, "sin", "(5, 8)", "(1, 8)")
    yield _public("sin_device", lambda: rope(x, x, t, t.to("meta")), ValueError, "sin", "meta")
    yield _public("unsqueeze_dim_0", lambda: rope(x, x, t, t, 0), ValueError, "unsqueeze_dim", "0")
    yield _public("unsqueeze_dim_3", lambda: rope(x, x, t, t, 3), ValueError, "unsqueeze_dim", "3")
    yield _public("unsqueeze_dim_text", lambda: rope(x, x, t, t, "1"), TypeError, "unsqueeze_dim", "str")
    yield _public("positions_list", lambda: rope(x, x, t, t, positions=[0]), TypeError, "positions", "list")
    yield _public("positions_float", lambda: rope(x, x, t, t, positions=at.float()), TypeError, "positions", "float32")
    yield _public("positions_length", lambda: rope(x, x, t, t, positions=at[:4]), ValueError, "positions", "(4,)")
    yield _public("positions_and_batch", lambda: rope(x, x, t[None], t[None], positions=at), ValueError, "cos")
    yield InvalidCall(
        "rope", "positions_high", lambda: rope(x, x, t, t, positions=at + 1), IndexError, ()
    )  # torch's own words on the reference
    yield InvalidCall("rope", "positions_negative", lambda: rope(x, x, t, t, positions=at - 1), IndexError, ())
    yield _public("rotary_odd", lambda: rope(x, x, t, t, rotary_dim=7), ValueError, "rotary_dim", "7")
    yield _public("rotary_negative", lambda: rope(x, x, t, t, rotary_dim=-2), ValueError, "rotary_dim", "-2")
    yield _public("rotary_text", lambda: rope(x, x, t, t, rotary_dim="8"), TypeError, "rotary_dim", "str")
    yield _public("interleaved_int", lambda: rope(x, x, t, t, interleaved=1), TypeError, "interleaved", "int")
    yield InvalidCall("rope", "tables_odd", lambda: rope_tables(4, 7), ValueError, ("fastnn.rope_tables", "7"))
    yield InvalidCall("rope", "tables_theta", lambda: rope_tables(4, 8, 0.0), ValueError, ("theta", "0.0"))


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("rope", name, call, error, ("rope", *words), raw=True)


def _fwd(**given: Any) -> object:
    right = {"query": _x(), "key": _x(), "cos": _x(5, 8), "sin": _x(5, 8), "positions": None}
    more = {"rotary_dim": 8, "interleaved": False, "heads_dim": 1, "grad_handled": True}
    return torch.ops.fastnn.rope_fwd(*{**right, **more, **given}.values())


def _bwd(**given: Any) -> object:
    right = {"query": _x(), "key": _x(), "cos": _x(5, 8), "sin": _x(5, 8), "positions": None}
    more = {"rotary_dim": 8, "interleaved": False, "heads_dim": 1, "inside": [True, False], "grad_handled": True}
    return torch.ops.fastnn.rope_bwd(*{**right, **more, **given}.values())


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    half, at = torch.float16, torch.arange(5)
    shared: Sequence[tuple[str, dict[str, Any], Any, tuple[str, ...]]] = (
        ("float64", {"query": _x(dtype=torch.float64)}, _TYPES, ("query", "float64")),
        ("query_3d", {"query": _x(3, 5, 8)}, ValueError, ("(3, 5, 8)",)),
        ("key_half", {"key": _x(dtype=half)}, _TYPES, ("key", "float16")),
        ("key_batch", {"key": _x(1, 3, 5, 8)}, ValueError, ("key", "(1, 3, 5, 8)")),
        ("key_rank", {"key": _x(240)}, ValueError, ("key", "(240,)")),
        ("heads_dim", {"heads_dim": 3}, ValueError, ("heads_dim", "3")),
        ("rotary_odd", {"rotary_dim": 3}, ValueError, ("rotary_dim", "3")),
        ("rotary_high", {"rotary_dim": 2**40}, ValueError, ("rotary_dim",)),
        ("rotary_negative", {"rotary_dim": -2}, ValueError, ("rotary_dim", "-2")),
        ("cos_1d", {"cos": _x(8)}, ValueError, ("cos", "(8,)")),
        ("cos_rows", {"cos": _x(4, 8)}, ValueError, ("cos", "(4, 8)")),
        ("cos_width", {"cos": _x(5, 6)}, ValueError, ("cos", "(5, 6)")),
        ("sin_rows", {"sin": _x(6, 8)}, ValueError, ("sin", "(6, 8)")),
        ("sin_half_width", {"sin": _x(5, 4)}, ValueError, ("sin", "(5, 4)")),
        ("sin_half", {"sin": _x(5, 8, dtype=half)}, _TYPES, ("sin", "float16")),
        ("positions_int", {"positions": at.int()}, _TYPES, ("positions", "int32")),
        ("positions_short", {"positions": at[:4]}, ValueError, ("positions", "(4,)")),
        ("positions_high", {"positions": at + 1}, IndexError, ("positions", "[0, 4]", "5")),
        ("positions_negative", {"positions": at - 1}, IndexError, ("positions", "-1")),
        ("positions_rows", {"positions": at, "sin": _x(4, 8)}, ValueError, ("sin", "(4, 8)")),
    )
    for side, call in (("fwd", _fwd), ("bwd", _bwd)):
        for name, given, error, words in shared:
            yield _raw(f"{side}_{name}", partial(call, **given), error, side, *words)
    yield _raw("bwd_no_gradient", lambda: _bwd(query=None, key=None), ValueError, "gradient")
    yield _raw("bwd_inside", lambda: _bwd(inside=[True]), Exception)
    yield _raw(
        "fwd_wants_gradient",
        lambda: _fwd(query=_x(requires_grad=True), grad_handled=False),
        RuntimeError,
        "rope_fwd",
        "grad",
    )


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
