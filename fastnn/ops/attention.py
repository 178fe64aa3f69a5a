"""Scaled dot-product attention: tiled online softmax, nothing of size length x length, every option of torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .autocast import cast


class AttentionOptions(NamedTuple):
    """What a call was asked for beside its tensors, as the raw operators take it."""

    dropout: float
    scale: float
    softcap: float
    window_left: int
    window_right: int


def attention_fwd_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What `attention_fwd` gives, without its values."""
    b, h, s, _ = query.shape
    d = value.shape[3]
    by_rows = query.stride(1) < query.stride(2)
    out = query.new_empty((b, s, h, d)).transpose(1, 2) if by_rows else query.new_empty((b, h, s, d))
    return out, query.new_empty((b, h, s), dtype=torch.float32)


def attention_bwd_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What `attention_bwd` gives, without its values."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


if _extension._C is not None:
    _dispatch.register_raw("attention")
    torch.library.register_fake("fastnn::attention_fwd", attention_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::attention_bwd", attention_bwd_fake, lib=_extension.library)


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit numbers per counter, (*, 4) int64."""
    low = 0xFFFFFFFF
    k0, k1 = int(seed) & low, (int(seed) >> 32) & low
    c0, c1 = counter & low, (counter >> 32) & low
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        # 32 x 32 bit products in halves: int64 has no unsigned multiply.
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), -1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = a * (b & 0xFFFF), a * (b >> 16)
    total = lower + ((upper & 0xFFFF) << 16)
    return (upper >> 16) + (total >> 32), total & 0xFFFFFFFF


def dropout_mask(
    shape: tuple[int, ...], seed: Tensor, probability: float, device: torch.device | None = None, first: int = 0
) -> Tensor:
    """True where an attention weight (B, H, S_q, S_k) is kept: a function of the seed and the position alone.

    Four neighbouring keys share a counter; `first` is the first one's.
    """
    *lead, keys = shape
    groups = (keys + 3) // 4
    counter = torch.arange(first, first + math.prod(lead) * groups, device=device).reshape(*lead, groups)
    random = philox(seed, counter).flatten(-2)[..., :keys]
    return random >= int(float(torch.tensor(probability, dtype=torch.float32)) * 4294967296.0)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    position: int = 0,
    first_draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(q k^T scale) + mask) v in plain PyTorch, 4-d, half precision in float32; (output, logsumexp).

    Query i stands at key position + i, which the window counts from; dropout's first counter is `first_draw`.
    """
    dropout, scale, softcap, left, right = options
    dtype = query.dtype
    if dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    group = query.shape[1] // max(key.shape[1], 1)
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    device = query.device
    stands = position + torch.arange(query.shape[2], device=device)[:, None]
    distance = torch.arange(key.shape[2], device=device) - stands
    visible = (distance >= (-left if left >= 0 else -math.inf)) & (distance <= (right if right >= 0 else math.inf))
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~visible, -math.inf)
    # A query that sees nothing gets zeros, as in torch; filled before the softmax, its gradient is zero and not NaN.
    nothing = (scores == -math.inf).all(-1)
    lse = torch.logsumexp(scores.detach(), -1).masked_fill(nothing, math.inf).float()
    weights = torch.softmax(scores.masked_fill(nothing[..., None], 0.0), -1).masked_fill(nothing[..., None], 0.0)
    if seed is not None and dropout > 0:
        weights = weights * dropout_mask(tuple(weights.shape), seed, dropout, device, first_draw) / (1 - dropout)
    return (weights @ value).to(dtype), lse


def differentiate(
    output: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients, themselves differentiable, of the inputs that need one, which come first in `needed`; else None."""
    wanted = [t for t, w in zip(inputs, needed, strict=False) if w]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if w else None for w in needed[: len(inputs)]]


class AttentionFunction(torch.autograd.Function):
    """Saves the operands, the output and a float per query; backward recomputes the weights tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        options: AttentionOptions,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Runs the backend's forward kernel."""
        out, lse = _dispatch.KERNELS["attention"][backend].fwd(query, key, value, mask, seed, *options, True)
        ctx.save_for_backward(query, key, value, mask, seed, out, lse)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or differentiates the reference under create_graph."""
        query, key, value, mask, seed, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            again, _lse = attention_reference(query, key, value, mask, seed, ctx.options)
            gradients = differentiate(again, (query, key, value), ctx.needs_input_grad, grad)
        else:
            bwd = _dispatch.KERNELS["attention"][ctx.backend].bwd
            dtype = query.dtype
            if query.shape[3] == 0:
                # Every weight of a query is the same: rounded to half precision, all would err in one direction.
                grad, query, key, value, out = (t.float() for t in (grad, query, key, value, out))
            found = bwd(grad, query, key, value, mask, seed, out, lse, *ctx.options, True)
            gradients = [gradient.to(dtype) for gradient in found]
        return *gradients, None, None, None, None


WHERE = "fastnn.scaled_dot_product_attention"


def check_tensor(name: str, tensor: Tensor, query: Tensor, where: str = WHERE) -> None:
    """A mask, or one of query, key and value, dense and on query's device; the latter of query's type."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{where}: {name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.device != query.device:
        raise TypeError(f"{where}: {name} is on {tensor.device}, query on {query.device}")
    if name == "attn_mask":
        if not (tensor.dtype == torch.bool or tensor.dtype.is_floating_point):
            raise TypeError(f"{where}: attn_mask must be boolean or floating point, got {tensor.dtype}")
        return
    if tensor.dim() < 2:
        raise ValueError(f"{where}: {name} must be (*, length, features), got shape {tuple(tensor.shape)}")
    if not tensor.dtype.is_floating_point or tensor.dtype != query.dtype:
        raise TypeError(
            f"{where}: query, key and value must be floating point of one dtype, got {name} {tensor.dtype} "
            f"beside query {query.dtype}"
        )


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", mask)):
        if tensor is not None or name != "attn_mask":
            check_tensor(name, tensor, query)  # type: ignore[arg-type]
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"{WHERE}: query and key must have the same features, key and value the same length; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if enable_gqa and (
        min(query.dim(), key.dim(), value.dim()) < 3
        or key.shape[-3] != value.shape[-3]
        or query.shape[-3] % max(key.shape[-3], 1)
    ):
        raise ValueError(
            f"{WHERE}: enable_gqa needs query heads to be a multiple of key heads, as many as value heads; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[torch.Size, tuple[Tensor, ...]]:
    """The batch dimensions, and query, key and value in four dimensions, the batch as one."""
    operands = (query, key, value)
    heads_agree = enable_gqa or query.shape[1:2] == key.shape[1:2] == value.shape[1:2]
    if query.dim() == key.dim() == value.dim() == 4 and heads_agree and len({t.shape[0] for t in operands}) == 1:
        return query.shape[:1], operands  # the usual call: nothing to broadcast, which takes torch a while to find out
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in operands))  # type: ignore[no-untyped-call]
        heads = torch.broadcast_shapes(*(t.shape[-3:-2] for t in operands[: 1 if enable_gqa else 3]))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"{WHERE}: batch dimensions and heads must broadcast; got query {tuple(query.shape)}, key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}"
        ) from None
    four = tuple(_four_dimensional(t, batch) for t in operands)
    return batch, four if enable_gqa else tuple(t.expand(-1, *(heads or (1,)), -1, -1) for t in four)


def _four_dimensional(tensor: Tensor, batch: torch.Size) -> Tensor:
    if tensor.dim() < 4:
        tensor = tensor.reshape((1,) * (4 - tensor.dim()) + tensor.shape)
    if len(batch) > 1:
        return tensor.expand(*batch, *tensor.shape[-3:]).reshape(-1, *tensor.shape[-3:])
    return tensor.expand(*(batch or (1,)), -1, -1, -1)


def _read_mask(mask: Tensor, batch: torch.Size, scores: tuple[int, int, int]) -> Tensor:
    """The mask in at most four dimensions."""
    full = (*(batch or (1,)), *scores)
    if mask.dim() > len(full) or not all(m in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{WHERE}: attn_mask must broadcast to {tuple(full)}, got shape {tuple(mask.shape)}")
    return mask if mask.dim() < 4 or len(batch) <= 1 else _four_dimensional(mask, batch)


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(query @ key^T * scale + mask) @ value`, as `torch.nn.functional.scaled_dot_product_attention`.

    Tiled online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): memory grows with the lengths, not with their
    product. float32 arithmetic whatever the type.

    Args:
        query: (..., H, S_q, D), any strides; float32, bfloat16 and float16 run on the kernels.
        key: (..., H, S_k, D), or (..., H_kv, S_k, D) with `enable_gqa`, H a multiple of H_kv.
        value: (..., H_kv, S_k, D_v).
        attn_mask: broadcastable to (..., H, S_q, S_k): boolean (True: may attend) or added to the scores. Its gradient,
            where wanted, is computed by the reference.
        dropout_p: probability in [0, 1) of dropping a weight; applied whenever it is not 0, as in torch. The mask is a
            function of a seed drawn from torch's generator and of the position: the same for any number of threads.
        is_causal: query i sees keys 0 .. i (aligned at the top left).
        scale: of the scores, default 1 / sqrt(D).
        enable_gqa: lets several query heads share a key head.
        window: (left, right): query i sees keys i - left .. i + right; -1 for no limit on that side.
        softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2); 0 for none.
        return_lse: also return the logsumexp of each query's scores, (..., H, S_q) float32, not differentiable, +inf
            where a query sees no key.

    Returns:
        (..., H, S_q, D_v); zeros for a query that may attend to nothing.

    Raises:
        TypeError, ValueError: types, shapes or options that do not fit.
        NotImplementedError: a forced backend cannot run the call.
    """
    if isinstance(query, Tensor) and autocast.active(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value, attn_mask = (
            cast(query, dtype),
            cast(key, dtype),
            cast(value, dtype),
            cast(attn_mask, dtype),
        )
    _check(query, key, value, attn_mask, enable_gqa)
    options = read_options(query, dropout_p, is_causal, scale, window, softcap)
    batch, (q, k, v) = _broadcast(query, key, value, enable_gqa)
    mask = None if attn_mask is None else _read_mask(attn_mask, batch, (q.shape[1], q.shape[2], k.shape[2]))
    seed = torch.randint(0, 2**62, ()) if dropout_p > 0 else None
    out, lse = _attention(q, k, v, mask, seed, options)
    rank = max(query.dim(), key.dim(), value.dim())
    if rank != 4:
        lead = (*batch, q.shape[1]) if rank > 2 else ()
        out, lse = out.reshape(*lead, *out.shape[2:]), lse.reshape(*lead, lse.shape[2])
    return (out, lse) if return_lse else out


def read_options(
    query: Tensor,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
    where: str = WHERE,
) -> AttentionOptions:
    """The options of a public function as the kernels take them; ValueError where they do not fit."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{where}: dropout_p must be in [0, 1), got {dropout}")
    if not softcap >= 0.0:
        raise ValueError(f"{where}: softcap must not be negative, got {softcap}")
    if window is None:
        window = (-1, -1)
    if not isinstance(window, (tuple, list)) or len(window) != 2 or min(window) < -1:
        raise ValueError(f"{where}: window must be (left, right) counts of keys, -1 for no limit; got {window}")
    left, right = window
    if is_causal:
        right = 0
    factor = scale if scale is not None else 1.0 / math.sqrt(max(query.shape[-1], 1))
    return AttentionOptions(float(dropout), float(factor), float(softcap), left, right)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    backend = _dispatch.pick("attention", q)
    wants = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    plain = ""
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        plain = "attn_mask requires grad, which the reference computes"
    elif mask is not None and mask.dtype == torch.float64:
        plain = "attn_mask is float64"
    if plain:
        _dispatch.refuse_if_forced("scaled_dot_product_attention", plain)
    if backend == "reference" or plain:
        note_reference("attention_fwd")
        return attention_reference(q, k, v, mask, seed, options)
    if wants:
        return AttentionFunction.apply(q, k, v, mask, seed, options, backend)  # type: ignore[no-untyped-call]
    return _dispatch.KERNELS["attention"][backend].fwd(q, k, v, mask, seed, *options, True)
