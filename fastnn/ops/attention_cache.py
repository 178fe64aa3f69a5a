"""Decoding: attention of new queries to keys and values that are kept."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .attention import AttentionOptions, attention_reference, check_tensor, read_options
from .autocast import cast
from .kv_cache import KVCache, append_rows, check_new, refuse_gradients

WHERE = "fastnn.attention_with_kv_cache"


def attention_cache_fwd_fake(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """What `attention_cache_fwd` gives, without its values."""
    b, h, s, _ = query.shape
    d = value_cache.shape[3]
    by_rows = query.stride(1) < query.stride(2)
    out = query.new_empty((b, s, h, d)).transpose(1, 2) if by_rows else query.new_empty((b, h, s, d))
    return out, query.new_empty((b, h, s), dtype=torch.float32)


if _extension._C is not None:
    _library = torch.ops.fastnn
    # The pair of this op: what writes the cache stands where others have backward.
    _dispatch.register(
        "attention_cache",
        "cpu",
        _dispatch.Kernels(_library.attention_cache_fwd.default, _library.attention_cache_append.default),
    )
    torch.library.register_fake("fastnn::attention_cache_fwd", attention_cache_fwd_fake, lib=_extension.library)


def attention_cache_reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """`attention_reference` sequence by sequence on the filled rows, aligned at the bottom right."""
    pairs = []
    for b, length in enumerate(lengths.tolist()):
        k, v = key_cache[b : b + 1, :, :length], value_cache[b : b + 1, :, :length]
        pairs.append(attention_reference(query[b : b + 1], k, v, None, None, options, length - query.shape[2]))
    if not pairs:
        return query.new_empty((*query.shape[:3], value_cache.shape[3])), query.new_empty(query.shape[:3]).float()
    return torch.cat([out for out, _ in pairs]), torch.cat([lse for _, lse in pairs])


def _check_caches(keys: object, values: object) -> None:
    for name, cache in (("key cache", keys), ("value cache", values)):
        if not isinstance(cache, Tensor):
            raise TypeError(f"{WHERE}: {name} must be a Tensor, got {type(cache).__name__}")
        if cache.dim() != 4:
            raise ValueError(
                f"{WHERE}: {name} must be (batch, kv_heads, capacity, features), got shape {tuple(cache.shape)}"
            )
    check_tensor("value cache", values, keys, WHERE)  # type: ignore[arg-type]
    if keys.shape[:3] != values.shape[:3]:  # type: ignore[attr-defined]
        raise ValueError(
            f"{WHERE}: key and value cache must have the same batch, heads and capacity; got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"  # type: ignore[attr-defined]
        )


def _read_lengths(lengths: object, batch: int) -> Tensor:
    if isinstance(lengths, int) and not isinstance(lengths, bool):
        return torch.full((batch,), lengths, dtype=torch.int64)
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{WHERE}: lengths must be an int or an int64 Tensor, got {got}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"{WHERE}: lengths must be ({batch},), got shape {tuple(lengths.shape)}")
    return lengths.to("cpu", torch.int64).contiguous()


@overload
def attention_with_kv_cache(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache: KVCache | tuple[Tensor, Tensor],
    *,
    lengths: Tensor | int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention_with_kv_cache(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache: KVCache | tuple[Tensor, Tensor],
    *,
    lengths: Tensor | int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention_with_kv_cache(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    cache: KVCache | tuple[Tensor, Tensor],
    *,
    lengths: Tensor | int | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Puts key and value behind the cached ones and attends to all of them: a step of decoding, or a prompt.

    Few queries read each key head once for all query heads that share it, in address order, and the keys are split
    among the threads where there are few heads (Flash-Decoding, Dao et al. 2023); where they are split depends on the
    sizes alone, so that the bits do not depend on the number of threads.

    **Alignment** is at the bottom right, for each sequence by itself: the last query stands at the last key, query i
    of n at key L + i - n of L. (`scaled_dot_product_attention` aligns at the top left.) Forward only.

    Args:
        query: (B, H, n, D) of the cache's type, n queries for each sequence.
        key: (B, H_kv, n_k, D), H a multiple of H_kv; or None, with value: nothing is appended.
        value: (B, H_kv, n_k, D_v).
        cache: a `KVCache`, whose lengths grow by n_k; or (key_cache, value_cache), tensors (B, H_kv, capacity, D and
            D_v) with features next to each other, which are written in place.
        lengths: beside tensors, the rows that each sequence had before: (B,) int32 or int64, or one int for all. It is
            not changed: the next call's are n_k more.
        is_causal: a query sees keys up to where it stands; otherwise all L of its sequence.
        scale: of the scores, default 1 / sqrt(D).
        window: (left, right): a query sees so many keys before and after where it stands; -1 for no limit.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        return_lse: also return the logsumexp of each query's scores, (B, H, n) float32, +inf where it sees no key.

    Under autocast, query, key and value take the cache's type.

    Returns:
        (B, H, n, D_v), laid out as query is; zeros for a query that sees no key.

    Raises:
        TypeError: tensors of a wrong type.
        ValueError: shapes, lengths or options that do not fit; no room in the cache (and nothing is written then).
        RuntimeError: a tensor requires a gradient.
        NotImplementedError: a forced backend cannot run the call.
    """
    if isinstance(cache, KVCache):
        keys, values = cache.keys, cache.values
        if lengths is not None:
            raise ValueError(f"{WHERE}: lengths goes with a pair of tensors; a KVCache has its own")
    elif isinstance(cache, (tuple, list)) and len(cache) == 2:
        keys, values = cache
        _check_caches(keys, values)
        if lengths is None:
            raise ValueError(f"{WHERE}: beside a pair of tensors, lengths must be given")
        before = _read_lengths(lengths, keys.shape[0])
    else:
        raise TypeError(f"{WHERE}: cache must be a KVCache or (key_cache, value_cache), got {type(cache).__name__}")
    if isinstance(query, Tensor) and autocast.active(query):
        query, key, value = cast(query, keys.dtype), cast(key, keys.dtype), cast(value, keys.dtype)
    _check_query(query, keys)
    options = read_options(query, 0.0, is_causal, scale, window, softcap, WHERE)
    if (key is None) != (value is None):
        raise ValueError(f"{WHERE}: key and value must both be given, or neither")
    if key is not None and value is not None:
        check_new(key, value, keys, values, WHERE)
        if isinstance(cache, KVCache):
            cache._append(key, value)
        else:
            append_rows(key, value, keys, values, before)
            before = before + key.shape[2]
    if isinstance(cache, KVCache):
        keys, values, before = cache.keys, cache.values, cache.lengths
    out, lse = _attend(query, keys, values, before, options)
    return (out, lse) if return_lse else out


def _check_query(query: Tensor, keys: Tensor) -> None:
    check_tensor("query", query, keys, WHERE)
    b, h, _, d = keys.shape
    if query.dim() != 4 or query.shape[0] != b or query.shape[3] != d:
        raise ValueError(f"{WHERE}: query must be ({b}, heads, length, {d}), as the cache is; got {tuple(query.shape)}")
    if query.shape[1] % h if h else query.shape[1]:
        raise ValueError(f"{WHERE}: query's heads must be a multiple of the cache's, got {query.shape[1]} and {h}")
    refuse_gradients(WHERE, query)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    backend = _dispatch.pick("attention_cache", query)
    if backend == "reference":
        note_reference("attention_cache_fwd")
        return attention_cache_reference(query, keys, values, lengths, options)
    found: tuple[Tensor, Tensor] = _dispatch.KERNELS["attention_cache"][backend].fwd(
        query, keys, values, lengths, *options[1:], True
    )
    return found
