"""Invalid calls of attention over sequences: end to end, and on a cache; public functions and raw operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.attention_cache import attention_with_kv_cache
from ..ops.attention_varlen import attention_varlen
from ..ops.kv_cache import KVCache
from .cases import InvalidCall

_varlen: Callable[..., object] = attention_varlen  # called wrongly
_cached: Callable[..., object] = attention_with_kv_cache
_new: Callable[..., KVCache] = KVCache
_TYPES = (TypeError, NotImplementedError)


def _ends(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# ---- end to end


def _varlen_call(raw: str, **given: Any) -> object:
    """Right but for what is given: 4 heads on 2, sequences of 2, 0 and 4 queries and of 3, 2 and 2 keys."""
    tensors: dict[str, Any] = {
        "query": torch.ones(6, 4, 8),
        "key": torch.ones(7, 2, 8),
        "value": torch.ones(7, 2, 5),
        "cu_seqlens_q": _ends(0, 2, 2, 6),
        "cu_seqlens_k": _ends(0, 3, 5, 7),
    }
    options = {name: value for name, value in given.items() if name not in tensors}
    tensors |= {name: value for name, value in given.items() if name in tensors}
    if not raw:
        return _varlen(*tensors.values(), **options)
    defaults = {"seed": None, "dropout": 0.0, "scale": 0.5, "softcap": 0.0, "left": -1, "right": -1}
    rest = [options.get(name, default) for name, default in defaults.items()]
    if raw == "fwd":
        return torch.ops.fastnn.attention_varlen_fwd(*tensors.values(), *rest, True)
    result = [options.get("out", torch.ones(6, 4, 5)), options.get("lse", torch.ones(4, 6))]
    grad = options.get("grad", torch.ones(6, 4, 5))
    return torch.ops.fastnn.attention_varlen_bwd(grad, *tensors.values(), rest[0], *result, *rest[1:], True)


def _varlen_shared() -> Iterator[tuple[str, dict[str, Any], Any, tuple[str, ...]]]:
    """What the public function and the raw operators refuse alike."""
    yield "query_4d", {"query": torch.ones(1, 6, 4, 8)}, ValueError, ("query", "(1, 6, 4, 8)")
    yield "key_2d", {"key": torch.ones(7, 8)}, ValueError, ("key", "(7, 8)")
    yield "integers", {"query": torch.ones(6, 4, 8).int()}, _TYPES, ("query", "int32")
    yield "key_half", {"key": torch.ones(7, 2, 8).half()}, _TYPES, ("key", "float16")
    yield "sparse", {"value": torch.ones(7, 2, 5).to_sparse()}, _TYPES, ()
    yield "features", {"key": torch.ones(7, 2, 9)}, ValueError, ("features", "(7, 2, 9)")
    yield "value_rows", {"value": torch.ones(6, 2, 5)}, ValueError, ("rows", "(6, 2, 5)")
    yield "groups", {"key": torch.ones(7, 3, 8), "value": torch.ones(7, 3, 5)}, ValueError, ("heads", "4", "3")
    for name, rows in (("cu_seqlens_q", 6), ("cu_seqlens_k", 7)):
        for why, ends in (
            ("begin", (1, 2, 2, rows)),
            ("fall", (0, 3, 2, rows)),
            ("below", (0, -1, 2, rows)),
            ("short", (0, 2, 2, rows - 1)),
            ("long", (0, 2, 2, rows + 1)),
            ("beyond", (0, 99, 2, rows)),
        ):
            yield f"{name}_{why}", {name: _ends(*ends)}, ValueError, (name,)
            yield f"{name}_{why}_int32", {name: _ends(*ends, dtype=torch.int32)}, ValueError, (name,)
        yield f"{name}_float", {name: torch.tensor([0.0, 2.0, 2.0, rows])}, TypeError, (name, "float32")
        yield f"{name}_empty", {name: _ends()}, ValueError, (name, "(0,)")
        yield f"{name}_2d", {name: _ends(0, 2, 2, rows)[None]}, ValueError, (name, "(1, 4)")
    yield "sequences", {"cu_seqlens_q": _ends(0, 6)}, ValueError, ("sequences", "(2,)", "(4,)")
    yield "softcap", {"softcap": -1.0}, ValueError, ("softcap", "-1")


def _varlen_calls() -> Iterator[InvalidCall]:
    for name, given, error, words in _varlen_shared():
        label = f"varlen_{name}"
        yield InvalidCall("attention", label, partial(_varlen_call, "", **given), error, ("attention_varlen", *words))
        for side in ("fwd", "bwd"):
            call = partial(_varlen_call, side, **given)
            yield InvalidCall("attention", f"{label}_{side}", call, error, ("attention_varlen", *words), raw=True)
    for name, given, error, words in (
        ("dropout", {"dropout_p": 1.0}, ValueError, ("dropout_p",)),
        ("window", {"window": (-2, 0)}, ValueError, ("window", "(-2, 0)")),
        ("bounds_list", {"cu_seqlens_q": [0, 2, 2, 6]}, TypeError, ("cu_seqlens_q", "list")),
        ("bounds_device", {"cu_seqlens_k": _ends(0, 3, 5, 7).to("meta")}, ValueError, ("cu_seqlens_k", "meta")),
        ("query_none", {"query": None}, TypeError, ("query", "NoneType")),
    ):
        call = partial(_varlen_call, "", **given)
        yield InvalidCall("attention", f"varlen_{name}", call, error, ("attention_varlen", *words))
    for name, given, words in (
        ("grad_shape", {"grad": torch.ones(6, 4, 6)}, ("grad", "(6, 4, 6)")),
        ("out_shape", {"out": torch.ones(5, 4, 5)}, ("out", "(5, 4, 5)")),
        ("lse_shape", {"lse": torch.ones(6, 4)}, ("lse", "(6, 4)")),
        ("lse_strided", {"lse": torch.ones(4, 12)[:, ::2]}, ("lse",)),
        ("no_seed", {"dropout": 0.5}, ("seed",)),
        ("raw_window", {"left": -2}, ("window", "-2")),
    ):
        call = partial(_varlen_call, "bwd", **given)
        yield InvalidCall("attention", f"varlen_{name}", call, ValueError, ("attention_varlen_bwd", *words), raw=True)


# ---- on a cache


def _caches(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.ones(2, 2, 9, 8, dtype=dtype), torch.ones(2, 2, 9, 5, dtype=dtype)


def _cached_call(**given: Any) -> object:
    """Right but for what is given: 3 queries of 4 heads on 2, sequences of 4 and 6 rows, room for 9."""
    call: dict[str, Any] = {
        "query": torch.ones(2, 4, 3, 8),
        "key": torch.ones(2, 2, 3, 8),
        "value": torch.ones(2, 2, 3, 5),
        "cache": _caches(),
        "lengths": _ends(4, 6),
    }
    return _cached(**(call | given))


def _room() -> KVCache:
    cache = _new(2, 2, 9, 8, value_dim=5)
    cache.append(torch.ones(2, 2, 6, 8), torch.ones(2, 2, 6, 5))
    return cache


def _public(name: str, given: dict[str, Any], error: Any, *words: str) -> InvalidCall:
    label = ("attention_with_kv_cache", *words)
    return InvalidCall("attention", f"cache_{name}", partial(_cached_call, **given), error, label)


def _with_own(more: int) -> object:
    """A step on a `KVCache`, with so many new rows."""
    return _cached(torch.ones(2, 4, 1, 8), torch.ones(2, 2, more, 8), torch.ones(2, 2, more, 5), _room())


def _wants_gradient(name: str) -> dict[str, Any]:
    shape = {"query": (2, 4, 3, 8), "key": (2, 2, 3, 8), "value": (2, 2, 3, 5)}[name]
    return {name: torch.ones(shape, requires_grad=True)}


def _cached_calls() -> Iterator[InvalidCall]:
    k, v = _caches()
    yield _public("none", {"cache": None}, TypeError, "cache", "NoneType")
    yield _public("one_tensor", {"cache": k}, TypeError, "cache", "Tensor")
    yield _public("of_lists", {"cache": ([1.0], v)}, TypeError, "key cache", "list")
    yield _public("3d", {"cache": (k[0], v)}, ValueError, "key cache", "(2, 9, 8)")
    yield _public("value_capacity", {"cache": (k, v[:, :, :8])}, ValueError, "capacity", "(2, 2, 8, 5)")
    yield _public("value_half", {"cache": (k, v.half())}, TypeError, "value cache", "float16")
    yield _public("no_lengths", {"lengths": None}, ValueError, "lengths")
    yield _public("lengths_beside", {"cache": _room()}, ValueError, "lengths", "KVCache")
    yield _public("lengths_float", {"lengths": torch.ones(2)}, TypeError, "lengths", "float32")
    yield _public("lengths_shape", {"lengths": _ends(4)}, ValueError, "lengths", "(1,)")
    yield _public("query_half", {"query": torch.ones(2, 4, 3, 8).half()}, TypeError, "query", "float16")
    yield _public("query_features", {"query": torch.ones(2, 4, 3, 7)}, ValueError, "query", "(2, 4, 3, 7)")
    yield _public("query_batch", {"query": torch.ones(3, 4, 3, 8)}, ValueError, "query", "(3, 4, 3, 8)")
    yield _public("query_heads", {"query": torch.ones(2, 3, 3, 8)}, ValueError, "heads", "3", "2")
    yield _public("key_alone", {"value": None}, ValueError, "key", "value")
    yield _public("key_heads", {"key": torch.ones(2, 4, 3, 8)}, ValueError, "key", "(2, 4, 3, 8)")
    yield _public("value_length", {"value": torch.ones(2, 2, 2, 5)}, ValueError, "value", "2")
    yield _public("window", {"window": (0, -2)}, ValueError, "window")
    yield _public("softcap", {"softcap": -2.0}, ValueError, "softcap", "-2")
    for name in ("query", "key", "value"):
        yield _public(f"{name}_gradient", _wants_gradient(name), RuntimeError, "gradient")
    full = ("room for 9", "sequence 1 has 7")
    yield InvalidCall("attention", "cache_full", partial(_cached_call, lengths=_ends(4, 7)), ValueError, full)
    yield InvalidCall("attention", "cache_below", partial(_cached_call, lengths=_ends(-1, 6)), ValueError, ("has -1",))
    yield InvalidCall("attention", "cache_own_full", partial(_with_own, 4), ValueError, ("room for 9", "has 6"))


def _method_calls() -> Iterator[InvalidCall]:
    for name, call, error, words in (
        ("batch", lambda: _new(-1, 2, 9, 8), ValueError, ("batch", "-1")),
        ("capacity", lambda: _new(2, 2, 9.0, 8), TypeError, ("capacity", "9.0")),
        ("dtype", lambda: _new(2, 2, 9, 8, dtype=torch.int8), TypeError, ("dtype", "int8")),
        ("append_shape", lambda: _room().append(torch.ones(2, 2, 1, 7), torch.ones(2, 2, 1, 5)), ValueError, ("key",)),
        ("truncate_below", lambda: _room().truncate(-1), ValueError, ("truncate", "-1")),
        ("truncate_shape", lambda: _room().truncate(_ends(1)), ValueError, ("truncate", "(1,)")),
        ("truncate_type", lambda: _room().truncate(1.5), TypeError, ("truncate", "float")),  # type: ignore[arg-type]
        ("reorder_beyond", lambda: _room().reorder(_ends(0, 2)), IndexError, ("reorder", "[0, 2]")),
        ("reorder_below", lambda: _room().reorder(_ends(-1, 0)), IndexError, ("reorder", "[-1, 0]")),
        ("reorder_float", lambda: _room().reorder(torch.ones(2)), TypeError, ("reorder", "float32")),
        ("reorder_2d", lambda: _room().reorder(_ends(0, 1)[None]), ValueError, ("reorder", "(1, 2)")),
        ("reserve", lambda: _room().reserve(-3), ValueError, ("reserve", "-3")),
    ):
        yield InvalidCall("attention", f"kv_{name}", call, error, ("KVCache", *words))


def _raw_append(**given: Any) -> object:
    k, v = _caches()
    call = {"key": torch.ones(2, 2, 3, 8), "value": torch.ones(2, 2, 3, 5), "k": k, "v": v, "lengths": _ends(4, 6)}
    return torch.ops.fastnn.attention_cache_append(*(call | given).values(), True)


def _raw_attend(**given: Any) -> object:
    k, v = _caches()
    call: dict[str, Any] = {"query": torch.ones(2, 4, 3, 8), "k": k, "v": v, "lengths": _ends(4, 6)}
    call |= {"scale": 0.5, "softcap": 0.0, "left": -1, "right": 0}
    return torch.ops.fastnn.attention_cache_fwd(*(call | given).values(), True)


def _raw_calls() -> Iterator[InvalidCall]:
    k, v = _caches()
    for side, raw in (("append", _raw_append), ("fwd", _raw_attend)):
        for name, given, error, words in (
            ("k_3d", {"k": k[0]}, ValueError, ("key_cache", "(2, 9, 8)")),
            ("k_strided", {"k": torch.ones(2, 2, 9, 16)[..., ::2]}, ValueError, ("key_cache", "next to each other")),
            ("v_capacity", {"v": v[:, :, :8]}, ValueError, ("value_cache", "(2, 2, 8, 5)")),
            ("v_heads", {"v": v[:, :1]}, ValueError, ("value_cache", "(2, 1, 9, 5)")),
            ("v_half", {"v": v.half()}, _TYPES, ("value_cache", "float16")),
            ("lengths_int32", {"lengths": _ends(4, 6).int()}, _TYPES, ("lengths", "int32")),
            ("lengths_shape", {"lengths": _ends(4)}, ValueError, ("lengths", "(1,)")),
            ("lengths_strided", {"lengths": _ends(4, 0, 6, 0)[::2]}, ValueError, ("lengths",)),
            ("lengths_beyond", {"lengths": _ends(4, 10)}, ValueError, ("sequence 1", "10")),
            ("lengths_huge", {"lengths": _ends(2**62, 1)}, ValueError, ("sequence 0",)),
            ("lengths_below", {"lengths": _ends(-(2**63), 4)}, ValueError, ("sequence 0",)),
        ):
            call = partial(raw, **given)
            yield InvalidCall("attention", f"cache_{side}_{name}", call, error, words, raw=True)
    for name, given, words in (
        ("key", {"key": torch.ones(2, 2, 3, 7)}, ("key", "(2, 2, 3, 7)")),
        ("value", {"value": torch.ones(2, 2, 2, 5)}, ("value", "(2, 2, 2, 5)")),
        ("expanded", {"k": torch.ones(2, 2, 1, 8).expand(2, 2, 9, 8)}, ("expanded",)),
        ("full", {"lengths": _ends(4, 7)}, ("room for 9",)),
    ):
        call = partial(_raw_append, **given)
        yield InvalidCall("attention", f"cache_append_{name}", call, ValueError, words, raw=True)
    wrong: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
        ("query", {"query": torch.ones(2, 4, 3, 7)}, ("query", "(2, 4, 3, 7)")),
        ("groups", {"query": torch.ones(2, 3, 3, 8)}, ("heads", "3", "2")),
        ("softcap", {"softcap": -1.0}, ("softcap",)),
        ("window", {"left": -5}, ("window", "-5")),
    )
    for name, options, said in wrong:
        call = partial(_raw_attend, **options)
        yield InvalidCall("attention", f"cache_fwd_{name}", call, ValueError, said, raw=True)


INVALID_SEQUENCES: tuple[InvalidCall, ...] = (*_varlen_calls(), *_cached_calls(), *_method_calls(), *_raw_calls())
