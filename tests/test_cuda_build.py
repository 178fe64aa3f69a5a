"""The extension says whether it has CUDA kernels and why they cannot run; nothing makes a CUDA context.

Holds for every build. What a build with the kernels does on a machine without a driver is tested where the extension
was built with FASTNN_CUDA=ON (docs/cuda.md says how).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn

KERNELS = {path.stem.split("_")[0] for path in (Path(__file__).resolve().parent.parent / "csrc/cuda").glob("*.cu")}


def _on_gpus(ops):
    """Those of the extension's ops that have CUDA kernels."""
    return sorted(op for op in ops if op in KERNELS or op == "cross_entropy")


@pytest.fixture
def compiled(extension):
    if not extension.cuda_compiled():
        pytest.skip(extension.cuda_problem())
    return extension


@pytest.fixture
def without_gpu(compiled):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return compiled


def test_what_is_missing_is_said(extension):
    problem = extension.cuda_problem()
    if not extension.cuda_compiled():
        assert "FASTNN_CUDA=ON" in problem
    else:
        assert bool(problem) != torch.cuda.is_available()
    assert not torch.cuda.is_initialized()


def test_cuda_operators_are_registered_where_they_are_compiled_in(extension):
    for op in extension.ops():
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{op}_fwd", "CUDA")
        assert has == (extension.cuda_compiled() and op in _on_gpus(extension.ops()))


def test_info_says_what_is_built_and_why_it_does_not_run(without_gpu):
    found = fastnn.info()["backends"]["cuda"]
    assert found["ops"] == _on_gpus(without_gpu.ops())
    assert not found["available"] and found["why_not"]


def test_cpu_calls_run_on_the_cpu_kernels(without_gpu):
    x = torch.randn(3, 5)
    with fastnn.record() as runs:
        assert torch.allclose(fastnn.softmax(x, -1), torch.softmax(x, -1))
    assert [run.backend for run in runs] == ["cpu"]
    with fastnn.use_backend("cuda"), pytest.raises(NotImplementedError, match="the tensors are on cpu"):
        fastnn.softmax(x, -1)


class Fictitious(torch.Tensor):
    """Says that it is on a CUDA device, for want of one; has no memory."""

    @staticmethod
    def __new__(cls, *sizes):
        return torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=torch.float32, device="cuda:0")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("the CUDA kernel itself is what is called")


def test_a_cuda_call_without_a_driver_is_one_clear_exception(without_gpu):
    x = Fictitious(2, 3)
    calls = (
        lambda: torch.ops.fastnn.softmax_fwd(x, -1, False, None, True),
        lambda: torch.ops.fastnn.linear_fwd(x, x, None, 0, False, True),
    )
    for call in calls:
        with (
            torch._C._DisableTorchDispatch(),
            pytest.raises(RuntimeError, match=r"no CUDA kernel can run in this process: .*CUDA"),
        ):
            call()
    assert not torch.cuda.is_initialized()


TF32_SETTINGS = [
    ("pass", False),
    ("torch.backends.cuda.matmul.allow_tf32 = True", True),
    ("torch.backends.cuda.matmul.allow_tf32 = False", False),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
    ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
    ("torch.set_float32_matmul_precision('high')", True),
    ("torch.set_float32_matmul_precision('highest')", False),
    ("torch.backends.cuda.matmul.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'", True),
]


def test_tf32_follows_every_setting_of_torch(extension):
    code = (
        "import sys, json, torch, fastnn\n"
        "from fastnn import _dispatch, _extension\n"
        "found = []\n"
        "for setting in json.loads(sys.argv[1]):\n"
        "    exec(setting)\n"
        "    found.append([_extension._C.allow_tf32(), _dispatch.allows_tf32()])\n"
        "print(json.dumps(found))"
    )
    arguments = [sys.executable, "-c", code, json.dumps([setting for setting, _ in TF32_SETTINGS])]
    found = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    for (setting, allowed), answers in zip(TF32_SETTINGS, found, strict=True):
        assert answers == [allowed, allowed], setting
