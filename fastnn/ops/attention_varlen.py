"""Attention of sequences of different lengths, stored end to end: no padding in memory, none computed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .attention import AttentionOptions, attention_reference, check_tensor, differentiate, read_options
from .autocast import cast

WHERE = "fastnn.attention_varlen"


def attention_varlen_fwd_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What `attention_varlen_fwd` gives, without its values."""
    rows, heads, _ = query.shape
    return query.new_empty((rows, heads, value.shape[2])), query.new_empty((heads, rows), dtype=torch.float32)


def attention_varlen_bwd_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What `attention_varlen_bwd` gives, without its values."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


if _extension._C is not None:
    _dispatch.register_raw("attention_varlen")
    torch.library.register_fake("fastnn::attention_varlen_fwd", attention_varlen_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::attention_varlen_bwd", attention_varlen_bwd_fake, lib=_extension.library)


def _bounds(name: str, cu_seqlens: Tensor, rows: int) -> list[int]:
    """The reference's own check of what the kernels check as they read it."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{WHERE}: {name} must begin with 0, never fall and end with the {rows} rows; got {bounds}")
    return bounds


def attention_varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """`attention_reference` sequence by sequence, aligned at the bottom right; (output, logsumexp)."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    outs, sums, draw = [], [], 0
    bounds_q, bounds_k = (
        _bounds("cu_seqlens_q", cu_seqlens_q, query.shape[0]),
        _bounds("cu_seqlens_k", cu_seqlens_k, key.shape[0]),
    )
    for (begin, end), (first, last) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        length, keys = end - begin, last - first
        out, lse = attention_reference(
            q[:, :, begin:end],
            k[:, :, first:last],
            v[:, :, first:last],
            None,
            seed,
            options,
            keys - length,
            draw,
        )
        draw += query.shape[1] * length * ((keys + 3) // 4)
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    if not outs:  # of no rows, and differentiable all the same
        nothing = query.sum() + key.sum() + value.sum()
        return nothing.expand(0, query.shape[1], value.shape[2]), query.new_zeros((query.shape[1], 0)).float()
    return torch.cat(outs), torch.cat(sums, 1)


class AttentionVarlenFunction(torch.autograd.Function):
    """Saves the operands, the output and a float per query and head; backward recomputes the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        seed: Tensor | None,
        options: AttentionOptions,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """Runs the backend's forward kernel; cu_seqlens_k is None where it is cu_seqlens_q (dynamo wants each once)."""
        fwd = _dispatch.KERNELS["attention_varlen"][backend].fwd
        bounds_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        out, lse = fwd(query, key, value, cu_seqlens_q, bounds_k, seed, *options, True)
        ctx.save_for_backward(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, out, lse)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or differentiates the reference under create_graph."""
        query, key, value, bounds_q, bounds_k, seed, out, lse = ctx.saved_tensors
        bounds_k = bounds_q if bounds_k is None else bounds_k
        found: Any
        if torch.is_grad_enabled():
            again, _lse = attention_varlen_reference(query, key, value, bounds_q, bounds_k, seed, ctx.options)
            found = differentiate(again, (query, key, value), ctx.needs_input_grad, grad)
        else:
            # Without features attention goes through float32 here for the kernels of GPUs, which round the weights to
            # half precision; those of CPUs, the only ones of this op, keep them in float32 unless there are pairs.
            bwd = _dispatch.KERNELS["attention_varlen"][ctx.backend].bwd
            found = bwd(grad, query, key, value, bounds_q, bounds_k, seed, out, lse, *ctx.options, True)
        return *found, None, None, None, None, None


def _check_bounds(name: str, cu_seqlens: Tensor, query: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{WHERE}: {name} must be a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{WHERE}: {name} must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{WHERE}: {name} must be (sequences + 1,), got shape {tuple(cu_seqlens.shape)}")
    if not cu_seqlens.is_cpu and cu_seqlens.device != query.device:
        raise ValueError(f"{WHERE}: {name} is on {cu_seqlens.device}, query on {query.device}")


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, query, WHERE)
        if tensor.dim() != 3:
            raise ValueError(f"{WHERE}: {name} must be (rows, heads, features), got shape {tuple(tensor.shape)}")
    if query.shape[2] != key.shape[2] or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"{WHERE}: query and key must have the same features, key and value the same rows and heads; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if query.shape[1] % max(key.shape[1], 1) or (key.shape[1] == 0 and query.shape[1] > 0):
        raise ValueError(f"{WHERE}: query's heads must be a multiple of key's, got {query.shape[1]} and {key.shape[1]}")


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences stored end to end: each query attends to the keys of its own sequence.

    Sequence s has the queries cu_seqlens_q[s] .. cu_seqlens_q[s + 1] and the keys cu_seqlens_k[s] ..
    cu_seqlens_k[s + 1], as in FlashAttention's `flash_attn_varlen_func`. Nothing is padded, in memory or in time:
    the work items of all sequences are shared out among the threads.

    **Alignment** of causal attention and windows is at the bottom right: the last query of a sequence stands at its
    last key, query i of n at key i + m - n of m. (`scaled_dot_product_attention` aligns at the top left; the two
    agree where a sequence has as many queries as keys.)

    Args:
        query: (rows, H, D), features next to each other or copied; float32, bfloat16 and float16 run on the kernels.
        key: (rows of keys, H_kv, D), H a multiple of H_kv: query heads share key heads in groups.
        value: (rows of keys, H_kv, D_v).
        cu_seqlens_q: (sequences + 1,) int32 or int64, on the CPU or on query's device: begins with 0, never falls, ends
            with the rows. Sequences may be empty.
        cu_seqlens_k: of the keys; those of the queries unless given.
        dropout_p: probability in [0, 1) of dropping a weight, a function of a seed drawn from torch's generator and of
            the position.
        is_causal: a query sees keys up to where it stands.
        scale: of the scores, default 1 / sqrt(D).
        window: (left, right): a query sees so many keys before and after where it stands; -1 for no limit.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        return_lse: also return the logsumexp of each query's scores, (H, rows) float32, not differentiable, +inf where
            a query sees no key.

    Returns:
        (rows, H, D_v); zeros for a query that sees no key. Gradients of query, key and value from the kernels.

    Raises:
        TypeError: tensors of a wrong type.
        ValueError: shapes, options or devices that do not fit; malformed cu_seqlens.
        NotImplementedError: a forced backend cannot run the call.
    """
    if isinstance(query, Tensor) and autocast.active(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = cast(query, dtype), cast(key, dtype), cast(value, dtype)
    _check(query, key, value)
    bounds_q, bounds_k = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check_bounds("cu_seqlens_q", bounds_q, query)
    _check_bounds("cu_seqlens_k", bounds_k, query)
    if bounds_q.shape != bounds_k.shape:
        raise ValueError(
            f"{WHERE}: cu_seqlens_q and cu_seqlens_k must be of as many sequences, got shapes "
            f"{tuple(bounds_q.shape)} and {tuple(bounds_k.shape)}"
        )
    options = read_options(query, dropout_p, is_causal, scale, window, softcap, WHERE)
    seed = torch.randint(0, 2**62, ()) if dropout_p > 0 else None
    backend = _dispatch.pick("attention_varlen", query)
    operands = (query, key, value, bounds_q, bounds_k, seed)
    if backend == "reference":
        note_reference("attention_varlen_fwd")
        out, lse = attention_varlen_reference(*operands, options)
    elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        of_keys = None if bounds_k is bounds_q else bounds_k
        out, lse = AttentionVarlenFunction.apply(  # type: ignore[no-untyped-call]
            query, key, value, bounds_q, of_keys, seed, options, backend
        )
    else:
        out, lse = _dispatch.KERNELS["attention_varlen"][backend].fwd(*operands, *options, True)
    return (out, lse) if return_lse else out
