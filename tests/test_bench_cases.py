"""The list of rows: complete, unambiguous, counted as the performance page defines it, and right."""

from __future__ import annotations

import pytest
import torch

from fastnn.bench.contenders import CONTENDERS, OURS, Ours
from fastnn.bench.limits import RESIDENT
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
cross_entropy_fb/fp32 | 2048, 50257 | 8.5 | 2.8
cross_entropy_fwd/fp32 | 2048, 50257 | 1.8 |
cross_entropy_fb/bf16 | 2048, 50257 | 6.1 | 2.8
cross_entropy_fwd/bf16 | 2048, 50257 | 2.0 |
sdpa_fwd/fp32 | 4, 12, 128, 64 | 1.1 |
sdpa_fb/fp32 | 4, 12, 128, 64 | 1.4 |
sdpa_fwd/bf16 | 4, 12, 128, 64 | 1.5 |
sdpa_fb/bf16 | 4, 12, 128, 64 | 3.1 |
sdpa_fwd_causal/fp32 | 4, 12, 128, 64 | 2.0 |
sdpa_fb_causal/fp32 | 4, 12, 128, 64 | 2.4 |
sdpa_fwd_causal/bf16 | 4, 12, 128, 64 | 3.0 |
sdpa_fb_causal/bf16 | 4, 12, 128, 64 | 5.0 |
sdpa_fwd/fp32 | 1, 12, 2048, 64 | 1.1 |
sdpa_fb/fp32 | 1, 12, 2048, 64 | 1.4 |
sdpa_fwd/bf16 | 1, 12, 2048, 64 | 1.2 |
sdpa_fb/bf16 | 1, 12, 2048, 64 | 2.2 |
sdpa_fwd_causal/fp32 | 1, 12, 2048, 64 | 1.5 |
sdpa_fb_causal/fp32 | 1, 12, 2048, 64 | 1.4 |
sdpa_fwd_causal/bf16 | 1, 12, 2048, 64 | 2.4 |
sdpa_fb_causal/bf16 | 1, 12, 2048, 64 | 2.2 |
sdpa_decode/fp32 | 8, 16, 16, 2048, 64 | 1.7 |
sdpa_decode/bf16 | 8, 16, 16, 2048, 64 | 11.2 |
sdpa_decode/fp32 | 8, 32, 8, 2048, 128 | 2.3 |
sdpa_decode/bf16 | 8, 32, 8, 2048, 128 | 3.1 |
sdpa_decode/fp32 | 1, 32, 8, 2048, 128 | 5.0 |
sdpa_decode/bf16 | 1, 32, 8, 2048, 128 | 2.8 |
layernorm_fwd/fp32 | 2048, 768 | 1.8 |
add_layernorm_fwd/fp32 | 2048, 768 | 1.2 |
rmsnorm_fwd/fp32 | 2048, 768 | 1.4 |
add_rmsnorm_fwd/fp32 | 2048, 768 | 1.1 |
layernorm_fb/fp32 | 2048, 768 | 1.4 |
add_layernorm_fb/fp32 | 2048, 768 | 2.5 | 1.4
rmsnorm_fb/fp32 | 2048, 768 | 1.7 |
layernorm_fwd/bf16 | 2048, 768 | 2.6 |
add_layernorm_fwd/bf16 | 2048, 768 | 3.0 |
rmsnorm_fwd/bf16 | 2048, 768 | 2.8 |
add_rmsnorm_fwd/bf16 | 2048, 768 | 2.2 |
layernorm_fb/bf16 | 2048, 768 | 2.8 |
add_layernorm_fb/bf16 | 2048, 768 | 1.8 |
rmsnorm_fb/bf16 | 2048, 768 | 3.0 |
swiglu_fwd/fp32 | 2048, 11008 | 4.3 | 1.4
swiglu_fb/fp32 | 2048, 11008 | 5.0 | 1.05
swiglu_fwd/bf16 | 2048, 11008 | 3.6 |
swiglu_fb/bf16 | 2048, 11008 | 4.3 |
rope_fwd/fp32 | 1, 32, 2048, 128 | 17.0 | 4.2
rope_fwd/bf16 | 1, 32, 2048, 128 | 7.1 |
linear_ce_fb/fp32 | 1024, 768, 50257 | 1.4 |
linear_ce_fb/bf16 | 1024, 768, 50257 | 1.2 |
"""

BEYOND = ("decode", "linear_quant", "mlp", "sparse")
"""Families that the page has no rows of, or has them in another family."""

FORWARD_ONLY = ("decode", "linear_quant")
"""Families whose ops have no backward."""


def test_every_row_of_the_page_is_there_with_its_bars():
    for line in PAGE.strip().splitlines():
        row, shape, plain, tuned = (field.strip() for field in line.split("|"))
        case = find_bench_case(f"{row} ({shape})")
        bars = [way.bar for way in case.ours if way.bar.plain is not None]
        assert [(bar.plain, bar.tuned) for bar in bars] == [(float(plain), float(tuned) if tuned else None)]
        assert bars[0].holder in CONTENDERS
    for_memory = [case for case in PUBLIC if case.family == "attention" and 8192 in case.shape]
    others = [case for case in PUBLIC if case.family not in BEYOND and case not in for_memory]
    assert len(others) == len(PAGE.strip().splitlines()) and len(for_memory) == 4


@pytest.mark.parametrize("family", families())
def test_a_sweep_has_about_sixty_shapes(family):
    shapes = {case.shape for case in SWEEP if case.family == family}
    assert 50 <= len(shapes) <= 70
    assert {case.dtype for case in SWEEP if case.family == family} >= {"fp32", "bf16"}
    assert {case.direction for case in SWEEP if case.family == family} >= (
        {"fwd"} if family in FORWARD_ONLY else {"fwd", "fb"}
    )


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
    given, found = ([t.numel() * t.element_size() for t in tensors] for tensors in (inputs.values(), results))
    if case.family == "linear_quant":  # its weights are codes, at most a byte and a scale each
        assert case.work.written == sum(found) and case.work.read < sum(given)
        return
    if case.family == "sparse" and case.direction == "fwd":  # the plain call reads the zeros, too
        assert case.work.written == sum(found) and case.work.read < sum(given)
        return
    assert case.work.written == sum(found)
    if case.direction == "fb":  # two passes: forward reads all but the last, backward what it needs
        assert sum(given) - given[-1] <= case.work.read <= 2 * sum(given) + found[0]
    else:
        assert case.work.read == sum(given)


def test_operations_are_those_of_the_page():
    softmax = find_bench_case("softmax_fwd/fp32 (64, 32000)")
    assert softmax.work.operations == 64 * 32000 * EXP_OPERATIONS == 64 * 32000 * 32
    assert find_bench_case("softmax_bwd/fp32 (64, 32000)").work.operations == 0
    linear = find_bench_case("linear+gelu_tanh/bf16 (128, 768, 3072)")
    assert (linear.work.operations, linear.work.unit) == (2 * 128 * 768 * 3072, "bf16")
    attention = find_bench_case("sdpa_fwd/fp32 (4, 12, 128, 64)").work.operations
    assert attention == 4 * 4 * 12 * 128 * 128 * 64
    assert find_bench_case("sdpa_fwd_causal/fp32 (4, 12, 128, 64)").work.operations == attention / 2
    assert find_bench_case("sdpa_fb/fp32 (4, 12, 128, 64)").work.operations == attention * 3.5


# What the performance page says of its best contender: time in milliseconds and % of limit, on the page's machine.
SHARES = {
    "softmax_fwd/fp32 (64, 32000)": (0.755, 74),
    "softmax_fwd/bf16 (49152, 512)": (18.42, 37),
    "linear+none/fp32 (1, 4096, 4096)": (2.65, 94),
    "linear+none/bf16 (1, 4096, 4096)": (1.81, 69),
    "linear+none/bf16 (32, 768, 3072)": (0.7158, 90),
    "linear+none/fp32 (128, 768, 3072)": (5.78, 89),
    "cross_entropy_fb/fp32 (2048, 50257)": (481.22, 10),
    "cross_entropy_fwd/fp32 (2048, 50257)": (58.66, 36),
    "cross_entropy_fb/bf16 (2048, 50257)": (308.27, 14),
    "sdpa_fwd/fp32 (4, 12, 128, 64)": (2.73, 63),
    "sdpa_fb_causal/fp32 (4, 12, 128, 64)": (13.54, 22),
    "sdpa_fwd/bf16 (1, 12, 2048, 64)": (83.31, 66),
    "sdpa_decode/fp32 (8, 16, 16, 2048, 64)": (9.22, 54),
    "sdpa_decode/fp32 (1, 32, 8, 2048, 128)": (2.60, 11),
    "sdpa_decode/bf16 (1, 32, 8, 2048, 128)": (1.43, 20),
    "swiglu_fwd/fp32 (2048, 11008)": (67.40, 15),
    "swiglu_fb/fp32 (2048, 11008)": (199.03, 13),
    "swiglu_fwd/bf16 (2048, 11008)": (37.98, 18),
    "swiglu_fb/bf16 (2048, 11008)": (102.98, 15),
    "rope_fwd/fp32 (1, 32, 2048, 128)": (54.58, 5),
    "linear_ce_fb/fp32 (1024, 768, 50257)": (3350, 61),
    "linear_ce_fb/bf16 (1024, 768, 50257)": (1490, 68),
}


@pytest.mark.parametrize("row", SHARES)
def test_shares_of_the_limit_are_the_pages(row):
    """On the page's limits: 117 / 234 G(FL)OP/s, 85 GB/s from cache, 27 from memory."""
    work = find_bench_case(row).work
    peak = {"fp32": 117e9, "bf16": 234e9}[work.unit]
    bandwidth = 85e9 if work.bytes <= RESIDENT * 2**25 else 27e9
    milliseconds, percent = SHARES[row]
    bound = max(work.operations / peak, work.bytes / bandwidth)
    assert 100 * bound / (milliseconds * 1e-3) == pytest.approx(percent, abs=0.7)


@pytest.mark.parametrize("case", small(SWEEP)[::5], ids=lambda case: case.id)
def test_each_way_is_right_and_runs_its_kernel(case, extension):
    inputs = case.inputs()
    truth, rival = truth_of(case, inputs), case.rival(inputs)
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
