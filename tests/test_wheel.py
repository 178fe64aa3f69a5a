"""The wheel, built once, works in a second virtual environment that has no compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import json, shutil
import torch, fastnn

x = torch.randn(5, 37, requires_grad=True)
w = torch.randn(19, 37, requires_grad=True)
b = torch.randn(19, requires_grad=True)
with fastnn.record() as runs:
    y = fastnn.softmax(fastnn.linear(x, w, b, activation="gelu"), -1)
    y.square().sum().backward()
grads = [t.grad.clone() for t in (x, w, b)]
for t in (x, w, b):
    t.grad = None
expected = torch.softmax(torch.nn.functional.gelu(torch.nn.functional.linear(x, w, b)), -1)
expected.square().sum().backward()
torch.testing.assert_close(y, expected)
for ours, t in zip(grads, (x, w, b)):
    torch.testing.assert_close(ours, t.grad)
print(json.dumps({
    "file": fastnn.__file__,
    "kernels": sorted({run.kernel for run in runs if run.backend == "cpu"}),
    "reference": [run.kernel for run in runs if run.backend != "cpu"],
    "compilers": [c for c in "cc c++ gcc g++ clang clang++ nvcc cmake ninja make".split() if shutil.which(c)],
}))
"""


def built_before() -> bool:
    return any((ROOT / "build").glob(f"*{sysconfig.get_config_var('py_version_nodot')}*/CMakeCache.txt"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    missing = [package for package in ("scikit_build_core", "pybind11") if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"cannot build a wheel here: {', '.join(missing)} not installed (`make test` installs them)")
    if not built_before():
        pytest.skip("no build folder to reuse, and a build from nothing takes minutes: `make install` makes one")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def second_environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with the wheel, and this one's torch by a .pth file: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("second") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "torch_of_the_first.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q", "--no-deps"]
    subprocess.run([*command, "--no-index", str(wheel)], check=True)
    return folder


def run(environment: Path, *command: str, cwd: Path) -> str:
    """Runs a command of the second environment with nothing but its own folder on PATH."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("FASTNN_", "PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        cwd=cwd,
        env={**variables, "PATH": str(environment / "bin")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastnn"}
    assert "fastnn/py.typed" in names
    assert len([name for name in names if name.startswith("fastnn/_C.") and name.endswith(".so")]) == 1
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("fastnn/**/*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o", ".a"))]
    assert wheel.stat().st_size < 5 << 20


def test_wheel_smoke(second_environment, tmp_path):
    result = json.loads(run(second_environment, "python", "-c", SMOKE, cwd=tmp_path))
    assert result["compilers"] == []
    assert Path(result["file"]).is_relative_to(second_environment)
    assert result["kernels"] == ["linear_bwd", "linear_fwd", "softmax_bwd", "softmax_fwd"]
    assert result["reference"] == []


def test_wheel_command(second_environment, tmp_path):
    info = json.loads(run(second_environment, "fastnn", "info", "--json", cwd=tmp_path))
    assert info["fastnn"]
