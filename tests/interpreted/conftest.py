"""These tests run the Triton kernels on CPU tensors, in a process of their own: tests/test_triton.py starts it."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    from fastnn.testing import interpreter

    interpreter.repair()
