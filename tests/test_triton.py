"""The Triton backend: where it is missing, interpreted on the CPU, compiled ahead of time, with planted faults."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnn import _dispatch

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (`pip install fastnn[gpu]` adds it)"
)


def run(*arguments, **environment):
    """(status, output) of a Python process that finds this checkout."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    known = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=known, cwd=ROOT, timeout=1800)
    return done.returncode, done.stdout + done.stderr


class TestWithoutTriton:
    HIDE = "import sys; sys.modules['triton'] = None\nimport torch, fastnn\n"

    def test_cpu_tensors_do_not_miss_it(self):
        code = self.HIDE + "print(fastnn.softmax(torch.zeros(2), 0).tolist(), 'fastnn.kernels' in sys.modules)"
        status, out = run("-c", code)
        assert status == 0 and "[0.5, 0.5] False" in out, out

    def test_forced_it_says_why(self):
        status, out = run("-c", self.HIDE + "with fastnn.use_backend('triton'): fastnn.softmax(torch.zeros(2), 0)")
        assert status == 1 and "NotImplementedError" in out and "pip install triton" in out, out

    def test_gpu_tensors_get_the_reference(self):
        code = """
from torch._subclasses import FakeTensorMode
from fastnn import _dispatch
with FakeTensorMode():
    x = torch.empty(2, 3, device="cuda")
_dispatch.KERNELS.clear()
print(_dispatch.pick("softmax", x), _dispatch.why_not("softmax", "triton", x.device, x.dtype))
"""
        status, out = run("-c", self.HIDE + code)
        assert status == 0 and "reference the Triton kernels could not be imported" in out, out


@needs_triton
class TestWithTriton:
    def test_it_is_not_imported_with_the_package(self):
        code = "import sys, torch, fastnn; fastnn.softmax(torch.zeros(2), 0); print('fastnn.kernels' in sys.modules)"
        status, out = run("-c", code)
        assert status == 0 and out.strip().endswith("False"), out

    def test_importing_the_kernels_compiles_nothing(self, tmp_path):
        status, out = run("-c", "import fastnn.kernels", TRITON_CACHE_DIR=str(tmp_path / "cache"))
        assert status == 0 and not (tmp_path / "cache").exists(), out

    def test_gpu_tensors_get_a_kernel(self):
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            x = torch.empty(2, 3, device="cuda")
        assert _dispatch.pick("softmax", x) in ("cuda", "triton")
        with FakeTensorMode():
            assert _dispatch.pick("softmax", torch.empty(2, 3, device="cuda", dtype=torch.float64)) == "reference"

    def test_tf32_is_torchs_choice(self):
        code = """
import torch
from torch._subclasses import FakeTensorMode
from fastnn import kernels
with FakeTensorMode():
    gpu = torch.empty(2, 3, device="cuda")
found = [kernels.matmul.precision_of(gpu)]
for setting in ("tf32", "ieee"):
    torch.backends.cuda.matmul.fp32_precision = setting
    found += [module.precision_of(x) for module in (kernels.matmul, kernels.attention) for x in (gpu, torch.ones(2))]
print(*found)
"""
        status, out = run("-c", code)
        assert status == 0 and out.split() == ["ieee", *["tf32", "ieee"] * 2, *["ieee"] * 4], out

    def test_cpu_tensors_need_the_interpreter(self):
        reason = _dispatch.why_not("softmax", "triton", torch.device("cpu"), torch.float32)
        assert reason == "the tensors are on cpu"

    def test_the_environment_forces_it(self):
        code = """
import torch, fastnn
with fastnn.record() as runs:
    fastnn.softmax(torch.randn(2, 3), -1)
print(*runs[0])
"""
        status, out = run("-c", code, FASTNN_BACKEND="triton", TRITON_INTERPRET="1")
        assert status == 0 and out.split() == ["softmax_fwd", "triton"], out
        status, out = run("-c", code, FASTNN_BACKEND="triton")
        assert status == 1 and "NotImplementedError" in out and "the tensors are on cpu" in out, out


@needs_triton
class TestInterpreted:
    """About two minutes; every case in every type is slow."""

    @pytest.mark.parametrize(
        "selected", [pytest.param("not slow", id="each case"), pytest.param("slow", marks=pytest.mark.slow)]
    )
    def test_suite(self, selected, capsys):
        pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests/interpreted")
        arguments = pytest_ if selected == "slow" else (*pytest_, "-m", selected)
        status, out = run(*arguments, TRITON_INTERPRET="1")
        with capsys.disabled():
            print(f"\ninterpreted: {out.strip().splitlines()[-1]}")
        assert status == 0, out[-6000:]

    def test_every_fault_is_caught(self, capsys):
        status, out = run(ROOT / "tests/interpreted/faults.py", TRITON_INTERPRET="1")
        with capsys.disabled():
            print("\n" + out.strip())
        assert status == 0, out[-3000:]


@needs_triton
class TestAheadOfTime:
    """The compilers come with Triton; no GPU is needed."""

    TOOL = ROOT / "tools/triton_aot.py"

    def test_every_kernel_is_compiled(self):
        """The cases of the tool launch each kernel that the sources launch."""
        code = """
import sys
sys.path.insert(0, "tools")
import triton_aot
from fastnn.kernels import config
print(*{launch.kernel.__name__ for arch in ("sm_80", "sm_90")
        for launch in triton_aot.launches(config.ARCHS[arch], "")})
"""
        status, out = run("-c", code)
        sources = "".join(path.read_text() for path in (ROOT / "fastnn/kernels").glob("*.py"))
        wanted = set(re.findall(r"^ +(\w+)\[(?:grid\]|\()", sources, re.MULTILINE))
        assert status == 0 and len(wanted) > 20, out
        assert wanted - set(out.split()) == set()

    @pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
    def test_a_sample_compiles(self, arch):
        status, out = run(self.TOOL, "--arch", arch, "--every", 16)
        assert status == 0 and " 0 break a rule" in out, out[-3000:]

    @pytest.mark.slow
    @pytest.mark.parametrize("shapes", [(), ("--odd",)], ids=["aligned", "odd"])
    def test_everything_compiles(self, shapes):
        status, out = run(self.TOOL, *shapes)
        assert status == 0, "\n".join(line for line in out.splitlines() if line.rstrip()[-1:] not in " 0123456789")
