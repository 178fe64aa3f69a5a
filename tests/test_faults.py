"""Mistakes planted one by one (tests/faults/): the suite must catch every one of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests/faults"
sys.path.insert(0, str(FOLDER))
from faults import FAULTS  # noqa: E402  (a script's folder, not a package)

TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def test_there_are_enough():
    """Thirty that any machine with two instruction sets can plant; names say what is wrong, each once."""
    assert sum(not fault.isa for fault in FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert sum(fault.file.startswith("csrc/") for fault in FAULTS) >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_can_be_planted(fault):
    """Fails at once where code has moved on: the fault moves with it."""
    found = (ROOT / fault.file).read_text().count(fault.old)
    assert found == 1, f"{fault.file} has {found} times: {fault.old}"
    assert fault.new != fault.old
    assert all((ROOT / test.split("::")[0]).exists() for test in fault.caught_by)


@pytest.mark.alone
@pytest.mark.parametrize(
    "every", [pytest.param(1, id="all", marks=pytest.mark.slow), pytest.param(30, id="each thirtieth")]
)
def test_every_fault_is_caught(every, extension, capsys):
    lacking = [tool for tool in ("cmake", "ninja", "c++") if not shutil.which(tool, path=TOOLS)]
    if lacking:
        pytest.skip(f"planting faults compiles: {', '.join(lacking)} not on PATH")
    command = [sys.executable, str(FOLDER / "plant.py"), "--jobs", "2", "--every", str(every)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": TOOLS}, cwd=ROOT)
    with capsys.disabled():
        print("\n" + done.stdout.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
