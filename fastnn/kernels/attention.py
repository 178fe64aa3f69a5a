"""Attention: the operators, and what they hand to the kernels of `attention_fwd` and `attention_bwd`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.attention import attention_bwd_fake, attention_fwd_fake
from . import tune
from .attention_bwd import attention_delta, attention_dkv, attention_dq
from .attention_fwd import attention_rows_fwd
from .config import Attention, arch_of, attention_config, attention_splits, cdiv, power_of_2
from .library import INTERPRETED, narrow, register
from .matmul import precision_of


class Call(NamedTuple):
    """A call's tensors as the kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    """(B, H, S_q, S_k), strides of 0 where broadcast."""
    tail: tuple[Any, ...]
    """scale, softcap, left, right, seed, threshold, factor of the weights that are kept."""
    flags: tuple[Any, ...]
    """Compile-time: softcap, kind of mask, dropout, window to the left, to the right, precision of products."""

    @property
    def rich(self) -> bool:
        """Whether more is done to a score than scaling and comparing."""
        return bool(self.flags[0] or self.flags[1] or self.flags[2])

    @property
    def plain(self) -> bool:
        """Whether scores are only scaled, by a positive number."""
        return not self.flags[0] and not self.flags[1] and self.tail[0] > 0

    def mask_strides(self) -> tuple[int, ...]:
        """Zeros without a mask."""
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()


_LEAST = 17 if INTERPRETED else 1
"""Features from which on heads are padded. The interpreter could do without: fewer test the kernels' masks there."""


def _heads(t: Tensor) -> Tensor:
    """`t` with neighbouring features in aligned rows, padded by zeros to multiples of 16.

    Rows that are not aligned are read by elements, each with an address of its own, in two registers: most tiles
    spilled.
    """
    features = t.shape[3]
    if features < _LEAST:
        return t if features <= 1 or t.stride(3) == 1 else t.contiguous()
    if (features == 1 or t.stride(3) == 1) and not narrow(features, t):
        return t
    padded = t.new_empty((*t.shape[:3], _padded(features)))
    padded[..., :features] = t
    padded[..., features:] = 0
    return padded


def _padded(features: int) -> int:
    """Features in a row of what the kernels are given."""
    return features if features < _LEAST else cdiv(features, 16) * 16


def _strides(t: Tensor) -> tuple[int, ...]:
    """Of batch, head and row; zeros, which Triton takes for aligned, where there is one."""
    return tuple(0 if size == 1 else stride for stride, size in zip(t.stride()[:3], t.shape[:3], strict=True))


def _result(t: Tensor) -> Tensor:
    """Where a kernel writes `t`: itself, or padded memory for aligned rows."""
    features = t.shape[3]
    return t.new_empty((*t.shape[:3], _padded(features))) if features >= _LEAST and narrow(features, t) else t


def _finish(t: Tensor, written: Tensor) -> None:
    if written is not t:
        t.copy_(written[..., : t.shape[3]])


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> Call:
    kind = 0
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
    # The probability as float32 has it, as the other backends round it.
    probability = torch.tensor(dropout, dtype=torch.float32).item() if dropout else 0.0
    threshold, number = int(probability * 4294967296.0), 0 if seed is None or not dropout else int(seed)
    tail = (scale, softcap, left, right, number, threshold, 1.0 / (1.0 - probability))
    flags = (softcap != 0, kind, dropout > 0, left >= 0, right >= 0, precision_of(query))
    return Call(_heads(query), _heads(key), _heads(value), mask, tail, flags)


def _run(kernel: str, launch: Callable[[Attention], None], c: Call, bd: int, bdv: int) -> None:
    """Launches `fwd`, `dq` or `dkv` cut as its shape wants it; bd and bdv features are in a tile."""
    (B, H, S_q, _), S_k, arch = c.q.shape, c.k.shape[2], arch_of(c.q.device.index)
    cut = attention_config(kernel, S_q, S_k, bd, bdv, c.q.element_size(), c.flags[-1], c.rich, arch)
    tune.run(f"attention_{kernel}", launch, cut, c.q, arch, (B, H, c.k.shape[1], S_q, S_k, bd, bdv), c.flags)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    """(output (B, H, S_q, D_v), laid out as query is; logsumexp (B, H, S_q))."""
    out, lse = attention_fwd_fake(query, key, value)
    B, H, S_q, _ = query.shape
    H_kv, S_k, _ = value.shape[1:]
    if lse.numel() == 0:
        return out, lse
    if S_k == 0:
        return out.zero_(), lse.fill_(float("inf"))
    c = _call(query, key, value, attn_mask, seed, dropout, scale, softcap, window_left, window_right)
    D, D_v, result = c.q.shape[3], c.v.shape[3], _result(out)
    bd, bdv = power_of_2(D, 16), power_of_2(D_v, 16)
    strides = (*_strides(c.q), *_strides(c.k), *_strides(c.v), *c.mask_strides(), *_strides(result))

    def launch(cut: Attention) -> None:
        tiles = cdiv(S_q, cut.bm)
        attention_rows_fwd[(tiles * B * H,)](
            c.q, c.k, c.v, c.mask, result, lse, H, S_q, S_k, D, D_v, H // H_kv, *strides, *c.tail, tiles, *c.flags,
            c.plain, cut.bm, cut.bn, bd, bdv, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    _run("fwd", launch, c, bd, bdv)
    _finish(out, result)
    return out, lse


def attention_bwd(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout: float,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    dq, dk, dv = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    B, H, S_q, D = query.shape
    H_kv, S_k, D_v = value.shape[1:]
    if lse.numel() == 0 or S_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    c = _call(query, key, value, attn_mask, seed, dropout, scale, softcap, window_left, window_right)
    do, group = _heads(grad), H // H_kv
    bd, bdv = power_of_2(D, 16), power_of_2(D_v, 16)
    delta = torch.empty_like(lse)
    rows = max((1024 if narrow(D_v, do, out) else 4096) // bdv, 1)
    attention_delta[(cdiv(lse.numel(), rows),)](
        do, out, delta, H, S_q, D_v, lse.numel(), *_strides(do), *_strides(out), rows, bdv, num_warps=4
    )
    D, D_v = c.q.shape[3], c.v.shape[3]
    strides = (*_strides(c.q), *_strides(c.k), *_strides(c.v), *c.mask_strides(), *_strides(do))
    into_q, into_k, into_v = _result(dq), _result(dk), _result(dv)

    def launch_dq(cut: Attention) -> None:
        tiles = cdiv(S_q, cut.bm)
        attention_dq[(tiles * B * H,)](
            c.q, c.k, c.v, c.mask, do, lse, delta, into_q, H, S_q, S_k, D, D_v, group, *strides, *c.tail, tiles,
            *c.flags, cut.bm, cut.bn, bd, bdv, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    arch = arch_of(query.device.index)
    passes = (1, 2) if attention_splits(bd, bdv, query.element_size(), arch) else (3,)

    def launch_dkv(cut: Attention) -> None:
        tiles = cdiv(S_k, cut.bn)
        for wants in passes:
            attention_dkv[(tiles * B * H_kv,)](
                c.q, c.k, c.v, c.mask, do, lse, delta, into_k, into_v, H, H_kv, S_q, S_k, D, D_v, group, *strides,
                *c.tail, tiles, *c.flags, wants, cut.bm, cut.bn, bd, bdv, num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip

    _run("dq", launch_dq, c, bd, bdv)
    _run("dkv", launch_dkv, c, bd, bdv)
    for gradient, written in ((dq, into_q), (dk, into_k), (dv, into_v)):
        _finish(gradient, written)
    return dq, dk, dv


_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed"
_OPTIONS = "float dropout, float scale, float softcap, int window_left, int window_right, bool grad_handled=False"
register(
    "attention",
    (f"({_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor)", attention_fwd, attention_fwd_fake),
    (
        f"(Tensor grad, {_OPERANDS}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        attention_bwd,
        attention_bwd_fake,
    ),
)
