"""docs/accuracy.md: every op, result and type on every implementation, within the policy; the tool that makes it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnn import _extension
from fastnn.testing import DTYPES, cases, op_names

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import accuracy

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/accuracy.md"
IMPLEMENTATIONS = [
    "torch",
    "scalar",
    "avx2",
    "avx512",
    "avx512_vnni",
    "avx512_bf16",
    "CUDA emulated",
    "Triton interpreted",
]


def tables(text):
    """Each table of a page, as a list of rows of cells."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def main(page):
    return tables(page)[0]


def test_it_names_every_implementation(main):
    assert main[0] == ["op", "result", "type", *IMPLEMENTATIONS, "of the bound", "furthest apart"]


def test_it_names_every_op_result_and_type(main):
    wanted = {
        (op, part, dtype)
        for op in op_names()
        for case in accuracy.shared_cases(op)
        for part in case.parts
        for dtype in DTYPES
    }
    named = [tuple(row[:3]) for row in main[2:]]
    assert len(named) == len(set(named))
    assert set(named) == wanted, "run `make accuracy`"


def test_every_number_is_there_and_within_the_policy(main, page):
    absent = dict(re.findall(r"^- (.+) has no kernels of (.+)\.$", page, re.MULTILINE))
    for row in main[2:]:
        assert len(row) == len(main[0]), row
        for column, cell in zip(main[0][3:-2], row[3:-2], strict=True):
            if cell == "-":
                assert row[0] in absent.get(column, "").split(", "), f"{row[:3]} has no number on {column}"
            else:
                assert float(cell) >= 0
        assert 0 <= float(row[-2]) <= 1, row
        most, pair = row[-1].split(": ")
        assert float(most) >= 0 and set(pair.split(" and ")) <= set(IMPLEMENTATIONS)


def test_every_two_are_compared(page):
    found = tables(page)[1:]
    assert [table[0][0] for table in found] == list(DTYPES)
    for table in found:
        assert table[0][1:] == IMPLEMENTATIONS[1:]
        assert [row[0] for row in table[2:]] == IMPLEMENTATIONS[:-1]
        for i, row in enumerate(table[2:]):
            assert all(float(cell) >= 0 for cell in row[1 + i :]) and not any(row[1 : 1 + i])


def test_the_cases_have_every_result():
    """No part of an op is left out by the choice of layouts; weights in forms of the CPU's own do not count."""
    for op in op_names():
        parts = {part for case in cases(op) if case.forward_kernel == f"{op}_fwd" for part in case.parts}
        assert parts == {part for case in accuracy.shared_cases(op) for part in case.parts}


def test_differences_are_counted_in_eps_of_the_largest_value():
    truth = torch.tensor([4.0, 0.0, float("inf")], dtype=torch.float64)
    off = torch.tensor([4.0, 2 * 4 * torch.finfo(torch.bfloat16).eps, 1.0]).bfloat16()
    assert accuracy.difference(off, truth, truth, "bf16") == 2
    assert accuracy.difference(off.float(), truth, truth, "bf16") == 2
    assert accuracy.difference(off, off, truth, "bf16") == 0
    assert not accuracy._is_lost(off, truth, "bf16") and accuracy._is_lost(off, truth / 10, "bf16")
    assert [accuracy.number(value) for value in (0.0, 0.04567, 0.5, 3.14159, 31.4, 314.159, 9.99)] == [
        *("0", "0.046", "0.50", "3.1", "31", "314", "10.0")
    ]


def test_it_runs_as_written():
    """On the reference and the instruction sets; the emulator and the interpreter have lanes of their own."""
    if _extension._C is None:
        pytest.skip(_extension.missing)
    names = [column for column, reason in accuracy.columns().items() if not reason]
    names = [name for name in names if name not in (accuracy.EMULATED, accuracy.INTERPRETED)]
    accuracy_of = accuracy.run_all([names[0], names[-1]], ["softmax"], 1)
    for found in accuracy_of.values():
        assert {key[2] for key in found["results"]} == set(DTYPES)
    assert set(accuracy_of["torch"]["truth"]) == set(accuracy_of[names[-1]]["results"])


def test_a_broken_column_is_told(tmp_path):
    command = [sys.executable, ROOT / "tools/accuracy.py", "--ops", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "no such op: nothing" in done.stderr
