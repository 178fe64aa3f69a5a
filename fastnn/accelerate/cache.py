"""The keys and values of transformers models that generate: their own cache classes on `fastnn.KVCache`.

Imported where transformers is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from .. import _dispatch
from ..ops.kv_cache import KVCache

_LEAST_ROWS = 64

PREPARE = "_prepare_cache_for_generation"
"""The method of transformers' generating models that makes a cache for `generate`."""


class KVCacheLayer(DynamicLayer):
    """transformers' growing layer of a cache, whose rows are put behind the last ones instead of copied with them all.

    `keys` and `values` are what they are there: tensors (batch, heads, length, features), views of a `KVCache` that
    doubles where it is full. Whatever else replaces them (`crop`, `reorder_cache`, `batch_select_indices`, ...) is
    noticed by the next `update`. Rows that require a gradient, and tensors that no CPU kernel takes, are concatenated
    as transformers does it.
    """

    keys: Any
    values: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._kept: KVCache | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not _is_kept(key_states, value_states):
            self._kept = None
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        kept = self._kept
        if kept is None or not (_is_front(self.keys, kept.keys) and _is_front(self.values, kept.values)):
            self._kept = kept = self._collect(key_states, value_states)
        else:
            kept.lengths.fill_(self.keys.shape[2])  # fewer than before where it was cropped
        kept.append(key_states, value_states)
        length = kept.longest
        self.keys, self.values = kept.keys[:, :, :length], kept.values[:, :, :length]
        return self.keys, self.values

    def _collect(self, key_states: Tensor, value_states: Tensor) -> KVCache:
        """A cache of what is there, with room for the new rows and more."""
        batch, heads, new, features = key_states.shape
        length = self.get_seq_length()
        kept = KVCache(
            batch,
            heads,
            max(_LEAST_ROWS, 2 * length, length + 2 * new),
            features,
            value_dim=value_states.shape[3],
            dtype=key_states.dtype,
            grow=True,
        )
        if length:
            kept.append(self.keys, self.values)
        return kept


def _is_kept(key: Tensor, value: Tensor) -> bool:
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        return False
    return key.is_cpu and key.dtype in _dispatch.KERNEL_DTYPES and value.dtype == key.dtype


def _is_front(rows: Tensor, memory: Tensor) -> bool:
    """Whether `rows` are the first rows of every sequence in `memory`."""
    return (
        rows.data_ptr() == memory.data_ptr()
        and rows.stride() == memory.stride()
        and rows.dtype == memory.dtype
        and rows.shape[:2] == memory.shape[:2]
    )


def keep(cache: Cache) -> None:
    """Has a `DynamicCache` keep its full-attention layers in `KVCache`s; other caches and layers stay as they are."""
    if isinstance(cache, EncoderDecoderCache):
        keep(cache.self_attention_cache)
    elif type(cache) is DynamicCache and not cache.offloading:
        for layer in cache.layers:
            if type(layer) is DynamicLayer and not layer.is_initialized:
                layer.__class__ = KVCacheLayer
                layer._kept = None
        if cache.layer_class_to_replicate is DynamicLayer:  # layers are made as they are met
            cache.layer_class_to_replicate = KVCacheLayer


class Prepare:
    """Stands in for a model's method of that name: the model's own, and then `keep` on the cache that it made.

    An object and no bound method, so that copies and pickles of the model have it too.
    """

    def __init__(self, model: Module) -> None:
        self.model = model

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """Called by `generate`."""
        given = model_kwargs.get("past_key_values")
        prepare = getattr(type(self.model), PREPARE)
        result = prepare(self.model, generation_config, model_kwargs, *rest, **options)
        made = model_kwargs.get("past_key_values")
        if given is None and isinstance(made, Cache):
            keep(made)
        return result


def attributes(model: Module) -> dict[str, Any]:
    """What a generating model is given so that `generate` keeps its keys and values in `KVCache`s."""
    return {PREPARE: Prepare(model)}
