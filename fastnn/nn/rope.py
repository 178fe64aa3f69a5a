"""Rotary position embedding as a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.rope import rope, rope_tables


class RotaryEmbedding(torch.nn.Module):
    """Rotates query and key by their positions: `fastnn.rope` with tables of its own, which are in no state_dict.

    Args:
        dim: how many features of a head are rotated, even.
        max_positions: positions 0 to max_positions - 1 are there.
        theta: the base of the frequencies.
        interleaved: whether pairs are neighbours, as in `fastnn.rope`.
        unsqueeze_dim: the dimension of query and key that counts the heads, as in `fastnn.rope`.
        device: of the tables. They are float32, whatever the model is converted to.

    Shapes:
        query (batch, heads, length, features), key the same with its own heads or None; positions (length,) or
        (batch or 1, length), or None for 0, 1, ... The result is as that of `fastnn.rope`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 4096,
        theta: float = 10000.0,
        *,
        interleaved: bool = False,
        unsqueeze_dim: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.max_positions, self.theta = dim, max_positions, theta
        self.interleaved, self.unsqueeze_dim = interleaved, unsqueeze_dim
        cos, sin = rope_tables(max_positions, dim, theta, device=device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        was_meta = self.cos.is_meta
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cos.dtype != torch.float32 or (was_meta and not self.cos.is_meta):
            self.cos, self.sin = rope_tables(self.max_positions, self.dim, self.theta, device=self.cos.device)
        return found

    def forward(
        self, query: Tensor, key: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(query, key) rotated."""
        cos, sin = self.cos, self.sin
        if positions is None:
            dim = self.unsqueeze_dim % query.dim()
            length = query.shape[2 * query.dim() - 5 - dim]
            if length > self.max_positions:
                raise ValueError(
                    f"fastnn.nn.RotaryEmbedding: the length {length} is more than max_positions {self.max_positions}"
                )
            cos, sin = cos[:length], sin[:length]
        options = {"rotary_dim": self.dim, "interleaved": self.interleaved}
        return rope(query, key, cos, sin, self.unsqueeze_dim, positions=positions, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.dim}, {self.max_positions}, theta={self.theta:g}, interleaved={self.interleaved}"
