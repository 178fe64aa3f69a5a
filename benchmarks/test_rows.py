"""The rows of fastnn.testing under pytest-benchmark: for its histograms, comparisons and storage.

    pytest benchmarks                               ours and eager torch, every public row, one thread
    pytest benchmarks -k "softmax and bf16"         some of them
    pytest benchmarks --rows-with eager,compile     other contenders
    pytest benchmarks --benchmark-save NAME         and the rest of pytest-benchmark's options

Verdicts need interleaved rounds and several visits: those are `python -m fastnn bench`, over the same cases.
"""

from __future__ import annotations

import pytest
import torch

from fastnn.bench.allocators import PLAIN
from fastnn.bench.contenders import OURS, contender
from fastnn.bench.limits import NoLimits, machine_limits
from fastnn.bench.worker import check, truth_of
from fastnn.testing.bench_cases import bench_cases, families


def pytest_generate_tests(metafunc):
    """A test for each public row and contender; our ways first."""
    others = metafunc.config.getoption("--rows-with").split(",")
    found = []
    for family in families():
        for case in bench_cases(family):
            if not case.sweep:
                names = [f"{OURS} {way.label}".strip() for way in case.ours] + [name for name in others if name]
                found += [pytest.param(case, name, id=f"{case.id}-{name}") for name in names]
    metafunc.parametrize(("case", "name"), found)


@pytest.fixture(scope="module")
def limits():
    try:
        return machine_limits(threads=[1])
    except NoLimits:
        return None


def test_row(case, name, benchmark, limits):
    torch.set_num_threads(1)
    who = contender(name)
    why = who.missing() or who.why_not(case)
    if why:
        pytest.skip(f"{name}: {why}")
    inputs = case.inputs()
    with torch.no_grad():
        runner = who.prepare(case, inputs, 1, PLAIN)
        check(case, runner.results(), truth_of(case, inputs), case.run(case.torch_call, inputs), name)
        benchmark.group = f"{case.id}"
        benchmark(runner.call)
    if benchmark.stats and limits:
        median = benchmark.stats.stats.median
        bound = limits.bound(case.work)
        benchmark.extra_info["GB/s"] = round(case.work.bytes / median / 1e9, 2)
        benchmark.extra_info["GFLOP/s"] = round(case.work.operations / median / 1e9, 2)
        benchmark.extra_info["% of limit"] = round(100 * bound.seconds / median, 1)
        benchmark.extra_info["limited by"] = bound.by
