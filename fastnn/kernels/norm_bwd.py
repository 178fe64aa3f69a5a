"""The backward kernels of layer norm and RMS norm."""

import triton
import triton.language as tl


@triton.jit
def norm_bwd_whole(
    dy_ptr,
    d_total_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    n,
    dy_stride,
    d_total_stride,
    x_stride,
    tiles,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`tiles` tiles of ROWS whole rows: dx of each, and this program's row of the partial dw and db."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    weight = tl.full((1, BLOCK), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < n, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tiles, num_stages=STAGES):  # the next tiles are on their way
        r = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (r < rows) & (c < n)
        dy = tl.load(dy_ptr + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + 2 * r, mask=r < rows, other=0.0)
        rstd = tl.load(stats_ptr + 2 * r + 1, mask=r < rows, other=0.0)
        h = tl.where(inside, (x - mean) * rstd, 0.0)
        if dx_ptr is not None:
            g = dy * weight
            dx = g - h * (tl.sum(g * h, 1)[:, None] / n)
            if not RMS:
                dx -= tl.sum(g, 1)[:, None] / n
            dx *= rstd
            if d_total_ptr is not None:
                dx += tl.load(d_total_ptr + r * d_total_stride + c, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + r * n + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dw_ptr is not None:
            dw += dy * h
        if db_ptr is not None:
            db += dy
    if dw_ptr is not None:
        tl.store(dw_ptr + program * n + c, tl.sum(dw, 0)[None, :], mask=c < n)
    if db_ptr is not None:
        tl.store(db_ptr + program * n + c, tl.sum(db, 0)[None, :], mask=c < n)


@triton.jit
def norm_bwd_long(
    dy_ptr,
    d_total_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    dx_ptr,
    n,
    dy_stride,
    d_total_stride,
    x_stride,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of one row, block by block."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    mean = tl.load(stats_ptr + 2 * r)
    rstd = tl.load(stats_ptr + 2 * r + 1)
    sum_g = tl.zeros((1, BLOCK), tl.float32)
    sum_gh = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        inside = c + start < n
        g = tl.load(dy_ptr + r * dy_stride + c + start, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + c + start, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + r * x_stride + c + start, mask=inside, other=0.0).to(tl.float32)
        h = tl.where(inside, (x - mean) * rstd, 0.0)
        sum_g += g
        sum_gh += g * h
    mean_g = tl.sum(sum_g, 1)[:, None] / n
    mean_gh = tl.sum(sum_gh, 1)[:, None] / n
    for start in range(0, n, BLOCK):
        inside = c + start < n
        g = tl.load(dy_ptr + r * dy_stride + c + start, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + c + start, mask=inside, other=0.0).to(tl.float32)
        h = (tl.load(x_ptr + r * x_stride + c + start, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        dx = g - h * mean_gh
        if not RMS:
            dx -= mean_g
        dx *= rstd
        if d_total_ptr is not None:
            dx += tl.load(d_total_ptr + r * d_total_stride + c + start, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + r * n + c + start, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_columns(
    dy_ptr,
    x_ptr,
    stats_ptr,
    dw_ptr,
    db_ptr,
    rows,
    n,
    dy_stride,
    x_stride,
    part_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial dw and db of BLOCK columns over one part of the rows."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = tl.program_id(1).to(tl.int64)
    end = tl.minimum(rows, (part + 1) * part_rows)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * part_rows, end, ROWS):
        r = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (r < end) & (c < n)
        dy = tl.load(dy_ptr + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
        if dw_ptr is not None:
            x = tl.load(x_ptr + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(stats_ptr + 2 * r, mask=r < end, other=0.0)
            rstd = tl.load(stats_ptr + 2 * r + 1, mask=r < end, other=0.0)
            dw += tl.where(inside, dy * ((x - mean) * rstd), 0.0)
        db += dy
    if dw_ptr is not None:
        tl.store(dw_ptr + part * n + c, tl.sum(dw, 0)[None, :], mask=c < n)
    if db_ptr is not None:
        tl.store(db_ptr + part * n + c, tl.sum(db, 0)[None, :], mask=c < n)
