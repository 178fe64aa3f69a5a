from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import emulated as _emulated


@pytest.fixture(scope="session")
def emulated_library() -> _emulated.Emulated:
    return _emulated.build()


@pytest.fixture
def emulated(emulated_library: _emulated.Emulated) -> Iterator[_emulated.Emulated]:
    """The emulated launchers on a small H100, back to their settings afterwards."""
    emulated_library.device(90, 4)
    emulated_library.schedule()
    emulated_library.counted()
    yield emulated_library
    emulated_library.device(90, 132)
    emulated_library.schedule()
