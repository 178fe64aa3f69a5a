"""What attention's forward and backward kernels share: scores of a tile and dropout."""

import triton
import triton.language as tl

from .activation import tanh


@triton.jit
def first_key(m0, left, HAS_LEFT: tl.constexpr, BN: tl.constexpr):
    """The first block of keys that queries m0, m0 + 1, ... see, rounded down to blocks."""
    low = 0
    if HAS_LEFT:
        low = tl.maximum(m0 - left, 0) // BN * BN
    return low


@triton.jit
def end_key(m0, right, S_k, HAS_RIGHT: tl.constexpr, BM: tl.constexpr):
    """One past the last key that queries m0 .. m0 + BM - 1 see."""
    high = S_k
    if HAS_RIGHT:
        high = tl.minimum(S_k, tl.maximum(m0 + BM + right, 0))
    return high


@triton.jit
def finish_scores(
    s,
    m,
    n,
    S_q,
    S_k,
    softcap,
    left,
    right,
    mask_ptr,
    mask_row,
    mask_col,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(scores capped, masked and -inf where a key is not seen, derivative of the cap). `m`, `n` broadcast to a tile.

    EDGE: the tile may reach beyond the last key or the window.
    """
    slope = 1.0
    if SOFTCAP:
        h = tanh(s / softcap)
        s = softcap * h
        slope = 1.0 - h * h
    if MASK != 0:
        at = mask_ptr + m.to(tl.int64) * mask_row + n.to(tl.int64) * mask_col
        inside = (m < S_q) & (n < S_k)
        if MASK == 1:
            s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, -float("inf"))
        else:
            s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if EDGE:
        seen = n < S_k
        if HAS_LEFT:
            seen = seen & (n >= m - left)
        if HAS_RIGHT:
            seen = seen & (n <= m + right)
        s = tl.where(seen, s, -float("inf"))
    return s, slope


@triton.jit
def kept(seed, threshold, m, n0, row_base, groups, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN) of booleans: whether dropout keeps the weight of query m and key n0 + j. n0 is a multiple of 4.

    Philox4x32-10 of (seed, position of the group of four neighbouring keys), as on every backend.
    """
    wide = tl.zeros((1, 1), tl.int64) + seed
    k0 = (wide & 0xFFFFFFFF).to(tl.uint32)
    k1 = (wide >> 32).to(tl.uint32)
    group = n0 // 4 + tl.arange(0, BN // 4)[None, :]
    counter = (row_base + m[:, None]) * groups + group
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    zero = tl.zeros((BM, BN // 4), tl.uint32)
    r0, r1, r2, r3 = tl.philox_impl(c0, c1, zero, zero, k0 + zero, k1 + zero, 10)
    random = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BM, BN)
    return random.to(tl.int64) >= threshold
