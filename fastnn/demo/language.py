"""Two small language models, shaped as GPT-2 and as Llama, run by plain torch or by fastnn's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastnn

Norm = nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class Ops:
    """What a model needs beside plain linear layers."""

    linear_gelu: Callable[[nn.Linear, Tensor], Tensor]
    norm: Callable[[Norm, Tensor], Tensor]
    add_norm: Callable[[Norm, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(norm(x + residual), x + residual)."""
    linear: Callable[[nn.Linear, Tensor], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def _torch_add_norm(norm: Norm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total), total


def _torch_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return rotate(q), rotate(k)


def _fastnn_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], fastnn.rope(q, k, cos, sin, rotary_dim=q.shape[-1]))  # a key gives a key


def _fastnn_norm(norm: Norm, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return fastnn.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return fastnn.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _fastnn_add_norm(norm: Norm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(norm, nn.LayerNorm):
        return fastnn.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    return fastnn.add_rms_norm(x, residual, norm.weight, norm.eps)


OPS = {
    "torch": Ops(
        linear_gelu=lambda layer, x: functional.gelu(layer(x)),
        norm=lambda norm, x: norm(x),
        add_norm=_torch_add_norm,
        linear=lambda layer, x: layer(x),
        rope=_torch_rope,
        swiglu=lambda gate, up: functional.silu(gate) * up,
        attention=lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        loss=functional.cross_entropy,
    ),
    "fastnn": Ops(
        linear_gelu=lambda layer, x: fastnn.linear(x, layer.weight, layer.bias, activation="gelu"),
        norm=_fastnn_norm,
        add_norm=_fastnn_add_norm,
        linear=lambda layer, x: fastnn.linear(x, layer.weight, layer.bias),
        rope=_fastnn_rope,
        swiglu=fastnn.swiglu,
        attention=lambda q, k, v: fastnn.scaled_dot_product_attention(q, k, v, is_causal=True),
        loss=fastnn.cross_entropy,
    ),
}


def new_norm(llama: bool, width: int) -> Norm:
    """What the model normalizes by."""
    return nn.RMSNorm(width) if llama else nn.LayerNorm(width)


class Block(nn.Module):
    """A pre-norm transformer block: GPT-2's (LayerNorm, GELU) or Llama's (RMSNorm, rotary positions, SwiGLU)."""

    def __init__(self, ops: Ops, llama: bool, width: int, heads: int) -> None:
        super().__init__()
        self.ops, self.llama, self.heads = ops, llama, heads
        self.norm1, self.norm2 = (new_norm(llama, width) for _ in range(2))
        self.qkv, self.proj = (nn.Linear(width, n * width, bias=not llama) for n in (3, 1))
        inner = 8 * width // 3 // 64 * 64 if llama else 4 * width
        self.up, self.down = nn.Linear(width, inner, bias=not llama), nn.Linear(inner, width, bias=not llama)
        self.gate = nn.Linear(width, inner, bias=False) if llama else None

    def attend(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention over (N, length, width)."""
        n, length, width = x.shape
        q, k, v = self.ops.linear(self.qkv, x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.llama:
            q, k = self.ops.rope(q, k, *tables)
        return self.ops.linear(self.proj, self.ops.attention(q, k, v).transpose(1, 2).reshape(n, length, width))

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward part."""
        if self.gate is None:
            return self.ops.linear(self.down, self.ops.linear_gelu(self.up, x))
        hidden = self.ops.swiglu(self.ops.linear(self.gate, x), self.ops.linear(self.up, x))
        return self.ops.linear(self.down, hidden)


class CharacterModel(nn.Module):
    """A character model of 4 layers and width 256, shaped as GPT-2 or as Llama."""

    def __init__(
        self, kind: str, llama: bool, vocabulary: int, length: int, width: int = 256, layers: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.ops = OPS[kind]
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = None if llama else nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(self.ops, llama, width, heads) for _ in range(layers))
        self.norm = new_norm(llama, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.cos: Tensor
        self.sin: Tensor
        for name, table in zip(("cos", "sin"), fastnn.rope_tables(length, width // heads), strict=True):
            self.register_buffer(name, table, persistent=False)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy of logits (N length, vocabulary)."""
        return self.ops.loss(logits, y)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N length, vocabulary) of characters (N, length)."""
        h = self.tokens(x)
        if self.positions is not None:
            h = h + self.positions.weight[: x.shape[1]]
        blocks: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        after = [block.norm1 for block in blocks[1:]] + [self.norm]
        n = self.ops.norm(blocks[0].norm1, h)
        for block, following in zip(blocks, after, strict=True):
            n, h = self.ops.add_norm(block.norm2, block.attend(n, (self.cos, self.sin)), h)
            n, h = self.ops.add_norm(following, block.feed(n), h)
        return self.ops.linear(self.head, n).flatten(0, 1)


class Characters:
    """A text as windows of characters."""

    def __init__(self, text: Path, length: int) -> None:
        characters = text.read_text("utf-8")
        vocabulary = sorted(set(characters))
        index = {c: i for i, c in enumerate(vocabulary)}
        self.tokens = torch.tensor([index[c] for c in characters])
        self.vocabulary, self.length = len(vocabulary), length

    def batches(self, steps: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(N, length) characters and, flat, the ones that follow each; the same ones in every run."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            starts = torch.randint(len(self.tokens) - self.length - 1, (batch,), generator=generator)
            window = torch.stack([self.tokens[s : s + self.length + 1] for s in starts])
            yield window[:, :-1], window[:, 1:].reshape(-1)
