"""The list of rows: complete, unambiguous, counted as the performance page defines it, and right."""

from __future__ import annotations

import pytest
import torch

from fastnn.bench.contenders import CONTENDERS, OURS, Ours
from fastnn.bench.worker import check, check_kernel, truth_of
from fastnn.testing.bench_cases import EXP_OPERATIONS, bench_cases, families, find_bench_case, forward_backward

ALL = [case for family in families() for case in bench_cases(family)]
PUBLIC = [case for case in ALL if not case.sweep]
SWEEP = [case for case in ALL if case.sweep]

# The performance page: row, shape, bar over the best plain contender, bar over the best tuned one.
PAGE = """
softmax_fwd/fp32 | 64, 32000 | 1.0 |
softmax_bwd/fp32 | 64, 32000 | 1.1 |
softmax_fwd/bf16 | 64, 32000 | 1.8 |
softmax_bwd/bf16 | 64, 32000 | 2.7 |
softmax_fwd/fp32 | 49152, 512 | 1.1 | 1.35
softmax_bwd/fp32 | 49152, 512 | 4.2 | 1.0
softmax_fwd/bf16 | 49152, 512 | 1.9 |
softmax_bwd/bf16 | 49152, 512 | 4.2 |
linear+none/fp32 | 1, 4096, 4096 | 1.01 |
linear+none/bf16 | 1, 4096, 4096 | 1.38 |
linear+gelu_tanh/fp32 | 1, 4096, 4096 | 1.20 |
linear+gelu_tanh/bf16 | 1, 4096, 4096 | 1.53 |
linear+none/fp32 | 32, 768, 3072 | 1.07 |
linear+none/bf16 | 32, 768, 3072 | 1.00 |
linear+gelu_tanh/fp32 | 32, 768, 3072 | 1.23 |
linear+gelu_tanh/bf16 | 32, 768, 3072 | 1.00 |
linear+none/fp32 | 128, 768, 3072 | 1.03 |
linear+none/bf16 | 128, 768, 3072 | 1.03 |
linear+gelu_tanh/fp32 | 128, 768, 3072 | 1.06 |
linear+gelu_tanh/bf16 | 128, 768, 3072 | 1.21 |
linear+gelu_erf/fp32 | 128, 768, 3072 | 1.09 |
linear+gelu_erf/bf16 | 128, 768, 3072 | 1.23 |
linear+relu/fp32 | 128, 768, 3072 | 1.10 |
linear+relu/bf16 | 128, 768, 3072 | 1.09 |
linear+silu/fp32 | 128, 768, 3072 | 1.06 |
linear+silu/bf16 | 128, 768, 3072 | 1.15 |
linear+none/fp32 | 2048, 768, 3072 | 1.02 |
linear+none/bf16 | 2048, 768, 3072 | 1.14 |
linear+gelu_tanh/fp32 | 2048, 768, 3072 | 1.19 |
linear+gelu_tanh/bf16 | 2048, 768, 3072 | 1.23 |
"""


def test_every_row_of_the_page_is_there_with_its_bars():
    for line in PAGE.strip().splitlines():
        row, shape, plain, tuned = (field.strip() for field in line.split("|"))
        case = find_bench_case(f"{row} ({shape})")
        bars = [way.bar for way in case.ours if way.bar.plain is not None]
        assert [(bar.plain, bar.tuned) for bar in bars] == [(float(plain), float(tuned) if tuned else None)]
        assert bars[0].holder in CONTENDERS
    assert len(PUBLIC) == len(PAGE.strip().splitlines())


@pytest.mark.parametrize("family", families())
def test_a_sweep_has_about_sixty_shapes(family):
    shapes = {case.shape for case in SWEEP if case.family == family}
    assert 50 <= len(shapes) <= 70
    assert {case.dtype for case in SWEEP if case.family == family} >= {"fp32", "bf16"}
    assert {case.direction for case in SWEEP if case.family == family} >= {"fwd", "fb"}


def test_unknown_families_and_rows_are_named():
    with pytest.raises(ValueError, match=r"no family of rows 'nothing'; there are .*softmax"):
        bench_cases("nothing")
    with pytest.raises(KeyError, match="no row 'softmax_fwd/fp32'"):
        find_bench_case("softmax_fwd/fp32")


def small(cases, most=2**18):
    return [case for case in cases if max(t.numel() for t in meta(case).values()) <= most]


def meta(case):
    with torch.device("meta"):
        generator = None
        return case.make(torch.float32, generator)


@pytest.mark.parametrize("case", small(SWEEP)[::7], ids=lambda case: case.id)
def test_bytes_are_those_of_the_tensors(case):
    inputs = case.inputs()
    results = case.run(case.torch_call, inputs)
    size = sum(t.numel() * t.element_size() for t in inputs.values())
    assert (case.work.read, case.work.written) == (size, sum(t.numel() * t.element_size() for t in results))


def test_operations_are_those_of_the_page():
    softmax = find_bench_case("softmax_fwd/fp32 (64, 32000)")
    assert softmax.work.operations == 64 * 32000 * EXP_OPERATIONS == 64 * 32000 * 32
    assert find_bench_case("softmax_bwd/fp32 (64, 32000)").work.operations == 0
    linear = find_bench_case("linear+gelu_tanh/bf16 (128, 768, 3072)")
    assert (linear.work.operations, linear.work.unit) == (2 * 128 * 768 * 3072, "bf16")


@pytest.mark.parametrize("case", small(SWEEP)[::5], ids=lambda case: case.id)
def test_each_way_is_right_and_runs_its_kernel(case, extension):
    inputs = case.inputs()
    truth, rival = truth_of(case, inputs), case.run(case.torch_call, inputs)
    with torch.no_grad():
        for way in case.ours:
            who = Ours(way.label)
            runner = who.prepare(case, inputs, 1, "plain")
            check(case, runner.results(), truth, rival, f"{OURS} {way.label}")
            assert not check_kernel(case, who, runner)


def test_forward_backward_is_autograd():
    x, g = torch.randn(3, 4), torch.randn(3, 4)
    inputs = {"input": x, "grad": g}
    y, dx = forward_backward(lambda given: given["input"].exp(), ["input"], inputs)
    torch.testing.assert_close((y, dx), (x.exp(), g * x.exp()))
    assert not x.requires_grad
