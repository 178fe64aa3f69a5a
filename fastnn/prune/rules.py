"""How channels pass through ATen's operators that are no products."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .labels import Atoms, Labels, reshaped
from .registry import rule, rule_where, unknown
from .trace import Tracer


def at(labels: Labels, dim: int) -> Atoms | None:
    """Of one dimension; nothing of a scalar."""
    return labels[dim] if labels else None


def _with(labels: Labels, dim: int, atoms: Atoms | None) -> Labels:
    found = list(labels)
    found[dim] = atoms
    return tuple(found)


# ---- elementwise


def combine(t: Tracer, parts: Sequence[Tensor], shape: Sequence[int], what: str) -> Labels:
    """Of tensors that broadcast to `shape`: what meets is tied."""
    found: list[Atoms | None] = []
    for back in range(len(shape), 0, -1):
        meeting = [t.labels(p)[-back] for p in parts if p.dim() >= back and p.shape[-back] == shape[-back] > 1]
        for one in meeting[1:]:
            t.tie(meeting[0], one, what)
        found.append(None if not meeting or any(one is None for one in meeting) else meeting[0])
    return tuple(found)


@rule("copy", "fill", "clamp", "masked_fill", "lerp", "addcmul", "addcdiv", "where", "bernoulli")
@rule_where(lambda func, name: torch.Tag.pointwise in func.tags)
def _pointwise(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    if isinstance(out, Tensor):
        t.give(out, combine(t, t.tensors_of(args, kwargs), out.shape, func._schema.name))


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "zeros_like", "ones_like", "full_like")
@rule("empty_like", "rand_like", "randn_like", "dropout", "native_dropout", "cumsum", "_conj", "positive")
def _same(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    t.give(out[0] if isinstance(out, tuple) else out, t.labels(args[0]))


@rule("_local_scalar_dense", "equal", "is_same_size", "_assert_async", "_assert_tensor_metadata", "sym_size")
def _nothing(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reads values or shapes, and makes no tensor of them."""


@rule("_prelu_kernel")
def _prelu(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    t.give(out, combine(t, list(args[:2]), out.shape, "prelu"))


@rule("glu")
def _glu(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[1] if len(args) > 1 else -1
    labels = t.labels(args[0])
    atoms = at(labels, dim)
    if atoms is not None:
        atoms, gate = np.split(atoms, 2)
        t.tie(atoms, gate, "glu")
    t.give(out, _with(labels, dim, atoms))


# ---- shapes


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = t.labels(args[0])
    if isinstance(args[1], torch.dtype):
        unknown(t, func, args, kwargs, out)
    elif any(one is not None for one in labels):
        t.give(out, reshaped(t.relation, labels, args[0].shape, out.shape, args[1], t.where))


@rule("permute")
def _permute(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = t.labels(args[0])
    t.give(out, tuple(labels[d] for d in args[1]))


@rule("t", "transpose")
def _transpose(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = list(t.labels(args[0]))
    if len(labels) > 1:
        a, b = args[1:3] if len(args) > 2 else (0, 1)
        labels[a], labels[b] = labels[b], labels[a]
    t.give(out, tuple(labels))


@rule("unsqueeze")
def _unsqueeze(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels, dim = list(t.labels(args[0])), args[1] % out.dim()
    t.give(out, (*labels[:dim], None, *labels[dim:]))


@rule("squeeze")
def _squeeze(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    dims = args[1:] and ([args[1]] if isinstance(args[1], int) else args[1])
    gone = {d % x.dim() for d in (dims or range(x.dim()))} if x.dim() else set()
    t.give(out, tuple(one for d, one in enumerate(t.labels(x)) if not (d in gone and x.shape[d] == 1)))


@rule("expand")
def _expand(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = t.labels(args[0])
    t.give(out, (*(None,) * (out.dim() - len(labels)), *labels))


@rule("repeat")
def _repeat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = t.labels(args[0])
    labels = (*(None,) * (out.dim() - len(labels)), *labels)
    t.give(out, tuple(None if one is None else np.tile(one, n) for one, n in zip(labels, args[1], strict=True)))


@rule("slice")
def _slice(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    given: Any = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
    dim, start, end, step = given
    labels = t.labels(args[0])
    atoms = at(labels, dim)
    t.give(out, labels if atoms is None else _with(labels, dim, atoms[slice(start, end, step)]))


@rule("select")
def _select(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels, dim = t.labels(args[0]), args[1] % args[0].dim()
    t.freeze(labels[dim], "one index is selected")
    t.give(out, (*labels[:dim], *labels[dim + 1 :]))


@rule("unbind")
def _unbind(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels, dim = t.labels(args[0]), (args[1] if len(args) > 1 else 0) % args[0].dim()
    t.freeze(labels[dim], "a dimension is unbound")
    for one in out:
        t.give(one, (*labels[:dim], *labels[dim + 1 :]))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def _split(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Parts of one size keep one size: their i-th channels go together."""
    labels, dim = t.labels(args[0]), args[2] if len(args) > 2 else kwargs.get("dim", 0)
    atoms = at(labels, dim)
    ends = list(itertools.accumulate(part.shape[dim] for part in out))
    parts = [None] * len(out) if atoms is None else np.split(atoms, ends[:-1])
    for one, part in zip(out, parts, strict=True):
        if part is not None and parts[0] is not None and len(part) == len(parts[0]):
            t.tie(parts[0], part, "split")
        t.give(one, _with(labels, dim, part))


@rule("cat")
def _cat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    parts = [one for one in args[0] if one.dim() == out.dim()]  # torch passes over tensors of shape (0,)
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    found: list[Atoms | None] = []
    for d in range(out.dim()):
        labels = [t.labels(one)[d] for one in parts]
        if d == dim:
            whole = all(one is not None or p.shape[d] == 0 for one, p in zip(labels, parts, strict=True))
            for one in () if whole else labels:
                t.freeze(one, "it is concatenated with a part of fixed width")
            found.append(np.concatenate([one for one in labels if one is not None]) if whole else None)
        else:
            for one in labels[1:]:
                t.tie(labels[0], one, "cat")
            found.append(labels[0])
    t.give(out, tuple(found))


@rule("stack")
def _stack(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    labels = combine(t, args[0], args[0][0].shape, "stack")
    t.give(out, (*labels[:dim], None, *labels[dim:]))


# ---- statistics


@rule_where(lambda func, name: "batch_norm" in name)
def _batch_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, result = args[0], out[0] if isinstance(out, (tuple, list)) else out
    labels = t.labels(x)
    for one in t.tensors_of(args[1:], kwargs):
        t.tie(labels[1], t.labels(one)[0], "batch normalisation")
    t.give(result, labels)


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    first = args[0].dim() - len(args[1])
    labels = t.labels(args[0])
    for atoms in (*labels[first:], *(one for p in t.tensors_of(args[2:], kwargs) for one in t.labels(p))):
        t.freeze(atoms, "it is normalised over")
    t.give(out[0], (*labels[:first], *(None,) * len(args[1])))


@rule("native_group_norm")
def _group_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    groups, labels, affine = args[6], t.labels(args[0]), t.tensors_of(args[1:3], {})
    if groups == args[0].shape[1]:
        for one in affine:
            t.tie(labels[1], t.labels(one)[0], "normalisation of each channel")
        t.give(out[0], labels)
        return
    for channels in (labels[1], *(t.labels(one)[0] for one in affine)):
        t.freeze(channels, "channels are normalised in groups")
    t.give(out[0], _with(labels, 1, None))


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels, dim = t.labels(args[0]), args[1]
    t.freeze(at(labels, dim), "a softmax over it")
    t.give(out, _with(labels, dim, None) if labels else labels)


@rule("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "prod", "max", "min", "argmax", "any", "all")
@rule("linalg_vector_norm", "norm", "var_mean")
def _reduce(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    asked, keep = given.get("dim"), given.get("keepdim", False)
    every = range(x.dim())
    gone = {d % x.dim() for d in ([asked] if isinstance(asked, int) else asked or every)} if x.dim() else set()
    labels = t.labels(x)
    for d in gone:
        t.freeze(labels[d], f"{func._schema.name} over it")
    left = tuple(None if d in gone else labels[d] for d in every if keep or d not in gone)
    for one in out if isinstance(out, (tuple, list)) else (out,):
        t.give(one, left)


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices", "max_pool1d", "max_pool2d")
@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d")
@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "mkldnn_max_pool2d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d")
@rule("upsample_bicubic2d", "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def _spatial(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Channels are dimension 1 of a batch, 0 without one, and pass through."""
    first, labels = out[0] if isinstance(out, (tuple, list)) else out, t.labels(args[0])
    same = [d for d in range(min(2, first.dim())) if first.shape[d] == args[0].shape[d]]
    for d, atoms in enumerate(labels):
        if d not in same:
            t.freeze(atoms, f"{func._schema.name} mixes it")
    t.give(first, tuple(one if d in same else None for d, one in enumerate(labels)))


@rule("constant_pad_nd")
def _pad(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = t.labels(args[0])
    for d, atoms in enumerate(labels):
        if out.shape[d] != args[0].shape[d]:
            t.freeze(atoms, "it is padded")
    t.give(out, tuple(one if out.shape[d] == args[0].shape[d] else None for d, one in enumerate(labels)))
