"""Cross-entropy. Forward keeps maximum and log-sum of a row, backward recomputes the softmax from them."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.cross_entropy import cross_entropy_bwd_fake, cross_entropy_fwd_fake
from . import tune
from .activation import tanh
from .config import Rows, arch_of, cdiv, loss_config
from .library import register, rows_of, unit_of

LOWEST = tl.constexpr(-3.4028234663852886e38)
INDEX, SMOOTHED, PROBABILITIES = (tl.constexpr(kind) for kind in range(3))
MEAN, NONE = 1, 0


@triton.jit
def _logits(at, inside, cap, CAPPED: tl.constexpr):
    """Logits, capped where they are to be; -inf outside."""
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        x = cap * tanh(x * (1.0 / cap))
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _share(p_ptr, weight_ptr, r, c, n, inside, smoothing, KIND: tl.constexpr):
    """The share of the target in classes `c`, weighted; 0 outside."""
    share = tl.where(inside, smoothing / n, 0.0)
    if KIND == PROBABILITIES:
        share += tl.load(p_ptr + r * n + c, mask=inside, other=0.0).to(tl.float32) * (1.0 - smoothing)
    if weight_ptr is not None:
        share *= tl.load(weight_ptr + c, mask=c < n, other=0.0).to(tl.float32)
    return share


@triton.jit
def _class_weight(weight_ptr, t, known):
    if weight_ptr is not None:
        w = tl.load(weight_ptr + t, mask=known, other=1.0).to(tl.float32)
    else:
        w = tl.where(known, 1.0, 1.0)
    return w


@triton.jit
def cross_entropy_rows_fwd(
    x_ptr,
    target_ptr,
    p_ptr,
    weight_ptr,
    loss_ptr,
    z_ptr,
    row_weight_ptr,
    stats_ptr,
    rows,
    n,
    x_stride,
    ignore_index,
    smoothing,
    z_loss,
    cap,
    CAPPED: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Of each row: loss, z loss, weight in the mean, and the maximum and log-sum for backward.

    A class index that is neither in range nor ignored makes its row NaN. `UNIT`: `unit_of` the logits.
    """
    n, x_stride = n // UNIT * UNIT, x_stride // UNIT * UNIT
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    here = r < rows
    x_row = x_ptr + r * x_stride
    if WHOLE:
        whole = _logits(x_row + c, here & (c < n), cap, CAPPED)
        m = tl.maximum(tl.max(whole, 1)[:, None], LOWEST)
        total = tl.sum(tl.exp(whole - m), 1)[:, None]
    else:
        # One running maximum and sum for each fourth element. They start at the lowest finite number, not at -inf:
        # lanes that saw nothing else then add e^-inf = 0 and not NaN.
        WIDTH: tl.constexpr = BLOCK // 4
        fold = tl.arange(0, 4)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        top = tl.full((1, WIDTH), LOWEST, tl.float32)
        lanes = tl.zeros((1, WIDTH), tl.float32)
        for start in range(0, n, BLOCK):
            x = _logits(x_row + fold + start, fold + start < n, cap, CAPPED)
            new = tl.maximum(top, tl.max(x, 0)[None, :])
            lanes = lanes * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)[None, :]
            top = new
        m = tl.max(top, 1)[:, None]
        total = tl.sum(lanes * tl.exp(top - m), 1)[:, None]
    log_sum = tl.log(total)
    loss = tl.zeros((ROWS, 1), tl.float32)
    counts = here
    row_weight = tl.full((ROWS, 1), 1.0, tl.float32)
    if KIND != PROBABILITIES:
        t = tl.load(target_ptr + r, mask=here, other=0)
        counts = here & (t != ignore_index)
        known = counts & (t >= 0) & (t < n)
        row_weight = _class_weight(weight_ptr, t, known)
        own = _logits(x_row + t, known, cap, CAPPED)
        loss = (1.0 - smoothing) * row_weight * ((m - own) + log_sum)
        loss = tl.where(known, loss, float("nan"))
    if KIND != INDEX:
        shares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, n, BLOCK):
            inside = here & (c + start < n)
            x = _logits(x_row + c + start, inside, cap, CAPPED)
            share = _share(p_ptr, weight_ptr, r, c + start, n, inside, smoothing, KIND)
            shares += tl.where(inside, share * ((m - x) + log_sum), 0.0)
        loss += tl.sum(shares, 1)[:, None]
    lse = m + log_sum
    tl.store(loss_ptr + r, tl.where(counts, loss, 0.0), mask=here)
    if z_ptr is not None:
        tl.store(z_ptr + r, tl.where(counts, z_loss * lse * lse, 0.0), mask=here)
    tl.store(row_weight_ptr + 2 * r, tl.where(counts, row_weight, 0.0), mask=here)
    tl.store(row_weight_ptr + 2 * r + 1, tl.where(counts, 1.0, 0.0), mask=here)
    tl.store(stats_ptr + 2 * r, tl.where(counts, m, 0.0), mask=here)
    tl.store(stats_ptr + 2 * r + 1, tl.where(counts, log_sum, 0.0), mask=here)


@triton.jit
def sum_losses(loss_ptr, z_ptr, row_weight_ptr, sums_ptr, rows, parts, BLOCK: tl.constexpr):
    """float64 sums of BLOCK rows: loss, z loss, weight in the mean, count; as [sum][part]."""
    part = tl.program_id(0).to(tl.int64)
    r = part * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    loss = tl.load(loss_ptr + r, mask=inside, other=0.0).to(tl.float64)
    weight = tl.load(row_weight_ptr + 2 * r, mask=inside, other=0.0).to(tl.float64)
    count = tl.load(row_weight_ptr + 2 * r + 1, mask=inside, other=0.0).to(tl.float64)
    tl.store(sums_ptr + part, tl.sum(loss, 0))
    if z_ptr is not None:
        z = tl.load(z_ptr + r, mask=inside, other=0.0).to(tl.float64)
        tl.store(sums_ptr + parts + part, tl.sum(z, 0))
    tl.store(sums_ptr + 2 * parts + part, tl.sum(weight, 0))
    tl.store(sums_ptr + 3 * parts + part, tl.sum(count, 0))


@triton.jit
def _sum_of(ptr, parts, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, parts, BLOCK):
        total += tl.load(ptr + start + i, mask=start + i < parts, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def reduce_losses(sums_ptr, out_ptr, divisors_ptr, parts, Z: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the parts' sums in a fixed order; WEIGHTED: divided into means."""
    total = _sum_of(sums_ptr, parts, BLOCK)
    weights = tl.sum(tl.full((1,), 1.0, tl.float64), 0)
    counted = weights
    if WEIGHTED:
        weights = _sum_of(sums_ptr + 2 * parts, parts, BLOCK)
        counted = _sum_of(sums_ptr + 3 * parts, parts, BLOCK)
        total = total / weights
    if Z:
        total += _sum_of(sums_ptr + parts, parts, BLOCK) / counted
    tl.store(divisors_ptr, weights.to(tl.float32))
    tl.store(divisors_ptr + 1, counted.to(tl.float32))
    tl.store(out_ptr, total.to(tl.float32).to(out_ptr.dtype.element_ty))


@triton.jit
def cross_entropy_rows_bwd(
    grad_ptr,
    x_ptr,
    target_ptr,
    p_ptr,
    weight_ptr,
    stats_ptr,
    divisors_ptr,
    dx_ptr,
    rows,
    n,
    grad_stride,
    x_stride,
    ignore_index,
    smoothing,
    z_loss,
    cap,
    weight_sum_ptr,
    CAPPED: tl.constexpr,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = slope of the cap * (softmax * (sum of the shares * scale + z) - share * scale).

    `weight_sum_ptr`: the sum of the class weights. `UNIT`: `unit_of` the logits.
    """
    n, x_stride = n // UNIT * UNIT, x_stride // UNIT * UNIT
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    here = r < rows
    grad = tl.load(grad_ptr + r * grad_stride, mask=here, other=0.0).to(tl.float32)
    scale = grad / tl.load(divisors_ptr)
    m = tl.load(stats_ptr + 2 * r, mask=here, other=0.0)
    log_sum = tl.load(stats_ptr + 2 * r + 1, mask=here, other=0.0)
    z = 2.0 * z_loss * (m + log_sum) * (grad / tl.load(divisors_ptr + 1))
    counts = here
    if KIND == PROBABILITIES:
        lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, n, BLOCK):
            lanes += _share(p_ptr, weight_ptr, r, c + start, n, here & (c + start < n), smoothing, KIND)
        shares = tl.sum(lanes, 1)[:, None]
    else:
        t = tl.load(target_ptr + r, mask=here, other=0)
        counts = here & (t != ignore_index)
        known = counts & (t >= 0) & (t < n)
        own = (1.0 - smoothing) * _class_weight(weight_ptr, t, known)
        shares = own
        if KIND == SMOOTHED:
            if weight_sum_ptr is not None:
                shares += smoothing / n * tl.load(weight_sum_ptr)
            else:
                shares += smoothing
        scale = tl.where(known, scale, float("nan"))
    for start in range(0, n, BLOCK):
        inside = here & (c + start < n)
        x = tl.load(x_ptr + r * x_stride + c + start, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            h = tanh(x * (1.0 / cap))
            x = cap * h
        if KIND == INDEX:
            share = tl.where(c + start == t, own, 0.0)
        else:
            share = _share(p_ptr, weight_ptr, r, c + start, n, inside, smoothing, KIND)
            if KIND == SMOOTHED:
                share += tl.where(c + start == t, own, 0.0)
        e = tl.exp((x - m) - log_sum)
        # Products rounded alike and then subtracted: where softmax and target agree the gradient is exactly z's.
        dx = e * z + (e * (shares * scale) - share * scale)
        if CAPPED:
            dx *= 1.0 - h * h
        dx = tl.where(counts, dx, 0.0)
        tl.store(dx_ptr + r * n + c + start, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _kind(target: Tensor, smoothing: float) -> int:
    if target.dtype.is_floating_point:
        return 2
    return 1 if smoothing else 0


def _targets(target: Tensor, kind: int) -> tuple[Tensor | None, Tensor | None]:
    """(class indices, probabilities), one of them None."""
    return (None, target.contiguous()) if kind == 2 else (target.contiguous(), None)


def _run(kernel: str, launch: Callable[[Rows], None], input: Tensor, unit: int, options: tuple[Any, ...]) -> None:
    """Launches with the tile for these logits."""
    (rows, n), arch = input.shape, arch_of(input.device.index)
    narrow = unit == 1 or input.data_ptr() % 16 != 0
    tune.run(kernel, launch, loss_config(n, rows, arch, narrow), input, arch, (rows, n), options)


def cross_entropy_fwd(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, (rows, 2) maximum and log-sum, what the mean divides loss and z loss by)."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    loss, stats, divisors = cross_entropy_fwd_fake(input, target, weight, reduction, *options)
    rows, n = input.shape
    row_loss = stats.new_empty((rows,))
    row_z = stats.new_empty((rows,)) if z_loss else None
    row_weight = stats.new_empty((rows, 2))
    if input.numel():
        kind = _kind(target, label_smoothing)
        x, targets = rows_of(input, n), _targets(target, kind)
        w, unit = None if weight is None else weight.contiguous(), unit_of(n, x)

        def launch(tile: Rows) -> None:
            cross_entropy_rows_fwd[(cdiv(rows, tile.rows),)](
                x, *targets, w, row_loss, row_z, row_weight, stats, rows, n, x.stride(0), ignore_index,
                label_smoothing, z_loss, softcap, softcap != 0, kind, unit, tile.rows, tile.block, tile.whole,
                num_warps=tile.warps,
            )  # fmt: skip

        _run("cross_entropy_fwd", launch, x, unit, (kind, softcap != 0, w is not None, row_z is not None))
    elif rows:  # of no class
        row_loss.zero_()
        row_weight.fill_(1.0)
        stats.fill_(-float("inf"))
        if row_z is not None:
            row_z.fill_(float("inf"))
    if reduction == NONE:
        divisors.fill_(1.0)
        loss.copy_(row_loss if row_z is None else row_loss + row_z)
    else:
        parts = max(cdiv(rows, 1024), 1)
        sums = stats.new_empty((4, parts), dtype=torch.float64)
        sum_losses[(parts,)](row_loss, row_z, row_weight, sums, rows, parts, 1024, num_warps=4)
        mean = reduction == MEAN
        reduce_losses[(1,)](sums, loss, divisors, parts, row_z is not None, mean, 256, num_warps=4)
    return loss, stats, divisors


def cross_entropy_bwd(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    divisors: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The gradient of the logits."""
    dx = input.new_empty(input.shape)
    if dx.numel() == 0:
        return dx
    rows, n = input.shape
    kind = _kind(target, label_smoothing)
    x, targets = rows_of(input, n), _targets(target, kind)
    w, unit = None if weight is None else weight.contiguous(), unit_of(n, x)
    weight_sum = None if w is None or kind != 1 else w.sum(dtype=stats.dtype)

    def launch(tile: Rows) -> None:
        cross_entropy_rows_bwd[(cdiv(rows, tile.rows),)](
            grad, x, *targets, w, stats, divisors, dx, rows, n, grad.stride(0) if reduction == NONE else 0,
            x.stride(0), ignore_index, label_smoothing, z_loss, softcap, weight_sum, softcap != 0, kind, unit,
            tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip

    _run("cross_entropy_bwd", launch, x, unit, (kind, softcap != 0, w is not None))
    return dx


register(
    "cross_entropy",
    (
        "(Tensor input, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, float label_smoothing, "
        "float z_loss, float softcap, bool grad_handled=False) -> (Tensor, Tensor, Tensor)",
        cross_entropy_fwd,
        cross_entropy_fwd_fake,
    ),
    (
        "(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor stats, Tensor divisors, int reduction, "
        "SymInt ignore_index, float label_smoothing, float z_loss, float softcap, bool grad_handled=False) -> Tensor",
        cross_entropy_bwd,
        cross_entropy_bwd_fake,
    ),
)
