"""PEP 517 backend: scikit-build-core, asking for torch only where the environment has none.

The extension needs torch's headers and libtorch_cpu to link against, but any torch from 2.11 on will do (stable ABI).
Listing torch under `build-system.requires` would make pip download a second copy, of gigabytes, into its isolated
build environment; CMake looks into the environment that asked for the build instead (csrc/tools/find_torch.py).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401  (the PEP 517 hooks)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

_FIND_TORCH = Path(__file__).resolve().parent.parent / "csrc" / "tools" / "find_torch.py"


def _torch_requirement() -> list[str]:
    found = subprocess.run([sys.executable, str(_FIND_TORCH)], capture_output=True)
    return [] if found.returncode == 0 else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_torch_requirement()]
