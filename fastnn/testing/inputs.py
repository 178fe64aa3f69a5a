"""Test inputs that bite, and the memory layouts they come in.

Whatever a kernel has no business reading (the gap between strided elements, the memory before and after an offset
view) holds NaN, or an index that is out of range, so a read out of place shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Fill = Literal["normal", "outliers"]

OUTLIER = 20.0
"""Factor of the outliers."""


def fill(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, kind: Fill = "normal") -> Tensor:
    """A contiguous tensor: standard normal with a stretch of constants; `outliers` has one value in 16 times 20.

    The last value is always an outlier then: a kernel that drops its tail is far off. Drawn in float32 and rounded
    to `dtype`, so that upcasting it is exact.
    """
    values = torch.randn(tuple(shape), generator=generator)
    flat = values.view(-1)
    size = flat.numel()
    if size >= 16:
        flat[size // 4 : size // 4 + size // 16] = 0.75
    if kind == "outliers" and size:
        at = torch.randint(size, (max(size // 16, 1),), generator=generator)
        flat[at] *= OUTLIER
        flat[-1] = OUTLIER if flat[-1] >= 0 else -OUTLIER
    return values.to(dtype)


def spoilt(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory of the type of `like` that must not be read: NaN; -7 in integers, which is no index; True in masks."""
    if like.dtype == torch.bool:
        return like.new_full(tuple(shape), True)
    return like.new_full(tuple(shape), float("nan") if like.dtype.is_floating_point else -7)


def strided(t: Tensor) -> Tensor:
    """The values of `t` with stride 2 along the last dimension and NaN in between; a scalar gets its own memory."""
    if t.dim() == 0:
        return t.clone()
    base = spoilt(t, (*t.shape[:-1], 2 * t.shape[-1]))
    view = base[..., ::2]
    view.copy_(t)
    return view


def padded_rows(t: Tensor) -> Tensor:
    """The values of `t` with dense rows, three NaN apart."""
    if t.dim() == 0:
        return t.clone()
    base = spoilt(t, (*t.shape[:-1], t.shape[-1] + 3))
    view = base[..., : t.shape[-1]]
    view.copy_(t)
    return view


def expanded(t: Tensor, dim: int = 0) -> Tensor:
    """A view of stride 0 along `dim`, all of it the first slice of `t`; `t` itself where there is no slice."""
    if t.dim() == 0 or t.shape[dim] == 0:
        return t
    return t.narrow(dim, 0, 1).clone().expand(t.shape)


def offset(t: Tensor) -> Tensor:
    """The values of `t`, dense, starting one element into a buffer with NaN before and after (so not aligned)."""
    base = spoilt(t, (t.numel() + 4,))
    view = base[1 : 1 + t.numel()].view(t.shape)
    view.copy_(t)
    return view


def transposed(t: Tensor) -> Tensor:
    """The values of `t` with its last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.dim() >= 2 else t.clone()


ARRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "strided": strided,
    "padded_rows": padded_rows,
    "expanded": expanded,
    "offset": offset,
    "transposed": transposed,
}
"""Layout name -> the function that rearranges a contiguous tensor."""


def arrange(t: Tensor, layout: str) -> Tensor:
    """`t` in the memory layout of that name; layouts that are about sizes or values leave it as it is."""
    return ARRANGE.get(layout, ARRANGE["contiguous"])(t)
