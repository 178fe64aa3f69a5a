"""The error policy: how wrong a kernel may be. Every tolerance of the project is stated here and nowhere else.

Truth is the reference in float64; the rival is torch's own eager op in the tested dtype. A result passes where,
elementwise,

    |ours - truth| <= factor * max|rival - truth| + FLOOR[dtype] * max|truth|

with factor 2 for forward results and 3 for gradients. The floor (about one unit in the last place, eight for
float32) keeps a rival that is exact by luck from making the bound zero. NaN and infinities must be where the truth
or the rival has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
"""A forward result may be twice as wrong as torch's own."""

GRADIENT_FACTOR = 3.0
"""A gradient may be three times as wrong as torch's own."""

FLOOR: dict[torch.dtype, float] = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""What is granted beyond the rival's error, relative to the largest true value."""

MAX_BIAS_ULP = 0.25
"""How far the mean signed rounding error of a half-precision result may be from zero, in units in the last place.

Rounding to nearest gives 0 +- 0.29 / sqrt(n) for n independent values, truncation -0.5, which passes the elementwise
bound. Half of that, because results are not independent: a weight's gradient from three rows reached 0.2."""

BIAS_SAMPLES = 1024
"""The fewest values from which a bias is judged."""

MAX_ULP: dict[str, float] = {"exp": 1.1, "log": 1.0, "tanh": 1.5, "erf": 1.5, "sigmoid": 3.0}
"""Largest error of the vector math functions over all of float32 against float64, in units in the last place of
the true result, where that is a normal number."""

SUBNORMAL_ABS = 2.0**-126
"""Absolute error granted to the vector math where the true result is subnormal: it may be flushed to zero."""


class BudgetError(AssertionError):
    """A result is outside the error policy; the message says where and by how much."""


@dataclass(frozen=True)
class Measured:
    """What a comparison found, in absolute terms."""

    error: float
    """max|ours - truth| over the finite elements."""
    rival_error: float
    """max|rival - truth| over the finite elements."""
    allowed: float
    """The bound that applied."""


def assert_within_budget(
    ours: Tensor, truth: Tensor, rival: Tensor, dtype: torch.dtype, factor: float, *, where: str = ""
) -> Measured:
    """Raises BudgetError unless `ours` is within the policy.

    Args:
        ours: the result under test, of type `dtype`.
        truth: the same in float64, computed by the reference from the same (upcast) inputs.
        rival: torch's own result in `dtype`.
        dtype: the type that was asked for.
        factor: `FORWARD_FACTOR` or `GRADIENT_FACTOR`.
        where: what ran (case, backend, instruction set), for the message.

    Returns:
        The errors measured.
    """
    if ours.dtype != dtype or ours.shape != truth.shape or rival.shape != truth.shape:
        raise BudgetError(
            f"{where}: expected {dtype} {tuple(truth.shape)}, got {ours.dtype} {tuple(ours.shape)} "
            f"(rival {rival.dtype} {tuple(rival.shape)})"
        )
    ours64, rival64, truth64 = (t.detach().to(torch.float64) for t in (ours, rival, truth))
    _check_special_values(ours64, truth64, rival64, dtype, where)
    finite = ours64.isfinite() & rival64.isfinite() & truth64.isfinite()
    if not finite.any():
        return Measured(0.0, 0.0, 0.0)
    error = torch.where(finite, (ours64 - truth64).abs(), 0.0)
    rival_error = torch.where(finite, (rival64 - truth64).abs(), 0.0).max().item()
    scale = torch.where(finite, truth64.abs(), 0.0).max().item()
    allowed = factor * rival_error + FLOOR[dtype] * scale
    measured = Measured(error.max().item(), rival_error, allowed)
    if measured.error > allowed:
        worst = _unravel(int(error.argmax()), error.shape)
        raise BudgetError(
            f"{where}: error {measured.error:.4g} at index {worst} is above {allowed:.4g} = {factor:g} x torch's "
            f"{rival_error:.4g} + {FLOOR[dtype]:g} x {scale:.4g} ({dtype}): ours {ours64[worst].item():.9g}, "
            f"truth {truth64[worst].item():.9g}, torch {rival64[worst].item():.9g}; "
            f"{int((error > allowed).sum())} of {error.numel()} elements are outside"
        )
    return measured


def _check_special_values(ours: Tensor, truth: Tensor, rival: Tensor, dtype: torch.dtype, where: str) -> None:
    """NaN and infinities where the truth, rounded to `dtype`, or the rival has them; finite where both are."""
    rounded = truth.to(dtype).to(torch.float64)
    kinds = [_kind(t) for t in (ours, rounded, rival)]
    wrong = (kinds[0] != kinds[1]) & (kinds[0] != kinds[2])
    if wrong.any():
        worst = _unravel(int(wrong.int().argmax()), wrong.shape)
        raise BudgetError(
            f"{where}: NaN or infinity out of place at index {worst} ({dtype}): ours {ours[worst].item()}, "
            f"truth {truth[worst].item()}, torch {rival[worst].item()}; {int(wrong.sum())} of {wrong.numel()} elements"
        )


def _kind(t: Tensor) -> Tensor:
    """0 finite, 1 +inf, 2 -inf, 3 NaN."""
    return t.isposinf().to(torch.int8) + 2 * t.isneginf().to(torch.int8) + 3 * t.isnan().to(torch.int8)


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))


def rounding_bias(ours: Tensor, truth: Tensor) -> float | None:
    """Mean of (|ours| - |truth|) in units in the last place of `ours`' type; None where too few values can tell.

    Only values that are normal, finite and not exact in the narrow type count.
    """
    dtype = ours.dtype
    info = torch.finfo(dtype)
    ours64, truth64 = ours.detach().double().flatten(), truth.detach().double().flatten()
    counts = (
        ours64.isfinite()
        & truth64.isfinite()
        & (truth64.abs() > info.tiny * 2)
        & (truth64.to(dtype).double() != truth64)
    )
    if int(counts.sum()) < BIAS_SAMPLES:
        return None
    ours64, truth64 = ours64[counts], truth64[counts]
    ulp = torch.exp2(torch.floor(torch.log2(truth64.abs()))) * info.eps
    error = (ours64.abs() - truth64.abs()) / ulp
    return float(error[error.abs() <= 1].mean()) if bool((error.abs() <= 1).any()) else None


def assert_unbiased(ours: Tensor, truth: Tensor, rival: Tensor, *, where: str = "") -> None:
    """Raises BudgetError where a half-precision result is rounded systematically up or down.

    The rival's own bias is granted on top: values on a grid (log-softmax of one long row) are not spread evenly.
    """
    if ours.dtype not in (torch.float16, torch.bfloat16):
        return
    bias, granted = rounding_bias(ours, truth), rounding_bias(rival, truth)
    if bias is None or granted is None:
        return
    allowed = MAX_BIAS_ULP + abs(granted)
    if abs(bias) > allowed:
        raise BudgetError(f"{where}: mean rounding error {bias:+.3f} ulp ({ours.dtype}), allowed +-{allowed:.3f}")


def assert_bites(truth: Tensor, *, where: str = "") -> None:
    """Raises BudgetError where a case could pass by accident: its true output is all near zero.

    At least one value in eight must be above a thousandth of the largest, and the largest above 1e-5.
    """
    values = truth.detach().abs().flatten()
    values = values[values.isfinite()]
    if values.numel() == 0:
        return
    top = values.max().item()
    share = (values > 1e-3 * top).double().mean().item()
    if top < 1e-5 or share < 1 / 8:
        raise BudgetError(f"{where}: the case does not bite: largest {top:.3g}, {share:.0%} of the values matter")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and equal bits (NaN equal to itself, 0.0 not to -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) if t.numel() else t.flatten() for t in (a, b)]
    return bool(torch.equal(*as_bytes))
