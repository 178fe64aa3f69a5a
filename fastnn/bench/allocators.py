"""Ways to run a process's memory allocator, by environment alone.

On CPUs fresh 4 KiB pages cost up to 80 % of a large operation: glibc gives every block above 32 MB back to the system
when it is freed, and each call faults it in again. Every figure is therefore taken under both settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

PLAIN = "plain"
"""Torch as installed, as people run it."""

TUNED = "tuned"
"""Huge pages for what malloc hands out."""

SETTINGS: dict[str, dict[str, str]] = {
    PLAIN: {},
    TUNED: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"},
}
"""Setting -> environment variables. The first is glibc's malloc on huge pages, the second torch's own switch."""

_KEPT = 1 << 30

CANDIDATES: dict[str, dict[str, str]] = {
    **SETTINGS,
    "kept": {
        "GLIBC_TUNABLES": ":".join(
            [
                "glibc.malloc.hugetlb=1",
                f"glibc.malloc.mmap_threshold={_KEPT}",
                f"glibc.malloc.trim_threshold={_KEPT}",
            ]
        )
    },
}
"""What `python -m fastnn run` chooses from. `kept` also holds on to freed memory, up to 1 GiB, for the next block."""

_OWNED = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")


def owned(name: str) -> bool:
    """Whether an environment variable belongs to the allocator, and so to a setting."""
    return name in _OWNED or name.startswith("MALLOC_")


def environment(setting: Mapping[str, str], base: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base` (this process's environment) with the setting and no other allocator variable."""
    base = os.environ if base is None else base
    return {**{name: value for name, value in base.items() if not owned(name)}, **setting}
