"""Rows of decoding: one new token for each sequence, from a `KVCache` and from torch's tensors.

Ours puts the new key and value into the cache and attends; torch's contenders find them there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops.attention_cache import attention_with_kv_cache
from ...ops.kv_cache import KVCache
from ..bench_cases import Bar, BenchCase, Ours, Results
from ..cases import Inputs
from .attention import Shape, decode_work, group_as_queries, make, torch_call

_PUBLIC: tuple[tuple[Shape, dict[str, Bar]], ...] = (
    ((8, 16, 16, 2048, 64), {"fp32": Bar(1.7, holder="eager"), "bf16": Bar(11.2, holder="eager")}),
    ((8, 16, 16, 2048, 128), {"fp32": Bar(), "bf16": Bar()}),
    ((8, 32, 8, 2048, 128), {"fp32": Bar(2.3, holder="by_hand"), "bf16": Bar(3.1, holder="by_hand")}),
    ((1, 32, 8, 2048, 128), {"fp32": Bar(5.0, holder="by_hand"), "bf16": Bar(2.8, holder="by_hand")}),
)
"""(B, Hq, Hkv, L, D), L with the new token; the bars of the performance page."""

_GROUPS = ((8, 2, 128), (32, 8, 64), (9, 3, 64), (12, 12, 80), (16, 1, 64))
"""(Hq, Hkv, D) of language models, all heads on one key head among them."""
_SWEEP: tuple[Shape, ...] = tuple(
    (batch, *group[:2], length, group[2])
    for group in _GROUPS
    for batch, length in ((1, 1), (1, 100), (1, 509), (1, 1024), (1, 4096), (1, 8191), (2, 64), (3, 777), (4, 33),
                          (5, 1000), (8, 300), (16, 127))
)  # fmt: skip
"""Lengths and batches between the public rows."""


def _step(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The query, and the last key and value as what is new."""
    last = inputs["key"].shape[2] - 1
    return inputs["query"], inputs["key"][:, :, last:], inputs["value"][:, :, last:]


def _from_cache(inputs: Inputs) -> Callable[[], Results]:
    key, value = inputs["key"], inputs["value"]
    before = key.shape[2] - 1
    cache = KVCache(*key.shape, dtype=key.dtype)
    cache.append(key[:, :, :before], value[:, :, :before])
    new = _step(inputs)

    def step() -> Results:
        cache.lengths.fill_(before)
        return (attention_with_kv_cache(*new, cache),)

    return step


def _from_tensors(inputs: Inputs) -> Callable[[], Results]:
    query, key, value = (t.clone() for t in _step(inputs))
    caches = (inputs["key"], inputs["value"])
    lengths = torch.full((key.shape[0],), caches[0].shape[2] - 1)
    return lambda: (attention_with_kv_cache(query, key, value, caches, lengths=lengths),)


def _case(shape: Shape, dtype: str, bar: Bar, sweep: bool = False) -> BenchCase:
    return BenchCase(
        family="decode",
        name="decode",
        direction="fwd",
        shape=shape,
        dtype=dtype,
        work=decode_work(shape, dtype),
        make=partial(make, "decode", shape),
        torch_call=partial(torch_call, False),
        by_hand=group_as_queries if shape[1] != shape[2] else None,
        ours=(
            Ours("kv_cache", _from_cache, "attention_cache_fwd", bar),
            Ours("tensors", _from_tensors, "attention_cache_fwd"),
        ),
        sweep=sweep,
    )


def _cases() -> Iterator[BenchCase]:
    for shape, bars in _PUBLIC:
        for dtype, bar in bars.items():
            yield _case(shape, dtype, bar)
    for shape in _SWEEP:
        for dtype in ("fp32", "bf16"):
            yield _case(shape, dtype, Bar(), sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

GPU_CASES: tuple[BenchCase, ...] = ()
