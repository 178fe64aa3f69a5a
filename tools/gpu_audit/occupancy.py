"""How many blocks of a kernel a multiprocessor holds, and what limits it: the arithmetic of NVIDIA's occupancy API."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536
"""Of a multiprocessor, on every architecture here; a quarter belongs to each of its four schedulers."""

RESERVED_SHARED = 1024
"""Bytes of each block that the system takes, from sm_80 on."""


@dataclass(frozen=True)
class Arch:
    """Limits of one compute capability (CUDA programming guide, technical specifications)."""

    name: str
    shared: int
    """KiB of a multiprocessor."""
    shared_block: int
    """KiB that one block may take."""
    threads: int
    blocks: int


ARCHS = {
    80: Arch("A100", 164, 163, 2048, 32),
    86: Arch("RTX 30", 100, 99, 1536, 16),
    89: Arch("RTX 40", 100, 99, 1536, 24),
    90: Arch("H100", 228, 227, 2048, 32),
    100: Arch("B200", 228, 227, 2048, 32),
    120: Arch("RTX 50", 100, 99, 1536, 24),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks of a multiprocessor."""

    blocks: int
    share: float
    """Of its threads."""
    limiter: str
    """`registers`, `shared memory`, `threads` or `blocks`; why it cannot be launched where `blocks` is 0."""


def occupancy(arch: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Of blocks of so many threads, registers a thread, and bytes of shared memory in all."""
    limits = ARCHS[arch]
    warps = -(-threads // 32)
    if shared > limits.shared_block << 10:
        return Occupancy(0, 0.0, "more shared memory than a block may take")
    by = {"threads": limits.threads // (32 * warps), "blocks": limits.blocks}
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by["registers"] = REGISTERS // 4 // per_warp * 4 // warps
    if shared:
        by["shared memory"] = (limits.shared << 10) // (-(-(shared + RESERVED_SHARED) // 128) * 128)
    blocks = min(by.values())
    limiter = min(by, key=lambda name: by[name])
    if blocks == 0:
        return Occupancy(0, 0.0, f"too many {limiter}")
    return Occupancy(blocks, blocks * 32 * warps / limits.threads, limiter)
