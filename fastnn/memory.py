"""Reusing memory on CPUs: `tune` for all of torch, `set_cache` for fastnn's results. Both are off unless asked for.

The pages of a fresh tensor are faulted in one by one when it is first written, and glibc gives every freed block above
32 MiB back to the system: a softmax of 96 MB spends 80 % of its time there (docs/memory.md has the figures).

The two do the same by different means:

- `tune()` asks malloc to keep what is freed. Every tensor of the process gains, torch's too; no limit.
- `set_cache(megabytes)`, or the environment variable `FASTNN_CACHE_MB`, keeps the memory of fastnn's own results,
  saved tensors and scratch from 1 MiB on, on huge pages, up to a limit. Such a tensor's storage cannot be resized:
  `Tensor.resize_` to a larger size and `untyped_storage().resize_(0)` (how FSDP frees) raise RuntimeError.
"""

from __future__ import annotations

from typing import TypedDict, cast

from . import _extension

_MIB = 1 << 20
_tuned = False


class Stats(TypedDict):
    """What `stats` returns; all in bytes but the last three."""

    limit_bytes: int
    """How much may wait: what `set_cache` was given."""
    waiting_bytes: int
    """Kept for the next result."""
    used_bytes: int
    """In tensors and scratch that came from the cache."""
    peak_bytes: int
    """The most that both together have been."""
    reused: int
    """Results that took memory of an earlier one."""
    mapped: int
    """Results for which the system was asked for memory."""
    tuned: bool
    """Whether malloc keeps what is freed: `tune`."""


def tune(on: bool = True) -> None:
    """Has malloc keep freed memory for the next tensor, of torch or fastnn, instead of giving it back to the system.

    The process then stays as large as it ever was. It is glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (mallopt(3)),
    for the whole process and all its libraries. `tune(False)` goes back to giving back blocks above 32 MiB, and
    gives back now what is free; of the heap, what lies below blocks in use stays, for the next tensor.

    Raises RuntimeError where malloc does not obey: under another allocator (jemalloc, tcmalloc, musl), most of which
    keep memory by themselves.
    """
    global _tuned
    if not _extension.require().keep_freed_memory(bool(on)):
        raise RuntimeError(
            "fastnn.memory.tune: this process's malloc is not glibc's, or does not obey mallopt (LD_PRELOAD of another "
            "allocator?); fastnn.memory.set_cache works with any"
        )
    _tuned = bool(on)


def set_cache(megabytes: int) -> None:
    """Keeps the memory of fastnn's results for the next ones, up to that many MiB waiting; 0 turns it off.

    Memory comes back with the last tensor, view or saved tensor that refers to it, from any thread. The limit is on
    what waits, beside what is in use; what is above is given back at once, the longest unused first.

    Raises TypeError, ValueError.
    """
    if isinstance(megabytes, bool) or not isinstance(megabytes, int):
        raise TypeError(f"fastnn.memory.set_cache: megabytes must be an int, got {type(megabytes).__name__}")
    if not 0 <= megabytes < 1 << 40:
        raise ValueError(f"fastnn.memory.set_cache: megabytes must be 0 (off) or more, below 2^40, got {megabytes}")
    _extension.require().set_cache_limit(megabytes * _MIB)


def stats() -> Stats:
    """What is kept, in use, and how often memory was reused."""
    extension = _extension.require()
    found = {"limit_bytes": extension.cache_limit(), **extension.cache_stats(), "tuned": _tuned}
    return cast(Stats, found)


def empty_cache() -> None:
    """Gives the memory that waits in the cache back to the system; the cache stays on, memory in use as it is."""
    _extension.require().empty_cache()
