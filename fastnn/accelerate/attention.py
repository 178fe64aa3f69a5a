"""Attention inside whole models: transformers' attention interface, per instance, and torch's encoder layers."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn
from torch.nn import Module

from .._record import note_reference
from ..nn import MultiheadAttention
from ..ops.attention import scaled_dot_product_attention
from .llama import Rotating
from .report import Patch
from .standin import stand_in

INTERFACE = "fastnn"
"""The name under which transformers knows fastnn's attention."""


def attention_forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on `fastnn.scaled_dot_product_attention`.

    Query (B, H, S_q, D), key and value (B, H_kv, S_k, D); returns ((B, S_q, H, D), None). What this kernel does not
    know (a paged cache, a position bias) goes to transformers' own sdpa function; so does a call with dropout, whose
    mask would otherwise be another one than before, and every random number after it.
    """
    if dropout > 0 or any(options.get(name) is not None for name in ("cache", "position_bias")):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        note_reference("attention_fwd")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    # As transformers' sdpa: a mask has causality in it already, and one query (decoding) sees all keys.
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[-2]:
        attention_mask = attention_mask[..., : key.shape[-2]]
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        causal,
        scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        softcap=options.get("softcap") or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def implementation(module: Module) -> str | None:
    """The attention implementation a transformers attention module looks up in its config; None for other modules."""
    source = sys.modules.get(type(module).__module__)
    config = getattr(module, "config", None)
    if not hasattr(source, "ALL_ATTENTION_FUNCTIONS") or not hasattr(module, "is_causal"):
        return None
    return getattr(config, "_attn_implementation", None)


def transformers_patch(module: Module, rotating: bool) -> Patch:
    """Gives one attention module a config of its own that names fastnn; the model's config stays as it is.

    Args:
        module: the attention module.
        rotating: whether its forward is to rotate queries and keys by fastnn's kernel as well.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, attention_forward)
    config = copy.copy(module.config)
    vars(config)["_attn_implementation_internal"] = INTERFACE
    kind = stand_in(Rotating, type(module)) if rotating else type(module)
    return Patch(module, kind, {"config": config})


def generates(module: Module) -> bool:
    """Whether it is a transformers model whose `generate` makes a cache, for attention that is or may become ours."""
    if not hasattr(type(module), "_prepare_cache_for_generation"):
        return False
    return any(implementation(part) in ("sdpa", INTERFACE) for part in module.modules())


def cache_patch(model: Module) -> Patch | None:
    """Has `generate` keep keys and values in `KVCache`s; None where it does already."""
    from . import cache

    return None if cache.PREPARE in vars(model) else Patch(model, type(model), cache.attributes(model))


def encoder_layer_patch(layer: nn.TransformerEncoderLayer) -> Patch:
    """Takes an encoder layer off torch's inference fast path, which would run past its modules."""
    return Patch(layer, type(layer), {"activation_relu_or_gelu": 0})


def takes_attention(layer: Module) -> bool:
    """Whether an encoder layer's attention is, or may become, fastnn's."""
    return type(getattr(layer, "self_attn", None)) in (nn.MultiheadAttention, MultiheadAttention)
