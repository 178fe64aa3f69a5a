"""How channels pass through products: what is summed over can be taken away, and multiply-adds are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .labels import Atoms, Labels
from .registry import rule, rule_where
from .rules import combine
from .trace import Product, Tracer


@rule("mm", "bmm", "matmul")
def _matmul(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _product(t, args[0], args[1], out)


@rule("addmm", "baddbmm")
def _addmm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    bias, a, b = args[:3]
    _product(t, a, b, out)
    t.give(out, _meet(t, t.labels(out), bias, out.shape, "bias"))


@rule("dot", "mv")
def _vector(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _contract(t, args[0], -1, args[1], 0)
    t.give(out, t.labels(args[0])[:-1])


def _product(t: Tracer, a: Tensor, b: Tensor, out: Tensor) -> None:
    la, lb = t.labels(a), t.labels(b)
    _contract(t, a, -1, b, -2)
    batch = combine(t, [a, b], (*out.shape[:-2], 1, 1), "a batched product")[:-2] if out.dim() > 2 else ()
    t.give(out, (*batch, la[-2], lb[-1]))
    dims = [one for one in (*batch, la[-2], lb[-1], la[-1]) if one is not None]
    t.products.append(Product(out.numel() * a.shape[-1], tuple(dims)))


def _contract(t: Tracer, a: Tensor, a_dim: int, b: Tensor, b_dim: int) -> None:
    """A sum over one dimension of each: what is taken from a weight there takes the contribution away."""
    left, right = t.labels(a)[a_dim], t.labels(b)[b_dim]
    t.tie(left, right, "a product")
    _use(t, b, right) or _use(t, a, left)


def _use(t: Tracer, weight: Tensor, atoms: Atoms | None) -> bool:
    if atoms is None or not t.is_weight(weight):
        return False
    t.relation.used.append(atoms)
    return True


def _meet(t: Tracer, labels: Labels, other: Tensor, shape: Sequence[int], what: str) -> Labels:
    """Labels of a result to which a tensor that broadcasts is added."""
    found = list(labels)
    for back in range(1, min(len(shape), other.dim()) + 1):
        if other.shape[-back] == shape[-back] > 1:
            t.tie(found[-back], t.labels(other)[-back], what)
            if t.labels(other)[-back] is None:
                found[-back] = None
    return tuple(found)


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, w, bias = args[:3]
    transposed, groups = (args[6], args[8]) if len(args) > 8 else (False, args[6])
    into, outof = (0, 1) if transposed else (1, 0)
    lx, lw = t.labels(x), t.labels(w)
    channels: Atoms | None
    if groups == 1:
        _contract(t, x, 1, w, into)
        channels = lw[outof]
    else:
        channels = _grouped(t, lx[1], w, groups, transposed)
    if bias is not None:
        t.tie(channels, t.labels(bias)[0], "bias")
        channels = None if t.labels(bias)[0] is None else channels
    t.give(out, (lx[0], channels, *(None,) * (out.dim() - 2)))
    per_output = math.prod(w.shape[1:]) if not transposed else x.shape[1] // groups * math.prod(w.shape[2:])
    depthwise = groups > 1 and w.shape[1] == 1
    dims = [one for one in (channels, None if depthwise else lw[into]) if one is not None]
    t.products.append(Product(out.numel() * per_output, tuple(dims)))


def _grouped(t: Tracer, x: Atoms | None, w: Tensor, groups: int, transposed: bool) -> Atoms | None:
    """Channels of the result. Groups of one channel come and go; others stay, and lose the same of each."""
    lw = t.labels(w)
    if transposed or x is None:
        for one in (x, *lw):
            t.freeze(one, "a grouped convolution that is transposed or reads what is fixed")
        return None
    each = len(x) // groups
    rows = lw[0]
    if rows is None:
        t.freeze(x, "a grouped convolution of one channel")
        return None
    if each == 1:
        t.tie(np.repeat(x, len(rows) // groups), rows, "a depthwise convolution")
        return rows
    columns = lw[1]
    if columns is None:
        return None
    t.tie(x, np.tile(columns, groups), "a grouped convolution")
    _use(t, w, columns)
    by_group = rows.reshape(groups, -1)
    t.tie(np.broadcast_to(by_group[0], by_group.shape), by_group, "a grouped convolution")
    return rows


@rule("embedding")
def _embedding(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    weight, index = args[:2]
    t.freeze(t.labels(weight)[0], "the rows of an embedding are asked for by number")
    t.give(out, (*(None,) * index.dim(), t.labels(weight)[1]))


@rule_where(lambda func, name: name.startswith("_scaled_dot_product"))
def _attention(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    q, k, v = (t.labels(one) for one in args[:3])
    heads, width = args[0].shape[1], args[2].shape[-1]
    for one in (k, v):
        shared = one[1] if one[1] is None or len(one[1]) == heads else np.repeat(one[1], heads // len(one[1]))
        t.tie(q[1], shared, "attention")
    for width_of in (q[3], k[3]):
        t.freeze(width_of, "the scale of attention depends on the width of a head")
    for tensor in t.tensors_of(args[3:], kwargs):
        for atoms in t.labels(tensor):
            t.freeze(atoms, "it is the mask of attention")
    result = out[0] if isinstance(out, tuple) else out
    fixed = k[1] is None or v[1] is None
    t.give(result, (q[0], None if fixed else q[1], q[2], v[3] if width > 1 else None))
    scores = math.prod(args[0].shape[:3]) * args[1].shape[2]
    dims = () if q[1] is None or fixed else (q[1],)
    t.products.append(Product(scores * (args[0].shape[3] + width), dims))
