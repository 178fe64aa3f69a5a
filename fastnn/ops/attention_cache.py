"""Decoding: attention of new queries to keys and values that are kept, and the memory that keeps them."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .attention import AttentionOptions, attention_reference, check_tensor, read_options
from .autocast import cast

WHERE = "fastnn.attention_with_kv_cache"
CACHE = "fastnn.KVCache"


def attention_cache_append_fake(*arguments: Any) -> None:
    """What `attention_cache_append` gives: nothing."""


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
    torch.library.register_fake("fastnn::attention_cache_append", attention_cache_append_fake, lib=_extension.library)
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


def _append_reference(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    more, capacity = key.shape[2], key_cache.shape[2]
    firsts = lengths.tolist()
    for b, first in enumerate(firsts):
        if not 0 <= first <= capacity - more:
            raise ValueError(
                f"{WHERE}: the cache has room for {capacity} rows; sequence {b} has {first} and {more} more are given"
            )
    for b, first in enumerate(firsts):
        key_cache[b, :, first : first + more] = key[b]
        value_cache[b, :, first : first + more] = value[b]


def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On huge pages where the extension is there and the device is the CPU."""
    if device.type != "cpu" or _extension._C is None:
        return torch.empty(shape, dtype=dtype, device=device)
    flat = torch.from_numpy(_extension._C.keep_memory(math.prod(shape) * dtype.itemsize))
    return flat.view(dtype).view(shape)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class KVCache:
    """Keys and values of sequences that grow: (batch, kv_heads, capacity, head_dim), each sequence of its own length.

    On the CPU the memory lies on huge pages (1.5 times the read bandwidth of malloc's on Linux) and is 64-byte
    aligned. Rows beyond a sequence's length hold nothing. Not for several threads at once.

    Args:
        batch: sequences.
        kv_heads: key heads of each; query heads share them in groups.
        capacity: rows that each sequence has room for.
        head_dim: features of a key.
        value_dim: features of a value; as `head_dim` unless given.
        dtype: float32, bfloat16, float16 (float64 runs on the reference).
        device: default the CPU; elsewhere memory is torch's and attention runs on the reference.
        grow: where there is no room, at least double the capacity and copy, instead of raising ValueError.

    Raises:
        TypeError, ValueError: arguments that are no sizes, or no floating-point type.
        MemoryError: no memory.

    Example:
        >>> cache = fastnn.KVCache(1, 2, 100, 64)
        >>> q, k, v = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
        >>> fastnn.attention_with_kv_cache(q, k, v, cache).shape, cache.lengths.tolist()
        (torch.Size([1, 8, 5, 64]), [5])
    """

    keys: Tensor
    """(batch, kv_heads, capacity, head_dim); rows from `lengths[b]` on hold nothing."""
    values: Tensor
    """(batch, kv_heads, capacity, value_dim)."""
    lengths: Tensor
    """(batch,) int64 on the CPU: rows that each sequence has. Change it by the methods."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        grow: bool = False,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch": batch, "kv_heads": kv_heads, "capacity": capacity, "head_dim": head_dim}
        for name, size in (sizes | {"value_dim": value_dim}).items():
            if not _is_count(size):
                raise (ValueError if isinstance(size, int) else TypeError)(
                    f"{CACHE}: {name} must be an int of 0 or more, got {size!r}"
                )
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"{CACHE}: dtype must be a floating-point type, got {dtype}")
        self.grow = grow
        self._allocate(batch, kv_heads, capacity, head_dim, value_dim, dtype, torch.device(device))
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def _allocate(
        self, batch: int, heads: int, capacity: int, d: int, d_v: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = _memory((batch, heads, capacity, d), dtype, device)
        self.values = _memory((batch, heads, capacity, d_v), dtype, device)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.keys.shape[0]

    @property
    def capacity(self) -> int:
        """Rows that each sequence has room for."""
        return self.keys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, filled or not."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def longest(self) -> int:
        """Rows of the longest sequence."""
        return int(self.lengths.max()) if self.batch else 0

    def __repr__(self) -> str:
        b, h, capacity, d = self.keys.shape
        grows = ", grow=True" if self.grow else ""
        return f"KVCache({b}, {h}, {capacity}, {d}, dtype={self.dtype}{grows}, lengths={self.lengths.tolist()})"

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` rows at least: new memory and a copy of what is there, where there is less."""
        if not _is_count(capacity):
            raise ValueError(f"{CACHE}.reserve: capacity must be an int of 0 or more, got {capacity!r}")
        if capacity > self.capacity:
            self._move(torch.arange(self.batch), capacity)

    def _move(self, index: Tensor, capacity: int) -> None:
        """Sequences `index` in new memory."""
        keys, values, filled = self.keys, self.values, self.longest
        self._allocate(len(index), keys.shape[1], capacity, keys.shape[3], values.shape[3], keys.dtype, keys.device)
        index = index.to(keys.device)
        self.keys[:, :, :filled] = keys[:, :, :filled].index_select(0, index)
        self.values[:, :, :filled] = values[:, :, :filled].index_select(0, index)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Puts key and value, (batch, kv_heads, n, features), behind each sequence.

        Raises TypeError, ValueError: shapes, types or devices that do not fit; no room (unless the cache grows).
        RuntimeError: they require a gradient, which a cache does not carry.
        """
        _check_new(key, value, self.keys, self.values, f"{CACHE}.append")
        self._append(key, value)

    def _append(self, key: Tensor, value: Tensor) -> None:
        more = key.shape[2]
        if self.grow and self.longest + more > self.capacity:
            self.reserve(max(2 * self.capacity, self.longest + more))
        _append(key, value, self.keys, self.values, self.lengths)
        self.lengths += more

    def truncate(self, lengths: int | Tensor) -> None:
        """Forgets the rows from `lengths` on: of every sequence, or (batch,) of each; a shorter one stays as it is.

        After a padded prompt, `truncate(prompt_lengths)` drops the padding; after rejected guesses, the guesses.
        """
        if isinstance(lengths, Tensor):
            if lengths.dtype not in (torch.int32, torch.int64) or tuple(lengths.shape) != (self.batch,):
                raise ValueError(
                    f"{CACHE}.truncate: lengths must be an int or ({self.batch},) int64, got {lengths.dtype} "
                    f"{tuple(lengths.shape)}"
                )
            lengths = lengths.to("cpu", torch.int64)
            lowest = int(lengths.min()) if self.batch else 0
        elif isinstance(lengths, int) and not isinstance(lengths, bool):
            lowest, lengths = lengths, torch.tensor(lengths)
        else:
            raise TypeError(f"{CACHE}.truncate: lengths must be an int or a Tensor, got {type(lengths).__name__}")
        if lowest < 0:
            raise ValueError(f"{CACHE}.truncate: lengths must be 0 or more, got {lowest}")
        self.lengths = torch.minimum(self.lengths, lengths)

    def reset(self) -> None:
        """Forgets all rows; the memory stays."""
        self.lengths = torch.zeros_like(self.lengths)

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes what sequence index[i] was: beams that go on, are doubled or dropped.

        `index` is (n,) of int64, each in 0 .. batch - 1; n other than the batch changes the batch, in new memory.

        Raises TypeError, ValueError, IndexError.
        """
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{CACHE}.reorder: index must be an int64 Tensor, got {getattr(index, 'dtype', index)}")
        if index.dim() != 1:
            raise ValueError(f"{CACHE}.reorder: index must be (n,), got shape {tuple(index.shape)}")
        index = index.to("cpu", torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.batch:
            raise IndexError(f"{CACHE}.reorder: index must be in 0 .. {self.batch - 1}, got {index.tolist()}")
        if len(index) != self.batch:
            self._move(index, self.capacity)
        else:
            moved = (index != torch.arange(self.batch)).nonzero()[:, 0]
            filled = self.longest
            for kept in (self.keys, self.values):
                at, source = moved.to(kept.device), index[moved].to(kept.device)
                kept[at, :, :filled] = kept[source, :, :filled]
        self.lengths = self.lengths[index]


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


def _check_new(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, where: str) -> None:
    b, h, _, d = keys.shape
    for name, tensor, features in (("key", key, d), ("value", value, values.shape[3])):
        check_tensor(name, tensor, keys, where)
        if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != (b, h, features):
            raise ValueError(
                f"{where}: {name} must be ({b}, {h}, length, {features}), as the cache is; got {tuple(tensor.shape)}"
            )
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"{where}: key and value must have one length, got {key.shape[2]} and {value.shape[2]}")
    _refuse_gradients(where, key, value)


def _refuse_gradients(where: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{where}: a cache carries no gradients: run it under torch.no_grad(), or train with "
            "fastnn.scaled_dot_product_attention"
        )


def _append(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    backend = _dispatch.pick("attention_cache", keys)
    if backend == "reference":
        note_reference("attention_cache_append")
        _append_reference(key, value, keys, values, lengths)
    else:
        _dispatch.KERNELS["attention_cache"][backend].bwd(key, value, keys, values, lengths, True)


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
        _check_new(key, value, keys, values, WHERE)
        if isinstance(cache, KVCache):
            cache._append(key, value)
        else:
            _append(key, value, keys, values, before)
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
    _refuse_gradients(WHERE, query)


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
