"""Attention backward: weights again from the logsumexp; one kernel for dq, one for dk and dv, no atomic sums."""

import triton
import triton.language as tl

from .attention_tile import end_key, finish_scores, first_key, kept

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_delta(
    do_ptr,
    out_ptr,
    delta_ptr,
    H,
    S_q,
    D_v,
    rows,
    do_batch,
    do_head,
    do_row,
    out_batch,
    out_head,
    out_row,
    ROWS: tl.constexpr,
    BDV: tl.constexpr,
):
    """sum(d_out * out) of each query."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dv = tl.arange(0, BDV)[None, :]
    m = (r % S_q)[:, None]
    h = (r // S_q % H)[:, None]
    b = (r // S_q // H)[:, None]
    inside = (r < rows)[:, None] & (dv < D_v)
    do = tl.load(do_ptr + b * do_batch + h * do_head + m * do_row + dv, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + b * out_batch + h * out_head + m * out_row + dv, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + r, tl.sum(do * out, 1), mask=r < rows)


@triton.jit
def attention_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    do_batch,
    do_head,
    do_row,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
):
    """dq of BM queries: ds k scale over the keys they see."""
    program = tl.program_id(0).to(tl.int64)
    tile = (tiles - 1 - program % tiles).to(tl.int32)
    bh = program // tiles
    b, h = bh // H, bh % H
    m0 = tile * BM
    m = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    rows = m.to(tl.int64)[:, None]
    here = (m < S_q)[:, None]
    q = tl.load(q_ptr + b * q_batch + h * q_head + rows * q_row + d[None, :], mask=here & (d < D)[None, :], other=0.0)
    do = tl.load(
        do_ptr + b * do_batch + h * do_head + rows * do_row + dv[None, :], mask=here & (dv < D_v)[None, :], other=0.0
    )
    row_base = bh * S_q
    lse = tl.load(lse_ptr + row_base + m, mask=m < S_q, other=float("inf"))
    delta = tl.load(delta_ptr + row_base + m, mask=m < S_q, other=0.0)
    k_base = k_ptr + b * k_batch + h // group * k_head
    v_base = v_ptr + b * v_batch + h // group * v_head
    mask_base = mask_ptr
    if MASK != 0:
        mask_base = mask_ptr + b * mask_batch + h * mask_head
    groups = (S_k + 3) // 4
    dq = tl.zeros((BM, BD), tl.float32)
    for start in range(first_key(m0, left, HAS_LEFT, BN), end_key(m0, right, S_k, HAS_RIGHT, BM), BN):
        n = start + tl.arange(0, BN)
        keys = n.to(tl.int64)[:, None]
        there = (n < S_k)[:, None]
        k = tl.load(k_base + keys * k_row + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        v = tl.load(v_base + keys * v_row + dv[None, :], mask=there & (dv < D_v)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s, slope = finish_scores(
            s, m[:, None], n[None, :], S_q, S_k, softcap, left, right, mask_base, mask_row, mask_col,
            SOFTCAP, MASK, HAS_LEFT, HAS_RIGHT, True,
        )  # fmt: skip
        p = tl.exp2((s - lse[:, None]) * LOG2_E)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed, threshold, m.to(tl.int64), start, row_base, groups, BM, BN)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= slope
        # A weight of 0 has gradient 0 even where dp is infinite or NaN: the key was not seen.
        ds = tl.where(p == 0.0, 0.0, ds)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    at = dq_ptr + (row_base + rows) * D + d[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=here & (d < D)[None, :])


@triton.jit
def attention_dkv(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    H,
    H_kv,
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
    do_batch,
    do_head,
    do_row,
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
    WANTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
):
    """dk and dv of BN keys of one key head, from all queries that see them, head by head.

    WANTS: 3 both, 1 dk, 2 dv: one sum at a time takes half of the registers and the scores twice.
    """
    program = tl.program_id(0).to(tl.int64)
    n0 = (program % tiles).to(tl.int32) * BN
    bh = program // tiles
    b, h_kv = bh // H_kv, bh % H_kv
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    keys = n.to(tl.int64)[:, None]
    there = (n < S_k)[:, None]
    in_k, in_v = there & (d < D)[None, :], there & (dv < D_v)[None, :]
    k = tl.load(k_ptr + b * k_batch + h_kv * k_head + keys * k_row + d[None, :], mask=in_k, other=0.0)
    v = tl.load(v_ptr + b * v_batch + h_kv * v_head + keys * v_row + dv[None, :], mask=in_v, other=0.0)
    groups = (S_k + 3) // 4
    low = tl.maximum(n0 - right, 0) // BM * BM if HAS_RIGHT else 0
    high = tl.minimum(S_q, n0 + BN + left) if HAS_LEFT else S_q
    sum_k = tl.zeros((BN, BD), tl.float32)
    sum_v = tl.zeros((BN, BDV), tl.float32)
    for member in range(group):
        h = h_kv * group + member
        q_base = q_ptr + b * q_batch + h * q_head
        do_base = do_ptr + b * do_batch + h * do_head
        row_base = (b * H + h) * S_q
        mask_base = mask_ptr
        if MASK != 0:
            mask_base = mask_ptr + b * mask_batch + h * mask_head
        for start in range(low, high, BM):
            m = start + tl.arange(0, BM)
            rows = m.to(tl.int64)[:, None]
            here = (m < S_q)[:, None]
            q = tl.load(q_base + rows * q_row + d[None, :], mask=here & (d < D)[None, :], other=0.0)
            do = tl.load(do_base + rows * do_row + dv[None, :], mask=here & (dv < D_v)[None, :], other=0.0)
            lse = tl.load(lse_ptr + row_base + m, mask=m < S_q, other=float("inf"))
            delta = tl.load(delta_ptr + row_base + m, mask=m < S_q, other=0.0)
            # Transposed, keys by queries, so that P^T and dS^T are operands as they are.
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            s, slope = finish_scores(
                s, m[None, :], n[:, None], S_q, S_k, softcap, left, right, mask_base, mask_row, mask_col,
                SOFTCAP, MASK, HAS_LEFT, HAS_RIGHT, True,
            )  # fmt: skip
            p = tl.exp2((s - lse[None, :]) * LOG2_E)
            if DROPOUT:
                keep = tl.trans(kept(seed, threshold, m.to(tl.int64), n0, row_base, groups, BM, BN))
            if WANTS & 2:
                dropped = tl.where(keep, p * keep_scale, 0.0) if DROPOUT else p
                sum_v = tl.dot(dropped.to(do.dtype), do, sum_v, input_precision=PRECISION)
            if WANTS & 1:
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                if DROPOUT:
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                ds = p * (dp - delta[None, :])
                if SOFTCAP:
                    ds *= slope
                ds = tl.where(p == 0.0, 0.0, ds)
                sum_k = tl.dot(ds.to(q.dtype), q, sum_k, input_precision=PRECISION)
    row = bh * S_k + keys
    if WANTS & 1:
        tl.store(dk_ptr + row * D + d[None, :], (sum_k * scale).to(dk_ptr.dtype.element_ty), mask=in_k)
    if WANTS & 2:
        tl.store(dv_ptr + row * D_v + dv[None, :], sum_v.to(dv_ptr.dtype.element_ty), mask=in_v)
