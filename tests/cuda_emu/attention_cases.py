"""Attention's launchers against float64 truth, on the emulator or a GPU: shapes, options and the check."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from matrix_calls import Launchers
from torch import Tensor

from fastnn.ops.attention import AttentionOptions, attention_reference
from fastnn.testing.policy import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget, same_bits


class Case(NamedTuple):
    """One call: (B, H, H_kv, S_q, S_k, D, D_v) and what is asked for."""

    shape: tuple[int, int, int, int, int, int, int]
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    mask: str = ""
    softcap: float = 0.0
    dropout: float = 0.0
    layout: str = ""
    scale: float | None = None


SMALL = (
    Case((1, 1, 1, 1, 1, 1, 1)),
    Case((1, 2, 1, 70, 70, 64, 64)),
    Case((1, 2, 2, 130, 130, 64, 64), causal=True),
    Case((1, 1, 1, 65, 100, 128, 128)),
    Case((2, 1, 1, 100, 65, 128, 128), causal=True, layout="rows"),
    Case((1, 1, 1, 70, 40, 256, 256), window=(16, 8)),
    Case((1, 2, 1, 40, 70, 40, 24), mask="bool"),
    Case((1, 1, 1, 20, 33, 80, 96), mask="keys", softcap=5.0),
    Case((1, 1, 1, 20, 33, 33, 35), mask="additive", causal=True),
    Case((1, 4, 2, 33, 45, 64, 64), dropout=0.3),
    Case((1, 1, 1, 33, 37, 200, 180), dropout=0.5, mask="half"),
    Case((1, 2, 2, 100, 30, 64, 64), window=(3, 2)),
    Case((1, 1, 1, 20, 30, 64, 64), scale=-0.5),
    Case((1, 1, 1, 40, 0, 16, 16)),
    Case((1, 1, 1, 0, 40, 16, 16)),
    Case((1, 1, 1, 12, 40, 0, 16)),
    Case((1, 3, 1, 70, 140, 128, 128), mask="bool", window=(60, 3)),
)


def make_mask(kind: str, case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    """A mask with rows that see nothing, broadcast in some dimensions."""
    b, h, _, s_q, s_k, _, _ = case.shape
    if not kind:
        return None
    if kind == "bool":
        mask = torch.rand(b, 1, s_q, s_k, generator=generator) < 0.7
        mask[:, :, : s_q // 8] = False
        return mask
    if kind == "keys":
        return torch.rand(b, 1, 1, s_k, generator=generator) < 0.7
    mask = torch.randn(h, s_q, s_k, generator=generator)
    mask[:, s_q // 2 :, : s_k // 3] = -math.inf
    mask[:, -1] = -math.inf
    return mask.to(dtype if kind == "half" else torch.float32)


def check_attention(
    launchers: Launchers, case: Case, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """Forward and every gradient within the policy, twice with equal bits."""
    b, h, h_kv, s_q, s_k, d, d_v = case.shape
    where = f"{case} {dtype}"
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int, length: int, features: int) -> Tensor:
        by_rows = torch.randn(b, length, heads, features, generator=generator).to(dtype).to(device)
        return by_rows.transpose(1, 2) if case.layout == "rows" else by_rows.transpose(1, 2).contiguous()

    q, k, v, grad = draw(h, s_q, d), draw(h_kv, s_k, d), draw(h_kv, s_k, d_v), draw(h, s_q, d_v)
    mask = make_mask(case.mask, case, dtype, generator)
    mask = None if mask is None else mask.to(device)
    left, right = case.window
    scale = case.scale if case.scale is not None else 1 / math.sqrt(max(d, 1))
    options = AttentionOptions(case.dropout, scale, case.softcap, left, 0 if case.causal else right)
    more: dict[str, Any] = {"mask": mask, "seed": 12345678901234, "options": tuple(options)}
    (out, lse), again = (launchers.attention_fwd(q, k, v, **more) for _ in range(2))
    assert same_bits(out, again[0]) and same_bits(lse, again[1]), f"{where}: forward differs between runs"
    seed = torch.tensor(more["seed"]) if case.dropout else None

    def reference(cast: torch.dtype, own: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        inputs = [t.cpu().to(cast).requires_grad_() for t in (q, k, v)]
        wide = mask if mask is None or mask.dtype == torch.bool else mask.cpu().to(cast)
        found, its_lse = attention_reference(*inputs, None if wide is None else wide.cpu(), seed, options)
        grads = torch.autograd.grad(found, inputs, grad.cpu().to(cast), allow_unused=True)
        full = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]
        return found.detach(), its_lse, full

    truth, truth_lse, truth_grads = reference(torch.float64, False)
    rival, rival_lse, rival_grads = reference(dtype, False)
    if dtype != torch.float32:  # torch's own kernels round the weights; the reference does not
        rival, rival_grads = rounded_rival(q, k, v, grad, mask, seed, options)
    measured = assert_within_budget(out.cpu(), truth, rival, dtype, FORWARD_FACTOR, where=f"{where} out")
    assert measured is not None
    assert_within_budget(lse.cpu(), truth_lse.double(), rival_lse, torch.float32, 4.0, where=f"{where} lse")
    if not backward:
        return
    grads = launchers.attention_bwd(grad, q, k, v, out, lse, **more)
    repeat = launchers.attention_bwd(grad, q, k, v, out, lse, **more)
    for name, found, other, true, theirs in zip(
        ("dq", "dk", "dv"), grads, repeat, truth_grads, rival_grads, strict=True
    ):
        assert same_bits(found, other), f"{where}: {name} differs between runs"
        assert_within_budget(found.cpu(), true, theirs, dtype, GRADIENT_FACTOR, where=f"{where} {name}")


def rounded_rival(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None, seed: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, list[Tensor]]:
    """Attention in plain PyTorch with every intermediate rounded to the operands' type, as torch's math path."""
    from fastnn.ops.attention import dropout_mask

    dtype = q.dtype
    inputs = [t.cpu().clone().requires_grad_() for t in (q, k, v)]
    group = q.shape[1] // max(k.shape[1], 1)
    query, key, value = inputs[0], *(t.repeat_interleave(group, 1) for t in inputs[1:])
    scores = (query @ key.transpose(-1, -2)).float() * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    left, right = options.window_left, options.window_right
    visible = (distance >= (-left if left >= 0 else -math.inf)) & (distance <= (right if right >= 0 else math.inf))
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask.cpu()
    elif mask is not None:
        scores = scores + mask.cpu().float()
    scores = scores.masked_fill(~visible, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    if seed is not None:
        weights = weights * dropout_mask(tuple(weights.shape), seed, options.dropout) / (1 - options.dropout)
    out = weights.to(dtype) @ value
    grads = torch.autograd.grad(out, inputs, grad.cpu(), allow_unused=True)
    return out.detach(), [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]
