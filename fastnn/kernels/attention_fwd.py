"""Attention forward: one block of queries against all keys it sees, softmax online, nothing of size S_q x S_k."""

import triton
import triton.language as tl

from .attention_tile import end_key, finish_scores, first_key, kept

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _blocks(
    q,
    acc,
    top,
    total,
    low,
    high,
    m,
    k_base,
    v_base,
    S_q,
    S_k,
    D,
    D_v,
    k_row,
    v_row,
    scale,
    softcap,
    left,
    right,
    mask_base,
    mask_row,
    mask_col,
    seed,
    threshold,
    keep_scale,
    row_base,
    groups,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
    PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
):
    """Keys [low, high) block by block.

    PLAIN: scores are only scaled, by a positive number; the maximum is then in units of log2, and scaling, subtracting
    it and the exponential are two instructions. Other scores may be large and would lose digits on the way there and
    back: they go there after the maximum is subtracted.
    """
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    j = tl.arange(0, BN)
    first = (low + j).to(tl.int64)
    k_at = k_base + first[None, :] * k_row + d[:, None]
    v_at = v_base + first[:, None] * v_row + dv[None, :]
    step = tl.full((1, 1), BN, tl.int64)
    for start in range(low, high, BN):
        n = start + j
        if EDGE:
            k = tl.load(k_at, mask=(n < S_k)[None, :] & (d < D)[:, None], other=0.0)
        elif BD == D:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=(d < D)[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION)
        if not PLAIN:
            s *= scale
        s, _ = finish_scores(
            s, m[:, None], n[None, :], S_q, S_k, softcap, left, right, mask_base, mask_row, mask_col,
            SOFTCAP, MASK, HAS_LEFT, HAS_RIGHT, EDGE,
        )  # fmt: skip
        if PLAIN:
            new = tl.maximum(top, tl.max(s, 1) * (scale * LOG2_E))
        else:
            new = tl.maximum(top, tl.max(s, 1))
        # Nothing seen yet: 0 instead of -inf keeps -inf - -inf out; every 2^(-inf - 0) is 0.
        safe = tl.where(new == -float("inf"), 0.0, new)
        if PLAIN:
            p = tl.exp2(s * (scale * LOG2_E) - safe[:, None])
            correction = tl.exp2(top - safe)
        else:
            p = tl.exp2((s - safe[:, None]) * LOG2_E)
            correction = tl.exp2((top - safe) * LOG2_E)
        total = total * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        top = new
        if DROPOUT:
            p = tl.where(kept(seed, threshold, m.to(tl.int64), start, row_base, groups, BM, BN), p * keep_scale, 0.0)
        if EDGE:
            v = tl.load(v_at, mask=(n < S_k)[:, None] & (dv < D_v)[None, :], other=0.0)
        elif BDV == D_v:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=(dv < D_v)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        k_at += step * k_row
        v_at += step * v_row
    return acc, top, total


@triton.jit
def attention_rows_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    H,
    S_q,
    S_k,
    D,
    D_v,
    group,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_col,
    out_batch,
    out_head,
    out_row,
    scale,
    softcap,
    left,
    right,
    seed,
    threshold,
    keep_scale,
    tiles,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    PLAIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
):
    """BM queries of one head. The last tiles, which see the most keys where attention is causal, start first."""
    program = tl.program_id(0).to(tl.int64)
    tile = (tiles - 1 - program % tiles).to(tl.int32)
    bh = program // tiles
    b, h = bh // H, bh % H
    m0 = tile * BM
    m = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    rows = m.to(tl.int64)[:, None]
    q = tl.load(
        q_ptr + b * q_batch + h * q_head + rows * q_row + d[None, :],
        mask=(m < S_q)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    k_base = k_ptr + b * k_batch + h // group * k_head
    v_base = v_ptr + b * v_batch + h // group * v_head
    mask_base = mask_ptr
    if MASK != 0:
        mask_base = mask_ptr + b * mask_batch + h * mask_head
    row_base = bh * S_q
    groups = (S_k + 3) // 4
    acc = tl.zeros((BM, BDV), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    low = first_key(m0, left, HAS_LEFT, BN)
    high = end_key(m0, right, S_k, HAS_RIGHT, BM)
    # Whole blocks that every query of the tile sees need no comparison.
    whole_low = low
    if HAS_LEFT:
        whole_low = tl.minimum(tl.maximum((m0 + BM - 1 - left + BN - 1) // BN * BN, low), high)
    whole_high = high // BN * BN
    if HAS_RIGHT:
        whole_high = tl.minimum(tl.maximum(m0 + right + 1, 0) // BN * BN, whole_high)
    whole_high = tl.maximum(whole_high, whole_low)
    if HAS_LEFT:
        acc, top, total = _blocks(
            q, acc, top, total, low, whole_low, m, k_base, v_base, S_q, S_k, D, D_v, k_row, v_row, scale, softcap, left,
            right, mask_base, mask_row, mask_col, seed, threshold, keep_scale, row_base, groups,
            SOFTCAP, MASK, DROPOUT, HAS_LEFT, HAS_RIGHT, True, PLAIN, PRECISION, BM, BN, BD, BDV,
        )  # fmt: skip
    acc, top, total = _blocks(
        q, acc, top, total, whole_low, whole_high, m, k_base, v_base, S_q, S_k, D, D_v, k_row, v_row, scale, softcap,
        left, right, mask_base, mask_row, mask_col, seed, threshold, keep_scale, row_base, groups,
        SOFTCAP, MASK, DROPOUT, HAS_LEFT, HAS_RIGHT, False, PLAIN, PRECISION, BM, BN, BD, BDV,
    )  # fmt: skip
    acc, top, total = _blocks(
        q, acc, top, total, whole_high, high, m, k_base, v_base, S_q, S_k, D, D_v, k_row, v_row, scale, softcap, left,
        right, mask_base, mask_row, mask_col, seed, threshold, keep_scale, row_base, groups,
        SOFTCAP, MASK, DROPOUT, HAS_LEFT, HAS_RIGHT, True, PLAIN, PRECISION, BM, BN, BD, BDV,
    )  # fmt: skip
    nothing = total == 0.0
    acc = acc * tl.where(nothing, 0.0, 1.0 / total)[:, None]
    if PLAIN:
        top *= LN_2
    lse = tl.where(nothing, float("inf"), top + tl.log(total))
    tl.store(lse_ptr + row_base + m, lse, mask=m < S_q)
    out = out_ptr + b * out_batch + h * out_head + rows * out_row + dv[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < S_q)[:, None] & (dv < D_v)[None, :])
