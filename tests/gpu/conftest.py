"""Tests that need a GPU: marked `gpu`, skipped with the reason where there is none. `make test-gpu` runs them."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch

from fastnn.bench.gpu_machine import why_no_gpu

HERE = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption(
        "--gpu-deadline", type=float, default=None, help="seconds since 1970 after which tests are skipped"
    )


def pytest_runtest_setup(item):
    deadline = item.config.getoption("--gpu-deadline", default=None)
    if deadline is not None and time.time() > deadline and HERE in item.path.resolve().parents:
        pytest.skip("no time was left")


def pytest_collection_modifyitems(items):
    reason = why_no_gpu()
    for item in items:
        if HERE in item.path.resolve().parents:
            item.add_marker("gpu")
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def errors_show_in_their_own_test():
    """Waits for the GPU at the end of each test: a kernel that fails later would be somebody else's failure."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.fixture
def much_memory():
    """For tests that take a large part of the GPU's memory: one at a time, also among parallel processes."""
    with open(Path(tempfile.gettempdir()) / f"fastnn-gpu-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def need(gibibytes: float) -> None:
            free = torch.cuda.mem_get_info()[0] / 2**30
            if free < gibibytes:
                pytest.skip(f"needs {gibibytes:.0f} GiB of the GPU's memory, {free:.0f} are free")

        yield need
        torch.cuda.empty_cache()
