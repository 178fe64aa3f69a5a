"""The compiled extension, or the reason why it is missing.

`_C` must be loaded after torch: it is linked against the libtorch_cpu that is already in the process.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

_C: ModuleType | None
missing: str
"""Why there is no extension, in words; empty when there is one."""

try:
    _C = importlib.import_module("fastnn._C")
    missing = ""
    # Here rather than in the module, where any exception would come out as an ImportError: as "no extension".
    if _isa := os.environ.get("FASTNN_ISA"):
        try:
            _C.set_isa(_isa)
        except ValueError as error:
            raise ValueError(f"environment variable FASTNN_ISA: {error}") from None
    if _megabytes := os.environ.get("FASTNN_CACHE_MB"):
        if not _megabytes.isascii() or not _megabytes.isdigit():
            raise ValueError(f"environment variable FASTNN_CACHE_MB: expected whole MiB, got {_megabytes!r}")
        _C.set_cache_limit(int(_megabytes) << 20)
except ImportError as error:
    _C = None
    missing = (
        f"the compiled extension fastnn._C could not be imported ({error}). If python runs in the source folder, "
        "install the package there first (`pip install .` puts it elsewhere: `pip install --no-build-isolation -e .`)"
    )


library = torch.library.Library("fastnn", "FRAGMENT") if _C is not None else None  # type: ignore[no-untyped-call]
"""Where the fake (shape-only) kernels are registered; alive as long as the package."""


def require() -> ModuleType:
    """The extension module; ImportError with the reason where it is missing."""
    if _C is None:
        raise ImportError(missing)
    return _C
