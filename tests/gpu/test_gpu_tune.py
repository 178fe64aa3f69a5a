"""FASTNN_TUNE=1 on a GPU: a search that ends, results that are right and kept, and no search in the next process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnn._dispatch import why_no_kernel

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import torch, fastnn
from fastnn import testing
from fastnn.kernels import tune
from fastnn.testing import Target
assert tune.enabled
timed = []
clock = tune.clock
tune.clock = lambda call: timed.append(clock(call)) or timed[-1]
for op, name in (("softmax", "rows"), ("linear", "gelu_bias"), ("attention", "causal")):
    testing.check(testing.find_case(op, name), "bf16", Target("triton", device="cuda"))
print(len(timed))
"""


def test_a_search_is_made_once(tmp_path):
    if reason := why_no_kernel("softmax", "triton"):
        pytest.skip(reason)
    known = {**os.environ, "FASTNN_TUNE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    known["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

    def timed():
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=known, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        return int(done.stdout)

    assert timed() > 0
    (file,) = tmp_path.glob("fastnn/tune/*.json")
    kernels = {key.split()[0] for key in json.loads(file.read_text("utf-8"))}
    assert {"softmax_fwd", "softmax_bwd", "matmul", "attention_fwd", "attention_dq", "attention_dkv"} <= kernels
    assert timed() == 0
