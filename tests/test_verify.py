"""`python -m fastnn verify`: right, quick, and it notices what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastnn import _dispatch, _extension, cli, testing
from fastnn.verify import SECONDS, verify

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def spoilt(monkeypatch, extension):
    """Makes the softmax kernel of the CPU backend a little wrong."""
    right = _dispatch.KERNELS["softmax"]["cpu"]

    def wrong(*arguments):
        return right.fwd(*arguments) * 1.01

    monkeypatch.setitem(_dispatch.KERNELS["softmax"], "cpu", _dispatch.Kernels(wrong, right.bwd))


@pytest.mark.alone  # measures time
def test_everything_agrees_within_the_time():
    start = time.monotonic()
    threads = torch.get_num_threads()
    report = verify()
    assert time.monotonic() - start <= SECONDS
    assert report.ok, report.failures
    assert torch.get_num_threads() == threads
    assert {(part.op, part.target) for part in report.parts} == {
        (op, str(target)) for op in testing.op_names() for target in testing.targets()
    }
    for part in report.parts:
        assert set(testing.DTYPES) <= {other.dtype for other in report.parts if other.target == part.target}
        assert 0 < part.worst <= 1 or part.dtype == "fp64"


@pytest.mark.alone  # measures time
def test_a_lack_of_time_leaves_out_a_little_of_everything():
    report = verify(3)
    assert report.seconds < 6
    assert all(part.left for part in report.parts)
    counts = [part.passed for part in report.parts]
    assert max(counts) - min(counts) <= max(counts) / 2 + 10


def test_a_mismatch_is_named(spoilt):
    report = verify(5)
    assert not report.ok
    wrong = {(part.op, part.target) for part in report.parts if part.failures}
    assert wrong == {("softmax", isa) for isa in _extension._C.isa_supported()}
    assert any("softmax/rows fp32 on" in failure and "above" in failure for failure in report.failures)


def test_a_crash_is_a_mismatch(monkeypatch, extension):
    def raises(*arguments):
        raise RuntimeError("out of luck")

    right = _dispatch.KERNELS["softmax"]["cpu"]
    monkeypatch.setitem(_dispatch.KERNELS["softmax"], "cpu", _dispatch.Kernels(raises, right.bwd))
    report = verify(5)
    assert any("raised RuntimeError: out of luck" in failure for failure in report.failures)


def test_the_command_ends_with_status_1_on_a_mismatch(spoilt, capsys):
    pytest.importorskip("rich")
    assert cli.main(["verify", "--seconds", "4"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "wrong" in text and "mismatches" in text and "is above" in text


def test_the_command_shows_every_target(capsys):
    pytest.importorskip("rich")
    assert cli.main(["verify", "--seconds", "8"]) == 0
    text = capsys.readouterr().out
    assert "every result agrees" in text
    assert all(str(target) in text for target in testing.targets())


def test_json_and_bad_arguments(capsys):
    assert cli.main(["verify", "--seconds", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["parts"][0]["passed"] > 0
    for wrong in ("0", "-1", "nan"):
        assert cli.main(["verify", "--seconds", wrong]) == 2
        assert "--seconds must be positive" in capsys.readouterr().err
    with pytest.raises(ValueError, match="seconds must be positive, got -2"):
        verify(-2)


def test_without_the_extension_the_reference_alone_is_verified(tmp_path):
    """A copy of the package without its extension: status 2, because what people ask about was not there."""
    package = tmp_path / "fastnn"
    for source in (ROOT / "fastnn").rglob("*.py"):
        target = package / source.relative_to(ROOT / "fastnn")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    # An editable install answers `import fastnn` before any path is looked at; not in this process.
    finders = "[f for f in sys.meta_path if 'fastnn' not in type(f).__module__]"
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.meta_path[:] = {finders}\n")
    run = subprocess.run(
        [sys.executable, "-m", "fastnn", "verify", "--seconds", "4", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert "only the reference was verified" in run.stderr
    assert {part["target"] for part in json.loads(run.stdout)["parts"]} == {"reference"}
