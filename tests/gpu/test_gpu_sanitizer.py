"""Our kernels under compute-sanitizer, where it is installed: out-of-bounds accesses, races, reads of nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_lanes import LANES

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 200.0

# No caching allocator: every tensor is an allocation of its own, so that the first byte behind it is out of bounds.
SCRIPT = """
import sys, torch
from fastnn import testing
from fastnn._dispatch import why_no_kernel
from fastnn.testing.devices import on_device
from fastnn.testing.matrix import _grad_output, _run
from fastnn.testing.targets import Target
target, op = Target(sys.argv[1], device="cuda"), sys.argv[2]
if why_no_kernel(op, target.backend):
    sys.exit(77)
names = sys.argv[3].split(",")
torch.zeros(1, device="cuda")
count = 0
with target.forced():
    for case in testing.cases(op):
        if case.name in names:
            inputs = case.inputs(torch.bfloat16)
            with torch.no_grad():
                grad = on_device({"g": _grad_output(case.reference(inputs), 0, "offset")}, "cuda")["g"]
            _run(case, case.call, on_device(inputs, "cuda"), grad)
            count += 1
torch.cuda.synchronize()
print("ran", count)
"""

CASES = {
    "activation": "gelu_bias_unaligned,silu_pair_rows_apart,gelu_tanh_packed_one_long_row,hardswish_plain_length_33",
    "attention": "everything,unaligned,49x97x17,few_everything",
    "cross_entropy": "everything_mean,unaligned,classes_65,one_long_row",
    "linear": "gelu_tanh_bias,all_unaligned,9x49x35",
    "norm": "layer_rows,add_rms_unaligned,layer_one_long_row,rms_length_33",
    "softmax": "rows,log_unaligned,one_long_row,columns",
}


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("backend", [lane.backend for lane in LANES])
def test_clean_under(tool, op, backend):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    if backend == "triton" and tool == "racecheck":
        pytest.skip("Triton places its own barriers")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", sys.executable, "-c", SCRIPT]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [*command, backend, op, CASES[op]], capture_output=True, text=True, timeout=TIMEOUT, env=env, cwd=ROOT
    )
    if run.returncode == 77:
        pytest.skip(f"{op} has no {backend} kernel in this installation")
    found = (run.stdout + run.stderr)[-3000:]
    if "not supported" in found and run.returncode not in (0, 9):
        pytest.skip(f"compute-sanitizer does not work here: {found[-300:]}")
    assert run.returncode == 0 and f"ran {len(CASES[op].split(','))}" in run.stdout, found
