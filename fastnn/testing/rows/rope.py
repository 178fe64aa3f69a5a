"""Rows of rotary position embedding: the public ones, and a sweep of batches, heads, lengths and features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops.rope import rope, rope_tables
from ..bench_cases import Bar, BenchCase, Direction, Ours, Results, Work, as_results, forward_backward
from ..cases import DTYPES, Inputs

Shape = tuple[int, int, int, int]
"""(batch, heads, length, features)."""

_PUBLIC: dict[tuple[Direction, str], Bar] = {
    ("fwd", "fp32"): Bar(17.0, 4.2, holder="compile"),
    ("fwd", "bf16"): Bar(7.1, holder="compile"),
}
"""The rows of the performance page, at (1, 32, 2048, 128), with their bars."""

_GROUP = 4
"""Query heads for each key head of `rope_qk`."""
_OPERATIONS = 3
"""For each element: a product and a multiply-add."""

_SWEEP: tuple[Shape, ...] = (
    *((batch, 32, 1, 128) for batch in (1, 8, 61)),
    *((1, 12, length, 64) for length in (7, 61, 128, 509, 1024, 2048)),
    *((4, 8, length, features) for length in (16, 127, 512) for features in (32, 64, 80, 96, 128, 256)),
    *((1, heads, 512, features) for heads in (1, 4, 16, 40) for features in (16, 64, 100, 128)),
    *((8, 16, length, 64) for length in (1, 33, 100, 256, 512)),
    *((1, 32, length, 128) for length in (2, 100, 511, 1024)),
    *((2, 71, 131, features) for features in (34, 64)),
)
"""Decoding, prompts and training batches of transformers; lengths and heads of no round number among them."""


def _key_shape(shape: Shape) -> Shape:
    return shape[0], max(shape[1] // _GROUP, 1), shape[2], shape[3]


def _heads(shape: Shape, inside: bool, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of a position side by side in memory where `inside`, as a linear layer gives them."""
    b, h, s, d = shape
    if inside:
        return torch.randn((b, s, h, d), generator=generator).to(dtype).transpose(1, 2)
    return torch.randn(shape, generator=generator).to(dtype)


def _make(kind: str, shape: Shape, direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The tables as Hugging Face's models make them: in the model's type, an entry for each feature."""
    both = kind == "rope_qk"
    found = {"query": _heads(shape, both, dtype, generator)}
    if both:
        found["key"] = _heads(_key_shape(shape), True, dtype, generator)
    for name, table in zip(("cos", "sin"), rope_tables(shape[2], shape[3]), strict=True):
        found[name] = torch.cat((table, table), -1).to(dtype)[None]
    return {**found, "grad": torch.randn(shape, generator=generator).to(dtype)} if direction == "fb" else found


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _torch_call(inputs: Inputs) -> Tensor | Results:
    """As Hugging Face's `apply_rotary_pos_emb`."""
    cos, sin = inputs["cos"].unsqueeze(1), inputs["sin"].unsqueeze(1)
    found = [x * cos + _rotate_half(x) * sin for x in (inputs["query"], inputs.get("key")) if x is not None]
    return found[0] if len(found) == 1 else tuple(found)


def _by_hand(inputs: Inputs) -> Tensor | Results:
    """Half by half into the result, with nothing in between."""
    half = inputs["cos"].shape[-1] // 2
    cos, sin = inputs["cos"].unsqueeze(1)[..., :half], inputs["sin"].unsqueeze(1)[..., :half]
    found = []
    for x in (inputs["query"], inputs.get("key")):
        if x is not None:
            a, b = x.chunk(2, -1)
            y = torch.empty_like(x)
            torch.mul(a, cos, out=y[..., :half]).addcmul_(b, sin, value=-1)
            torch.mul(b, cos, out=y[..., half:]).addcmul_(a, sin)
            found.append(y)
    return found[0] if len(found) == 1 else tuple(found)


def _our_call(inputs: Inputs) -> Results:
    found = rope(inputs["query"], inputs.get("key"), inputs["cos"], inputs["sin"])
    return found[:1] if found[1] is None else (found[0], found[1])


def _prepare(direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    if direction == "fb":
        return lambda: forward_backward(_our_call, ("query",), inputs)
    return lambda: as_results(_our_call(inputs))


def _work(kind: str, shape: Shape, dtype: str, direction: Direction) -> Work:
    size, shapes = DTYPES[dtype].itemsize, [shape, _key_shape(shape)] if kind == "rope_qk" else [shape]
    elements = sum(b * h * s * d for b, h, s, d in shapes)
    passes = 2 if direction == "fb" else 1
    read = passes * (elements + 2 * shape[2] * shape[3])
    return Work(read * size, passes * elements * size, passes * elements * _OPERATIONS)


def _case(kind: str, direction: Direction, dtype: str, shape: Shape, bar: Bar, sweep: bool = False) -> BenchCase:
    backward = direction == "fb"
    return BenchCase(
        family="rope",
        name=f"{kind}_{direction}",
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=_work(kind, shape, dtype, direction),
        make=partial(_make, kind, shape, direction),
        torch_call=_torch_call,
        ours=(Ours("", partial(_prepare, direction), "rope_bwd" if backward else "rope_fwd", bar),),
        wanted=("query",) if backward else (),
        by_hand=None if backward else _by_hand,
        sweep=sweep,
    )


def _cases() -> Iterator[BenchCase]:
    for (direction, dtype), bar in _PUBLIC.items():
        yield _case("rope", direction, dtype, (1, 32, 2048, 128), bar)
    for shape in _SWEEP:
        for dtype in ("fp32", "bf16"):
            yield _case("rope", "fwd", dtype, shape, Bar(), sweep=True)
            yield _case("rope", "fb", dtype, shape, Bar(), sweep=True)
            yield _case("rope_qk", "fwd", dtype, shape, Bar(), sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())
GPU_CASES: tuple[BenchCase, ...] = ()
"""None as long as there are no kernels for GPUs."""
