"""Cases of attention over sequences of different lengths: end to end (varlen), and on a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import AttentionOptions
from ..ops.attention_cache import attention_cache_reference, attention_with_kv_cache
from ..ops.attention_varlen import attention_varlen, attention_varlen_reference
from ..ops.kv_cache import KVCache
from .cases import Case, Inputs
from .inputs import arrange, fill

_varlen: Callable[..., Tensor] = attention_varlen
_with_cache: Callable[..., Tensor] = attention_with_kv_cache


@dataclass(frozen=True)
class _Options:
    """How a case calls the op."""

    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    window: tuple[int, int] | None = None
    softcap: float = 0.0

    def keywords(self) -> dict[str, Any]:
        return {"is_causal": self.causal, "scale": self.scale, "window": self.window, "softcap": self.softcap}

    def of_kernels(self, features: int) -> AttentionOptions:
        left, right = self.window or (-1, -1)
        scale = 1 / math.sqrt(max(features, 1)) if self.scale is None else self.scale
        return AttentionOptions(self.dropout, scale, self.softcap, left, 0 if self.causal else right)


@dataclass(frozen=True)
class _Varlen:
    """Sequences end to end: their queries and keys."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    options: _Options = _Options()
    d: int = 16
    dv: int = -1
    """As d unless given."""
    h: int = 2
    hk: int = 2
    memory: str = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        dv = self.d if self.dv < 0 else self.dv
        shapes = {
            "query": (sum(self.queries), self.h, self.d),
            "key": (sum(self.keys), self.hk, self.d),
            "value": (sum(self.keys), self.hk, dv),
        }
        found = {name: arrange(fill(shape, dtype, generator), self.memory) for name, shape in shapes.items()}
        ends = {"cu_seqlens_q": self.queries, "cu_seqlens_k": self.keys}
        return {**found, **{name: torch.tensor((0, *lengths)).cumsum(0) for name, lengths in ends.items()}}

    def ours(self, inputs: Inputs) -> Tensor:
        with torch.random.fork_rng(devices=[], enabled=self.options.dropout > 0):
            if self.options.dropout > 0:
                torch.manual_seed(5)
            return _varlen(*inputs.values(), dropout_p=self.options.dropout, **self.options.keywords())

    def reference(self, inputs: Inputs) -> Tensor:
        seed = None
        if self.options.dropout:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                seed = torch.randint(0, 2**62, ())
        query, key, value, bounds_q, bounds_k = inputs.values()
        options = self.options.of_kernels(self.d)
        return attention_varlen_reference(query, key, value, bounds_q, bounds_k, seed, options)[0]

    def case(self, name: str, layout: str, bites: bool = True) -> Case:
        return Case(
            op="attention",
            name=f"varlen_{name}",
            layout=layout,
            make=self.make,
            call=self.ours,
            reference=self.reference,
            forward_kernel="attention_varlen_fwd",
            backward_kernel="attention_varlen_bwd",
            differentiable=("query", "key", "value"),
            bites=bites,
        )


@dataclass(frozen=True)
class _Cached:
    """Queries on a cache: rows that each sequence has before, and how many come."""

    before: tuple[int, ...]
    new: int = 1
    options: _Options = _Options(causal=True)
    d: int = 16
    dv: int = -1
    h: int = 2
    hk: int = 2
    room: int = 3
    """Rows of capacity that stay empty; they hold NaN."""
    memory: str = "contiguous"
    own: bool = False
    """A `KVCache` instead of torch's tensors."""

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        dv, b = self.d if self.dv < 0 else self.dv, len(self.before)
        capacity = max((0, *self.before)) + self.new + self.room
        shapes = {
            "query": (b, self.h, self.new, self.d),
            "key": (b, self.hk, self.new, self.d),
            "value": (b, self.hk, self.new, dv),
            "key_cache": (b, self.hk, capacity, self.d),
            "value_cache": (b, self.hk, capacity, dv),
        }
        found = {name: fill(shape, dtype, generator) for name, shape in shapes.items()}
        for name in ("key_cache", "value_cache"):
            for i, length in enumerate(self.before):
                found[name][i, :, length:] = math.nan
        found = {name: arrange(t, self._memory_of(name)) for name, t in found.items()}
        return {**found, "lengths": torch.tensor(self.before, dtype=torch.int64)}

    def _memory_of(self, name: str) -> str:
        """Caches have their features side by side, and no row twice."""
        cache = name.endswith("cache") and self.memory in ("strided", "expanded")
        return "contiguous" if cache else self.memory

    def ours(self, inputs: Inputs) -> Tensor:
        query, key, value, keys, values, lengths = inputs.values()
        keys, values = _copied(keys), _copied(values)
        if not self.own:
            return _with_cache(query, key, value, (keys, values), lengths=lengths, **self.options.keywords())
        b, h, capacity, d = keys.shape
        cache = KVCache(b, h, capacity, d, value_dim=values.shape[3], dtype=keys.dtype, device=keys.device)
        longest = int(lengths.max())
        cache.append(keys[:, :, :longest], values[:, :, :longest])
        cache.truncate(lengths)
        return _with_cache(query, key, value, cache, **self.options.keywords())

    def reference(self, inputs: Inputs) -> Tensor:
        query, key, value, keys, values, lengths = inputs.values()
        keys, values = keys.clone(), values.clone()
        for b, first in enumerate(lengths.tolist()):
            keys[b, :, first : first + self.new], values[b, :, first : first + self.new] = key[b], value[b]
        return attention_cache_reference(query, keys, values, lengths + self.new, self.options.of_kernels(self.d))[0]

    def case(self, name: str, layout: str, bites: bool = True) -> Case:
        return Case(
            op="attention",
            name=f"cache_{name}",
            layout=layout,
            make=self.make,
            call=self.ours,
            reference=self.reference,
            forward_kernel="attention_cache_fwd",
            bites=bites,
        )


def _copied(t: Tensor) -> Tensor:
    """A copy in the same memory layout: the op writes into it."""
    storage = t.untyped_storage().clone()  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.shape, t.stride())


def varlen_cases() -> Iterator[Case]:
    """Sequences shorter and longer than a tile, empty ones, some that decode, every option."""
    causal = _Options(causal=True)
    here = "contiguous"
    mixed, others = (3, 50, 1, 0, 97), (40, 50, 30, 5, 130)
    yield _Varlen(mixed, others).case("plain", here)
    yield _Varlen(mixed, others, causal).case("causal", here)
    yield _Varlen((60, 9), (40, 9), causal).case("causal_tall", here)
    yield _Varlen((60, 20), (60, 20), causal, h=4, hk=2).case("grouped_causal", here)
    everything = _Options(True, 0.4, 0.2, (40, -1), 3.0)
    yield _Varlen((50, 5, 20), (100, 70, 20), everything, h=4, hk=2, dv=17).case("everything", here)
    yield _Varlen((50, 2), (200, 90), _Options(window=(9, 7))).case("window", here)
    yield _Varlen((20, 3), (24, 30), memory="strided").case("features_2_apart", "strided")
    yield _Varlen((12, 8), (24, 8), memory="expanded").case("rows_stride_0", "expanded", bites=False)
    yield _Varlen((21, 7), (35, 9), d=17, memory="offset").case("unaligned", "offset")
    yield _Varlen((), ()).case("no_sequences", "empty", bites=False)
    yield _Varlen((4, 0, 3), (0, 0, 6)).case("without_keys", "empty")
    yield _Varlen((47, 17, 1), (95, 33, 2), d=9, dv=33).case("47_17_1", "tail")
    yield _Varlen((50, 3), (40, 9), d=0, dv=8).case("without_features", "empty")


def cache_cases() -> Iterator[Case]:
    """Steps of one and of several queries, prompts, sequences of different lengths, keys in parts, every option."""
    here = "contiguous"
    yield _Cached((30, 7, 0)).case("step", here)
    yield _Cached((30, 7), h=6, hk=2, own=True).case("step_grouped", here)
    yield _Cached((30, 30, 300), 4, h=4).case("four", here)
    yield _Cached((70, 0), 50, h=4).case("prompt", here)
    yield _Cached((1100,), 2, d=8, own=True).case("in_parts", here)
    yield _Cached((40, 9), 5, _Options()).case("not_causal", here)
    yield _Cached((1300, 40), 3, _Options(True, 0.4, 0.0, (1100, -1), 3.0), h=4, hk=2, dv=20).case("everything", here)
    yield _Cached((60, 20), 60, _Options(True, 0.4, 0.0, (30, -1), 3.0), h=4, hk=2).case("everything_prompt", here)
    yield _Cached((20, 9), memory="strided").case("features_2_apart", "strided")
    yield _Cached((20, 9), memory="expanded").case("batch_stride_0", "expanded")
    yield _Cached((20, 9), 3, d=17, memory="offset").case("unaligned", "offset")
    yield _Cached(()).case("no_sequences", "empty", bites=False)
    for length, new, d in ((15, 1, 33), (255, 2, 9), (257, 8, 16), (95, 9, 31)):
        yield _Cached((length, length - 7), new, d=d, dv=d + 1).case(f"{length}x{new}x{d}", "tail")
