"""How each kernel is cut into programs: pure functions of shape and architecture, with the reason beside each."""

import functools
from typing import NamedTuple

import torch

from .library import INTERPRETED


class Arch(NamedTuple):
    """What the choices depend on."""

    name: str
    """sm_90 and the like, gfx942 and the like, or `interpreted`."""
    processors: int
    """Streaming multiprocessors or compute units."""
    shared: int
    """Bytes of shared memory that a program may use."""


ARCHS = {
    "sm_80": Arch("sm_80", 108, 166912),
    "sm_90": Arch("sm_90", 132, 232448),
    "sm_100": Arch("sm_100", 148, 232448),
    "sm_120": Arch("sm_120", 170, 101376),
    "gfx942": Arch("gfx942", 304, 65536),
    "interpreted": Arch("interpreted", 2, 232448),
}
"""Those that are compiled ahead of time in the tests."""


assumed: Arch | None = None
"""Taken for every device, where set: for compiling ahead of time (tools/triton_aot.py)."""


def arch_of(index: int | None) -> Arch:
    """The architecture of a GPU; of the interpreter where that runs."""
    return assumed or _arch_of(index)


@functools.cache
def _arch_of(index: int | None) -> Arch:
    if INTERPRETED:
        return ARCHS["interpreted"]
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Arch(properties.gcnArchName.split(":")[0], properties.multi_processor_count, 65536)
    shared: int = getattr(properties, "shared_memory_per_block_optin", 166912)
    return Arch(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, shared)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int, least: int = 1) -> int:
    """The least power of two that is >= n and >= least."""
    return max(1 << max(n - 1, 0).bit_length(), least)


def lanes_of(arch: Arch) -> int:
    """Threads of a warp."""
    return 64 if arch.name.startswith("gfx") else 32


class Rows(NamedTuple):
    """A program's tile of a row-wise kernel."""

    rows: int
    block: int
    whole: bool
    """Whether the block holds the whole row: it is then read once and kept in registers."""
    warps: int


@functools.cache
def rows_config(
    columns: int, rows: int, arch: Arch, largest: int = 16384, step: int = 16384, narrow: bool = False
) -> Rows:
    """Tile of a kernel that reduces along rows.

    A thread holds 16 to 32 elements: enough loads in flight to fill the memory's latency, few enough registers for
    full occupancy. Rows up to `largest` stay in registers; longer ones are read again, from cache, `step` elements at
    a time. Short rows are taken several at a time. The interpreter pays per program: tiles as large as they may be.
    `narrow`: every element has an address of its own, in two registers; 8 of them a thread then.
    """
    if narrow:
        step = min(step, 4096)
    if arch.name == "interpreted":  # both ways are tested without rows that take seconds
        largest, step = 2048, 1024
    block = power_of_2(columns, 16)
    if block > largest:
        # 512 threads: few programs share a multiprocessor, and L2 holds their rows till the second reading. A quarter
        # of the block is 8 half-precision elements a thread, so that its four quarters lie in the same threads.
        return Rows(1, step, False, 512 // lanes_of(arch))
    tile = 16384 if arch.name == "interpreted" else 2048
    together = min(max(tile // block, 1), power_of_2(rows))
    return Rows(together, block, True, min(max(together * block // 512, 4), 1024 // lanes_of(arch)))


class Tile(NamedTuple):
    """A program's tile of a kernel that treats every element alone."""

    rows: int
    block: int
    warps: int


@functools.cache
def elementwise_config(columns: int, rows: int, arch: Arch) -> Tile:
    """Tile of a kernel that treats every element alone.

    16 elements a thread are four loads of 16 bytes in float32, two in half precision, for each operand: enough in
    flight. Short rows are taken several at a time.
    """
    tile = 16384 if arch.name == "interpreted" else 2048
    block = min(power_of_2(columns, 16), tile)
    together = min(tile // block, power_of_2(rows))
    return Tile(together, block, max(min(together * block // 512, 4), 1))


class Columns(NamedTuple):
    """A program's tile of a kernel that reduces along columns, and into how many parts the rows are cut."""

    rows: int
    block: int
    parts: int
    warps: int


@functools.cache
def columns_config(
    columns: int, rows: int, arch: Arch, tall: int = 32, warps: int = 4, narrow: bool = False
) -> Columns:
    """Tile of a column sum.

    128 neighbouring columns are whole lines of memory. The rows are cut into as many parts as give each
    multiprocessor four programs, each at least one tile: more parts would be more partial sums to read again.
    `narrow`, as in `rows_config`: half of the elements a thread.
    """
    block = min(power_of_2(columns, 16), 128)
    blocks = cdiv(columns, block)
    parts = min(max(4 * arch.processors // blocks, 1), cdiv(rows, tall))
    return Columns(tall, block, parts, 8 if narrow else warps)


class NormBackward(NamedTuple):
    """A program's share of norm's backward pass."""

    rows: int
    block: int
    whole: bool
    tiles: int
    """Tiles of rows that one program takes, adding up the gradients of weight and bias in registers."""
    warps: int


@functools.cache
def norm_bwd_config(columns: int, rows: int, arch: Arch, narrow: bool = False) -> NormBackward:
    """Tile of norm's backward pass.

    As `rows_config`, but dy, x, the weight and two sums are live: rows up to 8192 stay in registers. Each
    multiprocessor gets eight programs, two where rows are long: the partial sums must stay small beside the tensors.
    """
    tile = rows_config(columns, rows, arch, 8192, 8192, narrow)
    programs = arch.processors * (8 if tile.block <= 1024 else 2)
    return NormBackward(tile.rows, tile.block, tile.whole, cdiv(rows, programs * tile.rows), tile.warps)


@functools.cache
def loss_config(columns: int, rows: int, arch: Arch, narrow: bool = False) -> Rows:
    """Tile of cross-entropy. Vocabularies are longer than a program's registers, and are read in blocks of 8192.

    Four programs of eight warps, 32 elements a thread, fill the memory's latency; the running maximum and sum are kept
    for every fourth element, so that a logit costs one exponential and a quarter. `narrow`: as in `rows_config`, for
    short rows; blocks of long ones have registers enough.
    """
    largest, step = (32, 32) if arch.name == "interpreted" else (4096, 8192)
    block = power_of_2(columns, 16)
    if block > largest:
        return Rows(1, step, False, 8)
    tile = 16384 if arch.name == "interpreted" else 1024 if narrow else 2048
    together = min(max(tile // block, 1), power_of_2(rows))
    return Rows(together, block, True, min(max(together * block // 512, 4), 8))


class Product(NamedTuple):
    """How a matrix product is cut."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    """Blocks of A and B that are on their way at a time."""
    group: int
    """Rows of tiles that share the L2 cache."""
    parts: int
    """Into how many parts K is cut, where the tiles alone would not fill the machine."""
    bulk: bool
    """Whether the copy engine fetches the tiles, where alignment allows."""
    transposes: bool
    """Whether B is copied first where its rows are not contiguous."""
    apart: bool = False
    """Whether operands are copied first to rows that the copy engine takes, where theirs are not."""
    written: int = 128
    """Columns of a bulk tile that are written at a time: all of them or half."""


@functools.cache
def matmul_config(M: int, N: int, K: int, itemsize: int, precision: str, arch: Arch, narrow: bool = False) -> Product:
    """Tile of the matrix product.

    Half precision: 128 x 256 x 64 for eight warps (two groups of four, which is what wgmma takes) where there are
    enough such tiles, else 128 x 128, 64 x 64, and 16 rows where there are few. float32 without tensor cores: the
    accumulators and the operands of a 64 x 64 tile fit the registers; with K along the rows of B its tile is read from
    one bank of shared memory (14 TFLOP/s against 45 on an H100), so that B is copied first.

    `narrow`: rows of A or B are no multiples of 16 bytes. From 128 rows on the copy engine's tiles are worth a copy of
    both; else tiles are small, since each element that a thread loads has an address of its own, in two registers.
    """
    bulk = arch.name in ("sm_90", "sm_100", "sm_120", "interpreted") and itemsize == 2
    if arch.name == "interpreted":
        parts, written = 2 if K > 512 else 1, 64 if N % 16 == 0 else 32
        return Product(64, 64, 64, 4, 1, 4, parts, bulk, False, bulk and M > 16, written)
    full = itemsize == 4 and precision == "ieee"
    apart = bulk and M >= 128 and N >= 64
    narrow = narrow and not apart
    # Rows of C that 16 elements do not divide are written by elements: addresses take the registers of large tiles.
    even = N % 16 == 0
    large = cdiv(M, 128) * cdiv(N, 256) >= arch.processors and arch.shared > 200000 and even
    if full:
        bm, bn, bk, warps, stages = (64, 64, 32, 8, 3) if M > 32 else (32, 64, 32, 4, 3)
        if narrow and M > 32:
            bn, bk, warps, stages = 32, 16, 4, 2  # of six the largest that spilled on no architecture
        if M <= 16:
            bm, bk = 16, 64
    elif M <= 16:
        bm, bn, bk, warps, stages = 16, 64, 64 if narrow else 128, 4, 4
    elif M <= 32 or N <= 32:
        bm, bn, bk, warps, stages = 32, 64, 64 if narrow else 128, 4, 4
    elif narrow:
        bm, bn, bk, warps, stages = 64, 64, 32, 4, 3
    elif large and bulk:
        bm, bn, bk, warps, stages = 128, 256, 64, 8, 4
    elif cdiv(M, 128) * cdiv(N, 128) >= arch.processors // 2 or (K >= 4096 and M >= 128 and N >= 128):
        bm, bn, bk, warps, stages = 128, 128 if even or bulk else 64, 64, 8, 4 if bulk else 3
    else:
        bm, bn, bk, warps, stages = 64, 64, 64, 4, 4
    if arch.name.startswith("gfx"):
        stages = 2
    if itemsize == 4 and not full:
        bk = 32  # the bytes of 64 in half precision; 64 of TF32 spilled in few rows
    # The epilogue of a bulk tile may take as much as the tile itself in half precision.
    while stages > 2 and (bm + bn) * bk * itemsize * stages + (bm * bn if bulk else 0) > arch.shared:
        stages -= 1
    tiles = cdiv(M, bm) * cdiv(N, bn)
    # Cut K where less than half of the machine would work; each part keeps at least eight blocks of K.
    parts = min(arch.processors // tiles, K // (8 * bk)) if 2 * tiles <= arch.processors else 1
    return Product(bm, bn, bk, warps, stages, 8, max(parts, 1), bulk, full and M >= 64, apart, 128 if even else 64)


class Attention(NamedTuple):
    """How attention is cut: queries and keys of a tile."""

    bm: int
    bn: int
    warps: int
    stages: int


def _attention_float32(kernel: str, wide: int, precision: str, rich: bool, ragged: bool, arch: Arch) -> Attention:
    """`attention_config` in float32, for `wide` features."""
    amd = arch.name.startswith("gfx")
    if wide > 128:
        many = arch.name == "sm_80" or (arch.name == "sm_120" and kernel == "dkv" and ragged)
        return Attention(16, 16, 8 if many else 4, 1)  # the other number spilled 8 to 48 bytes
    warps = 4 if amd and kernel != "fwd" else 8
    if arch.name == "sm_90" and kernel == "dq" and precision == "tf32" and wide == 64:
        warps = 4  # eight spilled 8 bytes with Triton 3.6
    if arch.name == "sm_80" and kernel == "dq" and ragged:
        warps = 4
    stages = 1 if amd or (rich and kernel == "dkv") else 2
    if arch.name == "sm_80" and rich and kernel == "dkv" and wide <= 64:
        return Attention(16, 32, 4, 2)  # eight warps spilled 8 bytes
    return Attention(32 if wide <= 64 else 16, 16 if rich and wide > 64 else 32, warps, stages)


@functools.cache
def attention_config(
    kernel: str, S_q: int, S_k: int, bd: int, bdv: int, itemsize: int, precision: str, rich: bool, arch: Arch
) -> Attention:
    """Tile of `fwd`, `dq` or `dkv`: no more threads than its larger operand has pieces of 16 bytes.

    More of them, with 16 features or few keys, would read it in narrower pieces.
    """
    found = _attention_tile(kernel, S_q, S_k, bd, bdv, itemsize, precision, rich, arch)
    pieces = max(found.bm, found.bn) * min(bd, bdv) * itemsize // 16
    return found._replace(warps=min(found.warps, max(pieces // lanes_of(arch), 1)))


def _attention_tile(
    kernel: str, S_q: int, S_k: int, bd: int, bdv: int, itemsize: int, precision: str, rich: bool, arch: Arch
) -> Attention:
    """Tile of attention before its threads are held against its operands.

    Forward in half precision: 128 queries for eight warps, so that two groups of four feed wgmma, and blocks of 64 to
    128 keys in two to three stages of shared memory: the best of seven on an H100 (271 TFLOP/s with 64 features, 335
    with 128; the others 202 to 257 and 248 to 273). Backward keeps two accumulators or two pairs of operands more: 128
    by 64 for dq, 64 or 32 queries by 64 keys for dk and dv, the best of five and of six timed. float32 does without
    tensor cores and holds everything in registers: 32 by 32. Features beyond 128 halve the tiles; few queries take
    tiles of 16. `rich`: a mask, a softcap or dropout needs registers for the elements of a tile: fewer keys then, fewer
    queries for dk and dv. Lengths that 16 does not divide make addresses of mask and logsumexp unaligned, one for each
    element: where these spilled (8 to 96 bytes), tiles are smaller or have more warps.
    """
    if arch.name == "interpreted":
        return Attention(64, 64, 4, 1)
    wide = max(bd, bdv)
    ragged = S_q % 16 != 0 or S_k % 16 != 0
    amd = arch.name.startswith("gfx")
    if itemsize == 4:
        return _attention_float32(kernel, wide, precision, rich, ragged, arch)
    if S_q <= 16 and kernel != "dkv":
        return Attention(16, 64 if wide <= 128 else 32, 4, 2)
    hopper = arch.name in ("sm_90", "sm_100")
    if kernel == "fwd":
        if wide <= 64:
            found = Attention(128, 64, 8 if hopper else 4, 3)
        elif wide <= 128:
            found = Attention(128, 128 if arch.name == "sm_90" else 64, 8, 2)
        else:
            found = Attention(128, 32, 8, 2) if arch.name == "sm_90" else Attention(64, 32, 8, 2)
    elif kernel == "dq":
        tall = hopper and not (rich and arch.name == "sm_100")
        if wide <= 128:
            found = Attention(128, 64, 8, 3) if tall else Attention(64, 64 if wide <= 64 else 32, 8, 2)
        else:
            few_warps = hopper and not (ragged and arch.name == "sm_90")
            found = Attention(64, 32 if arch.shared >= 110000 else 16, 4 if few_warps else 8, 2)
    elif wide <= 64:
        found = Attention(64, 64, 4, 3) if hopper else Attention(64, 64, 8, 2)
    elif wide <= 128:
        found = Attention(32, 64, 4, 3) if hopper else Attention(32, 64, 8, 2)
    elif arch.name == "sm_90":
        # One sum at a time (attention_splits); beside a mask or dropout only mma.sync's 32 keys fit the registers.
        return Attention(32, 32, 8, 1) if ragged and not rich else Attention(16, 32 if rich else 64, 4, 1)
    else:
        found = Attention(32, 64, 8, 1) if hopper else Attention(32, 32, 8, 1)
    few = 32 if wide <= 128 and not (amd and wide > 64) else 16
    if rich and kernel == "dkv":
        found = found._replace(bm=few, warps=8 if wide > 64 else found.warps, stages=2)
    elif rich and kernel == "fwd":
        tallest = (64 if ragged else 128) if wide <= 128 else 64 if arch.name == "sm_90" else 32
        found = found._replace(bm=min(found.bm, tallest), bn=few, warps=8)
    elif rich:
        found = found._replace(bn=few, warps=8)
    if amd:  # 64 lanes a warp and no asynchronous copies; a lane has 512 registers with four warps, 256 with eight
        found = found._replace(bm=min(found.bm, 64), stages=1)
        if kernel == "dq":
            found = found._replace(warps=4)
        elif kernel == "dkv":  # two programs of four warps share a unit where a lane needs half of its registers
            found = found._replace(bm=min(found.bm, 32 if wide <= 128 else 16), warps=4)
    if arch.name == "sm_120" and kernel == "dq" and found.bn == 32:
        found = found._replace(warps=4)  # with eight ptxas aims at 128 registers, and spilled two of them
    elif kernel == "dkv" and rich and arch.name in ("sm_80", "sm_120"):
        if wide > 16 or (ragged and arch.name == "sm_80"):
            found = found._replace(bm=16)  # 32 queries spilled 16 bytes
    if arch.name == "sm_120" and ragged and kernel == "dq" and wide > 64:
        found = found._replace(bm=32)
    elif arch.name == "sm_120" and ragged and rich and kernel == "fwd":
        found = found._replace(stages=2)
    return found


def attention_splits(bd: int, bdv: int, itemsize: int, arch: Arch) -> bool:
    """Whether dk and dv are two launches.

    Two sums of 64 keys by 256 features, 64 is what wgmma takes, fill the registers of eight warps on sm_90 and spilled
    400 bytes; on sm_100 sums lie in tensor memory, elsewhere mma.sync takes 32 keys. Two launches are five products of
    tiles as one is, and the scores of one of them twice. The interpreter tests both ways.
    """
    if arch.name == "interpreted":
        return bd >= 32
    return arch.name == "sm_90" and itemsize == 2 and max(bd, bdv) > 128
