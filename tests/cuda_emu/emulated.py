"""The matrix kernels' launchers in the emulated library."""

from __future__ import annotations

import shutil
from ctypes import c_int64, c_uint64
from typing import NamedTuple

import emulated_ops
import pytest
from matrix_calls import Launchers


class Plan(NamedTuple):
    """What csrc/cuda/policy_matrix.h decides for a product."""

    tile: int
    splits: int
    bm: int
    bn: int
    threads: int
    shared: int
    blocks: int
    traffic: int
    split_depth: int


LARGE, MEDIUM, SMALL_TILE, PLAIN, FLOAT_LARGE, FLOAT_SMALL = range(6)


class Counted(NamedTuple):
    """What the emulator counted since it was last asked."""

    loaded: int
    mma: int
    ldsm: int
    ldsm_conflicts: int
    loaded_wide: int

    @property
    def wide(self) -> float:
        """Share of the bytes loaded that came 16 at a time."""
        return self.loaded_wide / self.loaded


class Emulated(Launchers):
    """The launchers on the emulated device."""

    def device(self, arch: int = 90, multiprocessors: int = 132) -> None:
        """The device that the policy sees."""
        self.lib.emu_device(arch, multiprocessors)

    def schedule(self, order: str = "forward", copies_early: bool = False) -> None:
        """In which order threads and blocks run, and when asynchronous copies land."""
        self.lib.emu_schedule(order.encode(), int(copies_early))

    def counted(self) -> Counted:
        """Reads and resets the counters."""
        found = (c_uint64 * 5)()
        self.lib.emu_counted(found)
        return Counted(*found)

    def plan(
        self, m: int, n: int, k: int, *, float32: bool = False, aligned: bool = True, arch: int = 90, sms: int = 132
    ) -> Plan:
        """The plan of a product."""
        found = (c_int64 * 9)()
        sizes = (c_int64(m), c_int64(n), c_int64(k))
        self.lib.matrix_plan(*sizes, int(float32), int(aligned), arch, sms, found)
        return Plan(*found)

    def attention_traffic(self, heads: int, s_q: int, s_k: int, d: int, d_v: int, causal: bool, general: bool) -> int:
        """Bytes that attention's forward is meant to copy."""
        self.lib.attention_traffic.restype = c_int64
        sizes = (c_int64(n) for n in (heads, s_q, s_k, d, d_v))
        return int(self.lib.attention_traffic(*sizes, int(causal), int(general)))

    def attention_shared(self, features: int, general: bool) -> list[int]:
        """Shared memory of the attention kernels."""
        found = (c_int64 * 5)()
        self.lib.attention_shared(features, int(general), found)
        return list(found)


def build() -> Emulated:
    """The emulated library; skips where there is no C++ compiler."""
    if shutil.which(emulated_ops.COMPILER) is None:
        pytest.skip("the emulator needs a C++ compiler")
    return Emulated(emulated_ops.library_path())
