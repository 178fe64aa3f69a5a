"""Multi-head attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .._record import note_reference
from ..ops.attention import scaled_dot_product_attention
from ..ops.linear import linear


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on fastnn's kernels: same constructor, parameters and `state_dict` keys.

    The kernels run where the attention weights are not asked for (`need_weights=False`) and there is neither `bias_k`
    nor `add_zero_attn`; any other call runs torch's own forward, and `fastnn.record` says so.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query (L, N, E) over key and value (S, N, E), (N, L, E) with `batch_first`, or without N.

        Masks as torch's: boolean True forbids, floating point is added. Returns (output, weights or None).
        """
        plain = need_weights or self.bias_k is not None or self.bias_v is not None or self.add_zero_attn
        if plain or query.is_nested:
            note_reference("attention_fwd")
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise ValueError("fastnn.nn.MultiheadAttention: is_causal is a hint about attn_mask: give the mask as well")
        batched = query.dim() == 3
        query, key, value = self._batch_first(query, key, value)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        causal = is_causal and key_padding_mask is None
        mask = None if causal else self._mask(attn_mask, key_padding_mask, query)
        q, k, v = (self._heads(t) for t in self._project(query, key, value))
        dropout = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        joined = out.transpose(1, 2).reshape(query.shape[0], query.shape[1], self.embed_dim)
        result = linear(joined, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return result.squeeze(0), None
        return result if self.batch_first else result.transpose(0, 1), None

    def _batch_first(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """(N, length, E) of each; operands that are one tensor stay one, so that one product projects them."""
        turned: dict[int, Tensor] = {}
        for x in operands:
            if x.dim() == 2:
                turned[id(x)] = x.unsqueeze(0)
            else:
                turned[id(x)] = x if self.batch_first else x.transpose(0, 1)
        return tuple(turned[id(x)] for x in operands)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, bias, strict=True))

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Both masks as one that broadcasts to (N, heads, L, S), boolean True allowing, as SDPA has it."""
        masks = []
        if attn_mask is not None:
            split = (-1, self.num_heads, *attn_mask.shape[-2:])
            masks.append(attn_mask.reshape(split) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None, :])
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            return ~(masks[0] | masks[1]) if len(masks) == 2 else ~masks[0]
        added = [
            torch.zeros_like(m, dtype=query.dtype).masked_fill_(m, float("-inf")) if m.dtype == torch.bool else m
            for m in masks
        ]
        return added[0] + added[1] if len(added) == 2 else added[0]
