"""Sums of partial sums, in a fixed order: no atomic operation, the same bits in every run."""

import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv


@triton.jit
def sum_parts(parts_ptr, out_ptr, parts, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Column sums of a contiguous float32 (parts, n), in a fixed order."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    lanes = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, parts, ROWS):
        r = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        lanes += tl.load(parts_ptr + r * n + c, mask=(r < parts) & (c < n), other=0.0)
    tl.store(out_ptr + c, tl.sum(lanes, 0)[None, :].to(out_ptr.dtype.element_ty), mask=c < n)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """`out` = the sum of `parts` (parts, n) float32 over its first dimension."""
    n = out.numel()
    sum_parts[(cdiv(n, 32),)](parts, out, parts.shape[0], n, 64, 32, num_warps=4)
