"""The memory that keeps keys and values of sequences that grow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from .attention import check_tensor

CACHE = "fastnn.KVCache"


def attention_cache_append_fake(*arguments: Any) -> None:
    """What `attention_cache_append` gives: nothing."""


if _extension._C is not None:
    torch.library.register_fake("fastnn::attention_cache_append", attention_cache_append_fake, lib=_extension.library)


def _append_reference(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, lengths: Tensor) -> None:
    more, capacity = key.shape[2], key_cache.shape[2]
    firsts = lengths.tolist()
    for b, first in enumerate(firsts):
        if not 0 <= first <= capacity - more:
            raise ValueError(
                f"fastnn.attention_cache_append: the cache has room for {capacity} rows; sequence {b} has {first} and "
                f"{more} more are given"
            )
    for b, first in enumerate(firsts):
        key_cache[b, :, first : first + more] = key[b]
        value_cache[b, :, first : first + more] = value[b]


def append_rows(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Puts key and value behind each sequence's `lengths` rows; ValueError where there is no room."""
    backend = _dispatch.pick("attention_cache", keys)
    if backend == "reference":
        note_reference("attention_cache_append")
        _append_reference(key, value, keys, values, lengths)
    else:
        _dispatch.KERNELS["attention_cache"][backend].bwd(key, value, keys, values, lengths, True)


def check_new(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, where: str) -> None:
    """Whether key and value can be appended to the caches."""
    b, h, _, d = keys.shape
    for name, tensor, features in (("key", key, d), ("value", value, values.shape[3])):
        check_tensor(name, tensor, keys, where)
        if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != (b, h, features):
            raise ValueError(
                f"{where}: {name} must be ({b}, {h}, length, {features}), as the cache is; got {tuple(tensor.shape)}"
            )
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"{where}: key and value must have one length, got {key.shape[2]} and {value.shape[2]}")
    refuse_gradients(where, key, value)


def refuse_gradients(where: str, *tensors: Tensor) -> None:
    """RuntimeError where a gradient would be lost."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{where}: a cache carries no gradients: run it under torch.no_grad(), or train with "
            "fastnn.scaled_dot_product_attention"
        )


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
        self.lengths = torch.zeros(batch, dtype=torch.int64)  # never written in place

    def _allocate(
        self, batch: int, heads: int, capacity: int, d: int, d_v: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        with torch.inference_mode(False):  # a cache may be written to outside of the mode it was made in
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
        check_new(key, value, self.keys, self.values, f"{CACHE}.append")
        self._append(key, value)

    def _append(self, key: Tensor, value: Tensor) -> None:
        more = key.shape[2]
        if self.grow and self.longest + more > self.capacity:
            self.reserve(max(2 * self.capacity, self.longest + more))
        append_rows(key, value, self.keys, self.values, self.lengths)
        self.lengths = self.lengths + more

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
