"""Rounding a weight one column after another, each one's error made up for by those that follow (GPTQ).

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, accurate post-training quantization for generative pre-trained
transformers, 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.groups import bits_of, dequantize_groups, pack_nibbles, quantize_groups

_TRIES = 6
"""Each with ten times the damping."""

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Codes, scale, offset: as `quantize_groups` gives them."""


@dataclass(frozen=True)
class Gptq:
    """Rounding that keeps a layer's outputs on the calibration near to what they were, not each weight to itself.

    Columns are rounded in turns; what one loses is made up for by those that are still to come, as far as the inputs
    of the calibration go together. Scales are those of rounding to nearest.
    """

    activation_order: bool = True
    """Columns with the largest inputs first, while all others are there to make up for them; else as they lie."""
    damping: float = 0.01
    """This share of the mean square of the inputs is added to each one's; more where that does not suffice."""
    block_size: int = 128
    """So many columns are rounded before the ones beyond them are corrected."""

    def __post_init__(self) -> None:
        if type(self.activation_order) is not bool:
            raise ValueError(f"fastnn.Gptq: activation_order must be True or False, got {self.activation_order!r}")
        if not 0 < self.damping < 1:
            raise ValueError(f"fastnn.Gptq: damping must be above 0 and below 1, got {self.damping!r}")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"fastnn.Gptq: block_size must be a positive int, got {self.block_size!r}")


@dataclass(frozen=True)
class Rounded:
    """A weight's codes, and what they cost."""

    parts: Parts
    error: float
    """Of the outputs on the calibration: norm of the difference / norm."""
    nearest: float
    """The same of rounding to nearest."""
    remark: str
    """What did not go as usual, in words."""


def output_error(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """|X (W - W')^T| / |X W^T| (Frobenius), of the rows X whose X^T X is `gram`; 0 where both are."""
    gram, off = gram.double(), (weight - found).double()
    lost, whole = ((w @ gram * w).sum().clamp_min(0).sqrt() for w in (off, weight.double()))
    return float(lost / whole) if float(whole) else 0.0


def factor(gram: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Upper triangular U with U^T U = inverse of (gram + damping x mean of its diagonal), and the damping it took.

    The gram with rows and columns reversed has the Cholesky factor L; U is the inverse of L reversed, so that one
    factor and one triangular inverse do, and the inverse itself is never formed. None where no damping helps.
    """
    size = gram.shape[0]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal().mean()
    for _ in range(_TRIES):
        damped = gram + damping * mean * eye
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if bool(upper.isfinite().all()):
                return upper, damping
        damping *= 10
    return None, damping


def gptq(weight: Tensor, gram: Tensor, group_size: int, bits: int, symmetric: bool, options: Gptq) -> Rounded:
    """Codes for a weight whose inputs had `gram` (sum of x^T x), groups and scales as `quantize_groups` has them.

    Never worse than rounding to nearest on these inputs: where it would be, that is what is given, with a remark.

    Args:
        weight: (out_features, in_features), finite, of a floating type.
        gram: (in_features, in_features), finite.
        group_size, bits, symmetric: as in `quantize_groups`.
        options: how.
    """
    weight, gram = weight.detach().float(), gram.double()
    columns, size = weight.shape[1], max(min(group_size, weight.shape[1]), 1)

    def value(parts: Parts) -> Tensor:
        return dequantize_groups(*parts, columns, size, torch.float32)

    near = quantize_groups(weight, size, bits=bits, symmetric=symmetric)
    nearest = output_error(weight, value(near), gram)
    order = gram.diagonal().argsort(descending=True, stable=True)
    if not options.activation_order:
        order = torch.arange(columns, device=weight.device)
    upper, damping = factor(gram[order][:, order], options.damping)
    if upper is None:
        return Rounded(near, nearest, nearest, "rounded to nearest: no damping makes its inputs' products invertible")
    codes = _codes(weight, upper.float(), order, near, size, options.block_size)
    parts = (codes.to(torch.int8) if bits == 8 else pack_nibbles(codes.to(torch.uint8))), near[1], near[2]
    error = output_error(weight, value(parts), gram)
    if not error < nearest:
        return Rounded(near, nearest, nearest, "rounded to nearest, which GPTQ did not better")
    return Rounded(parts, error, nearest, "" if damping == options.damping else f"damping {damping:g}")


def _codes(weight: Tensor, upper: Tensor, order: Tensor, near: Parts, size: int, block: int) -> Tensor:
    """The codes, as numbers (out_features, in_features); columns are rounded in `order`, that of `upper`."""
    bits, offset = bits_of(near[0]), near[2]
    zero = 8 if bits == 4 and offset is None else 0
    lowest, highest = (-127, 127) if bits == 8 else (0, 15)
    group = order // size
    # Transposed, so that a column is a row of memory; what the codes 0 and 1 stand for, column by column.
    steps = near[1].float().t()[group]
    base = -zero * steps if offset is None else offset.float().t()[group]
    left, codes = weight.t()[order].contiguous(), torch.empty_like(steps)
    columns = left.shape[0]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        lost = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            code = torch.where(steps[i] != 0, (left[i] - base[i]) / steps[i], float(zero)).round_()
            codes[i] = code.clamp_(lowest, highest)
            lost[i - start] = (left[i] - (codes[i] * steps[i] + base[i])) / upper[i, i]
            left[i + 1 : stop].addr_(upper[i, i + 1 : stop], lost[i - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].t(), lost, alpha=-1)
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t().contiguous()
