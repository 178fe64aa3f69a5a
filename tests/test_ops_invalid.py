"""Every invalid call raises the right exception in words, in a process of its own: a crash is one failure."""

from __future__ import annotations

import functools

import pytest

from fastnn import testing
from fastnn.testing import invalid_calls, op_names
from fastnn.testing.invalid import problem_with, run_all

CALLS = [call for op in op_names() for call in invalid_calls(op)]


@functools.cache
def outcomes():
    return {(outcome.op, outcome.name): outcome.problem for outcome in run_all()}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.op}-{call.name}")
def test_invalid_call(call, request):
    if call.raw:
        request.getfixturevalue("extension")
    assert outcomes()[call.op, call.name] == ""


@pytest.mark.parametrize("call", [call for call in CALLS if not call.raw], ids=lambda call: f"{call.op}-{call.name}")
def test_invalid_public_call_on_the_reference(call):
    with testing.REFERENCE.forced():
        assert problem_with(call) == ""


@pytest.mark.parametrize("op", op_names())
def test_there_are_invalid_calls_of_both_kinds(op):
    kinds = [call.raw for call in invalid_calls(op)]
    assert kinds.count(True) >= 10 and kinds.count(False) >= 10


def test_a_crash_is_reported_and_the_rest_goes_on(monkeypatch):
    """The runner itself: a call that kills the process is one failed call."""
    from fastnn.testing import invalid

    printed = iter(
        [
            ('["a", "1"]\n["a", "1", ""]\n["a", "2"]\n', -11),
            ('["a", "3"]\n["a", "3", "wrong"]\n', 0),
        ]
    )

    def fake_run(*_args, **_options):
        stdout, returncode = next(printed)
        return invalid.subprocess.CompletedProcess([], returncode, stdout, "Segmentation fault")

    monkeypatch.setattr(invalid, "all_calls", lambda: [None] * 3)
    monkeypatch.setattr(invalid.subprocess, "run", fake_run)
    first, second, third = invalid.run_all()
    assert first.problem == ""
    assert "status -11" in second.problem and "Segmentation fault" in second.problem
    assert third.problem == "wrong"
