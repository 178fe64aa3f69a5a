"""The runner of the GPU tests: what it keeps of a run, and what it says without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "gpu" / "run.py"

JUNIT = """<?xml version="1.0"?>
<testsuites><testsuite>
<testcase classname="tests.gpu.test_gpu_matrix" name="test_gpu_cell[norm-bf16-triton-cuda-tail]">
<properties><property name="forward" value="[0.5, 0.25, 0.125]"/>
<property name="cells" value="2"/></properties></testcase>
<testcase classname="tests.gpu.test_gpu_matrix" name="test_gpu_cell[norm-bf16-triton-cuda-offset]">
<properties><property name="forward" value="[0.125, 0.375, 0.5]"/>
<property name="cells" value="2"/></properties></testcase>
<testcase classname="tests.gpu.test_gpu_matrix" name="test_gpu_cell[norm-bf16-cuda-tail]">
<properties><property name="forward" value="[0.25, 0.25, 0.25]"/>
<property name="cells" value="2"/></properties>
<failure message="2 of 3 cases">long</failure></testcase>
<testcase classname="t" name="test_numbers_are_those_of_the_cpu_kernels[norm-cuda-bf16]">
<properties><property name="largest_difference_to_cpu" value="0.0625"/></properties></testcase>
<testcase classname="t" name="test_x"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>
"""


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("gpu_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_kept(run, tmp_path):
    junit = tmp_path / "junit.xml"
    junit.write_text(JUNIT)
    found = run.parse(junit)
    assert found["counts"] == {"passed": 3, "failed": 1, "skipped": 1}
    assert found["failures"][0]["test"].endswith("test_gpu_cell[norm-bf16-cuda-tail]")
    assert found["skipped"] == {"needs two GPUs": 1} and found["difference_to_cpu"] == {"norm-cuda-bf16": 0.0625}
    triton = next(one for one in found["matrix"] if one["target"] == "triton-cuda")
    assert (triton["error"], triton["torch_error"], triton["share_of_budget"], triton["layouts"]) == (
        0.5,
        0.375,
        0.5,
        2,
    )
    gpu, versions = {"name": "A", "driver": "1"}, {"torch": "2.11.0"}
    text = run.table({**found, "gpu": gpu, "versions": versions, "commit": "abc", "date": "today"})
    assert "| norm | bf16 | forward | 0.38 | 0.25 | 0.5 | 25 % | 50 % |" in text
    assert text.endswith("Tests: 1 failed, 3 passed, 1 skipped.")


def test_without_a_gpu_it_says_so(tmp_path):
    for arguments, status in (([], 0), (["--require"], 2)):
        command = [sys.executable, str(RUN), "--results", str(tmp_path), *arguments]
        child = subprocess.run(
            command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
        )
        assert child.returncode == status and "skipped, nothing was tested: torch" in child.stderr
    assert not list(tmp_path.iterdir())
