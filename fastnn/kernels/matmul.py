"""The matrix product that linear's passes are: C = epilogue(A B), A and B with any strides, float32 accumulation."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._dispatch import allows_tf32
from . import tune
from .activation import activate
from .config import Product, arch_of, cdiv, matmul_config


@triton.jit
def matmul(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    pre_ptr,
    M,
    N,
    K,
    a_row,
    a_col,
    b_row,
    b_col,
    split_k,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One BM x BN tile of C; with PARTS > 1 of one part of K, as float32 partial products [part][M][N]."""
    program = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # GROUP rows of tiles go through all columns together: their parts of A and B are then in the L2 cache.
    per_group = GROUP * tiles_n
    first = program // per_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m = (first + program % per_group % height).to(tl.int64) * BM + tl.arange(0, BM)
    n = (program % per_group // height).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    start = part * split_k
    end = tl.minimum(start + split_k, K)
    a = a_ptr + m[:, None] * a_row + (start + k)[None, :].to(tl.int64) * a_col
    b = b_ptr + (start + k)[:, None].to(tl.int64) * b_row + n[None, :] * b_col
    step = tl.full((1, 1), BK, tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(start, end, BK):
        if EVEN_M and EVEN_K:
            x = tl.load(a)
        elif EVEN_K:
            x = tl.load(a, mask=(m < M)[:, None], other=0.0)
        else:
            x = tl.load(a, mask=(m < M)[:, None] & (at + k < end)[None, :], other=0.0)
        if EVEN_N and EVEN_K:
            w = tl.load(b)
        elif EVEN_K:
            w = tl.load(b, mask=(n < N)[None, :], other=0.0)
        else:
            w = tl.load(b, mask=(at + k < end)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        a += step * a_col
        b += step * b_row
    _epilogue(acc, bias_ptr, c_ptr, pre_ptr, part, m, n, M, N, ACTIVATION, PARTS)


@triton.jit
def _epilogue(acc, bias_ptr, c_ptr, pre_ptr, part, m, n, M, N, ACTIVATION: tl.constexpr, PARTS: tl.constexpr):
    """Writes a tile: the partial product as it is, or with bias and activation."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    out = m.to(tl.int64)[:, None] * N + n[None, :]
    if PARTS > 1:
        tl.store(c_ptr + part.to(tl.int64) * M * N + out, acc, mask=inside)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + out, acc.to(pre_ptr.dtype.element_ty), mask=inside)
        tl.store(c_ptr + out, activate(acc, ACTIVATION).to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def matmul_bulk(
    a_tiles,
    b_tiles,
    bias_ptr,
    c_ptr,
    pre_ptr,
    M,
    N,
    K,
    split_k,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    PARTS: tl.constexpr,
    WRITTEN: tl.constexpr,
):
    """As `matmul`, whole tiles of A and B fetched by the copy engine, zeros beyond the edges. TURNED: from A^T, B^T."""
    program = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    per_group = GROUP * tiles_n
    first = program // per_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m0 = (first + program % per_group % height) * BM
    n0 = (program % per_group // height) * BN
    start = part * split_k
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(start, tl.minimum(start + split_k, K), BK):
        if A_TURNED:
            x = a_tiles.load([at, m0]).T
        else:
            x = a_tiles.load([m0, at])
        if B_TURNED:
            w = b_tiles.load([n0, at]).T
        else:
            w = b_tiles.load([at, n0])
        acc = tl.dot(x, w, acc)
    m = m0 + tl.arange(0, BM)
    if BN <= WRITTEN:
        _epilogue(acc, bias_ptr, c_ptr, pre_ptr, part, m, n0 + tl.arange(0, BN), M, N, ACTIVATION, PARTS)
    else:
        # WRITTEN columns, half of them, at a time: the other half's addresses and activations need no registers then.
        half = n0 + tl.arange(0, BN // 2)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        _epilogue(left, bias_ptr, c_ptr, pre_ptr, part, m, half, M, N, ACTIVATION, PARTS)
        _epilogue(right, bias_ptr, c_ptr, pre_ptr, part, m, half + BN // 2, M, N, ACTIVATION, PARTS)


@triton.jit
def finish_parts(
    parts_ptr, bias_ptr, c_ptr, pre_ptr, total, N, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The partial products added up in a fixed order, and the epilogue."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        acc += tl.load(parts_ptr + part * total + i, mask=inside, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    if pre_ptr is not None:
        tl.store(pre_ptr + i, acc.to(pre_ptr.dtype.element_ty), mask=inside)
    tl.store(c_ptr + i, activate(acc, ACTIVATION).to(c_ptr.dtype.element_ty), mask=inside)


def precision_of(x: Tensor) -> str:
    """How float32 operands are multiplied: in full unless torch's own setting allows TF32."""
    return "tf32" if x.is_cuda and allows_tf32() else "ieee"


def _bulky(t: Tensor) -> bool:
    """Whether the copy engine takes a matrix as it lies."""
    row, column = t.stride()
    return column == 1 and row * t.element_size() % 16 == 0 and row >= t.shape[1] and t.data_ptr() % 16 == 0


def _apart(t: Tensor) -> Tensor:
    """A copy of a matrix whose rows, or columns where those are contiguous, begin at 16 bytes."""
    if t.stride(0) == 1:
        return _apart(t.t()).t()
    copy = t.new_empty((t.shape[0], cdiv(t.shape[1], 16) * 16))[:, : t.shape[1]]
    return copy.copy_(t)


def _tiles(t: Tensor, rows: int, columns: int) -> tuple[TensorDescriptor | None, bool]:
    """How the copy engine fetches rows x columns of a matrix, and whether from its transpose; None where it cannot."""
    for turned, matrix in ((False, t), (True, t.t())):
        if _bulky(matrix):
            block = [columns, rows] if turned else [rows, columns]
            return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block), turned
    return None, False


def product(
    a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None = None, pre: Tensor | None = None, activation: int = 0
) -> None:
    """c = activation(a @ b + bias) for 2-d a (M, K) and b (K, N) of any strides, c contiguous; `pre` before that."""
    (M, K), N = a.shape, b.shape[1]
    if M == 0 or N == 0:
        return
    arch = arch_of(a.device.index)
    precision = precision_of(a)
    bulky = [_bulky(t) or _bulky(t.t()) for t in (a, b)]
    cut = matmul_config(M, N, K, a.element_size(), precision, arch, not all(bulky))
    if cut.apart and K:
        a, b = (t if fits else _apart(t) for t, fits in zip((a, b), bulky, strict=True))
    if cut.transposes and b.stride(1) != 1:
        b = b.contiguous()

    def launch(cut: Product) -> None:
        _launch(cut, precision, a, b, c, bias, pre, activation)

    lies = (a.stride(1) == 1, b.stride(1) == 1, precision, activation, bias is not None, pre is not None)
    tune.run("matmul", launch, cut, a, arch, (M, N, K), lies)


def _launch(
    cut: Product,
    precision: str,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    activation: int,
) -> None:
    """The product cut so."""
    (M, K), N = a.shape, b.shape[1]
    tiles = cdiv(M, cut.bm) * cdiv(N, cut.bn)
    split_k = cdiv(cdiv(K, cut.parts), cut.bk) * cut.bk if cut.parts > 1 else K
    parts = cdiv(K, split_k) if cut.parts > 1 else 1
    out = a.new_empty((parts, M, N), dtype=torch.float32) if parts > 1 else c
    epilogue = (bias, out, pre) if parts == 1 else (None, out, None)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    function = activation if parts == 1 else 0
    a_tiles = b_tiles = None
    if cut.bulk and K:
        a_tiles, a_turned = _tiles(a, cut.bm, cut.bk)
        b_tiles, b_turned = _tiles(b, cut.bk, cut.bn)
    if a_tiles is not None and b_tiles is not None:
        blocks = (cut.bm, cut.bn, cut.bk, cut.group, a_turned, b_turned, parts, cut.written)
        matmul_bulk[(tiles, parts)](a_tiles, b_tiles, *epilogue, M, N, K, split_k, function, *blocks, **options)
    else:
        even = (M % cut.bm == 0, N % cut.bn == 0, K % cut.bk == 0)
        cuts = (precision, cut.bm, cut.bn, cut.bk, cut.group, *even, parts)
        strides = (*a.stride(), *b.stride())
        matmul[(tiles, parts)](a, b, *epilogue, M, N, K, *strides, split_k, function, *cuts, **options)
    if parts > 1:
        total = M * N
        finish_parts[(cdiv(total, 1024),)](out, bias, c, pre, total, N, activation, parts, 1024, num_warps=4)
