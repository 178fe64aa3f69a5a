"""What a GPU adds to an op's contract: streams, graphs, devices, and offsets beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
from gpu_lanes import CASES, LANES, grad_for, inputs_of, lanes_and_cases, need, results_of

import fastnn
from fastnn import testing
from fastnn.testing import policy, same_bits

SLEEP_CYCLES = 40_000_000
"""About 20 ms: long after a kernel on another stream would have run."""


@pytest.mark.parametrize(("lane", "case"), lanes_and_cases())
def test_a_cuda_graph_replays_on_new_inputs(lane, case):
    """Forward and backward are captured once, and give the bits of an eager call whenever the inputs change."""
    need(lane, case.op)
    if case.name in ("dropout", "everything"):
        pytest.skip("the case seeds torch's generator, which a capture refuses")
    inputs, other = inputs_of(case, "bf16"), inputs_of(case, "bf16", seed=1)
    grad = grad_for(case, "bf16")
    side = torch.cuda.Stream()
    with lane.forced():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiled kernels and memory are there before the capture
            for _ in range(2):
                results_of(case, inputs, grad)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results_of(case, inputs, grad)
        for new in (other, inputs_of(case, "bf16")):
            for name, t in inputs.items():
                t.copy_(new[name])
            graph.replay()
            expected = results_of(case, new, grad)
            for part, a, b in zip(case.parts, captured, expected, strict=True):
                assert same_bits(a, b), f"{part} differs from an eager call"


@pytest.mark.parametrize(("lane", "case"), lanes_and_cases())
def test_kernels_run_on_the_current_stream(lane, case):
    """The inputs are written late on a side stream: a kernel on any other stream reads zeros."""
    need(lane, case.op)
    right = inputs_of(case, "fp32")
    grad = grad_for(case, "fp32")
    with lane.forced():
        expected = results_of(case, right, grad)
        late = {name: t.clone() if t.dtype.is_floating_point else t for name, t in right.items()}
        torch.cuda.synchronize()
        for t in late.values():
            if t.dtype.is_floating_point:
                t.zero_()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP_CYCLES)
            for name, t in late.items():
                if t.dtype.is_floating_point:
                    t.copy_(right[name])
            found = results_of(case, late, grad)
        side.synchronize()
    for part, a, b in zip(case.parts, found, expected, strict=True):
        assert same_bits(a, b), f"{part} was computed on another stream"


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_many_calls_on_many_streams_do_not_disturb_each_other(lane):
    """Scratch memory that calls shared would show."""
    need(lane, "softmax")
    need(lane, "norm")
    x = [torch.randn(300, 5000, device="cuda", generator=torch.Generator("cuda").manual_seed(i)) for i in range(6)]
    with lane.forced():
        expected = [results(t) for t in x]
        streams = [torch.cuda.Stream() for _ in x]
        torch.cuda.synchronize()
        found = []
        for _ in range(5):
            for stream, t in zip(streams, x, strict=True):
                with torch.cuda.stream(stream):
                    found.append(results(t))
        torch.cuda.synchronize()
    for i, parts in enumerate(found):
        assert all(same_bits(a, b) for a, b in zip(parts, expected[i % len(x)], strict=True))


def results(x):
    leaf = x.detach().requires_grad_()
    w = torch.ones(x.shape[1], device="cuda", requires_grad=True)
    y = fastnn.rms_norm(fastnn.softmax(leaf, -1), w.shape, w)
    return [y.detach(), *torch.autograd.grad(y, [leaf, w], torch.ones_like(y))]


# ---- devices


MIXED = {
    "linear weight": lambda g, c: fastnn.linear(g(3, 4), c(5, 4)),
    "linear bias": lambda g, c: fastnn.linear(g(3, 4), g(5, 4), c(5)),
    "cross_entropy target": lambda g, c: fastnn.cross_entropy(g(3, 4), c(3).long()),
    "cross_entropy weight": lambda g, c: fastnn.cross_entropy(g(3, 4), g(3).long(), c(4)),
    "attention key": lambda g, c: fastnn.scaled_dot_product_attention(g(1, 2, 3, 4), c(1, 2, 3, 4), g(1, 2, 3, 4)),
    "attention value": lambda g, c: fastnn.scaled_dot_product_attention(g(1, 2, 3, 4), g(1, 2, 3, 4), c(1, 2, 3, 4)),
    "attention mask": lambda g, c: fastnn.scaled_dot_product_attention(*[g(1, 2, 3, 4)] * 3, c(3, 3)),
    "layer_norm weight": lambda g, c: fastnn.layer_norm(g(3, 4), (4,), c(4)),
    "rms_norm weight": lambda g, c: fastnn.rms_norm(g(3, 4), (4,), c(4)),
    "add_layer_norm residual": lambda g, c: fastnn.add_layer_norm(g(3, 4), c(3, 4), g(4)),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("on", ["cuda", "cpu"])
def test_operands_on_two_devices_are_refused(name, on):
    """Whatever backend would run; the message names the operand and both devices."""
    other = {"cuda": "cpu", "cpu": "cuda"}[on]
    with pytest.raises((TypeError, ValueError), match=name.split()[1]) as caught:
        MIXED[name](lambda *s: torch.ones(s, device=on), lambda *s: torch.ones(s, device=other))
    assert "cuda" in str(caught.value) and "cpu" in str(caught.value)


@pytest.mark.parametrize("op", testing.op_names())
def test_a_backend_of_another_device_is_refused(op, extension):
    case = next(case for case in CASES if case.op == op)
    with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match="the tensors are on cuda"):
        case.call(inputs_of(case, "fp32"))
    for lane in LANES:
        need(lane, op)
        with lane.forced(), pytest.raises(NotImplementedError, match="the tensors are on cpu"):
            case.call(case.inputs(torch.float32))


@pytest.mark.parametrize("op", testing.op_names())
def test_a_call_chooses_a_gpu_backend_by_itself(op):
    case = next(case for case in CASES if case.op == op)
    there = [lane.backend for lane in LANES if not fastnn._dispatch.why_no_kernel(op, lane.backend)]
    with fastnn.record() as runs, torch.no_grad():
        case.call(inputs_of(case, "fp32"))
    assert {run.backend for run in runs} <= set(there or ["reference"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("lane", "case"), lanes_and_cases())
def test_the_device_of_the_tensors_counts_not_the_current_one(lane, case):
    need(lane, case.op)
    first = inputs_of(case, "fp32")
    second = {name: t.to("cuda:1") for name, t in first.items()}
    with lane.forced(), torch.no_grad():
        assert same_bits(case.call(second).to("cuda:0"), case.call(first))


# ---- more than 2^31 elements


def late_rows(t, rows=3):
    """The last rows: their offsets need more than 32 bits."""
    return t[-rows:].clone()


def compare(ours, call, rows, differentiable, grad, where):
    """Result and gradients of the last rows against float64 and torch on these rows alone."""
    exact = [t.double().requires_grad_(i in differentiable) for i, t in enumerate(rows)]
    rival = [t.clone().requires_grad_(i in differentiable) for i, t in enumerate(rows)]
    truths, rivals = [], []
    for given, found in ((exact, truths), (rival, rivals)):
        y = call(*given)
        leaves = [given[i] for i in differentiable]
        found += [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]
    for i, (mine, true, theirs) in enumerate(zip(ours, truths, rivals, strict=True)):
        factor = policy.GRADIENT_FACTOR if i else policy.FORWARD_FACTOR
        testing.assert_within_budget(mine, true, theirs, theirs.dtype, factor, where=where)


def big(*shape):
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)


def run_big(lane, call, x, grad, *rest):
    leaf = x.requires_grad_()
    with lane.forced():
        y = call(leaf, *rest)
        (dx,) = torch.autograd.grad(y, [leaf], grad)
    x.requires_grad_(False)
    return y.detach(), dx


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_big_softmax(lane, much_memory):
    need(lane, "softmax")
    much_memory(28)
    x = big(2**31 // 4096 + 3, 4096)
    y, dx = run_big(lane, lambda t: fastnn.softmax(t, -1), x, x)
    compare([late_rows(y), late_rows(dx)], lambda t: torch.softmax(t, -1), [late_rows(x)], [0], late_rows(x), "softmax")


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_big_norm(lane, much_memory):
    need(lane, "norm")
    much_memory(36)
    x, w = big(2**31 // 4096 + 3, 4096), big(4096)
    y, dx = run_big(lane, lambda t, w: fastnn.rms_norm(t, w.shape, w, 1e-5), x, x, w)
    call = lambda t, w: torch.nn.functional.rms_norm(t, w.shape, w, 1e-5)  # noqa: E731
    compare([late_rows(y), late_rows(dx)], call, [late_rows(x), w], [0], late_rows(x), "rms_norm")


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_big_cross_entropy(lane, much_memory):
    need(lane, "cross_entropy")
    much_memory(24)
    rows, classes = 2**31 // 128256 + 3, 128256
    x = big(rows, classes)
    target = torch.randint(classes, (rows,), device="cuda")
    grad = big(rows)
    loss, dx = run_big(lane, lambda t, k: fastnn.cross_entropy(t, k, reduction="none"), x, grad, target)
    last = target[-3:]

    def call(t):
        return torch.nn.functional.cross_entropy(t, last, reduction="none")

    compare([late_rows(loss), late_rows(dx)], call, [late_rows(x)], [0], late_rows(grad), "cross_entropy")


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_big_linear(lane, much_memory):
    need(lane, "linear")
    much_memory(30)
    x, w, b = big(2**31 // 64 + 5, 64), big(64, 64), big(64)
    call = lambda t, w, b: torch.relu(torch.nn.functional.linear(t, w, b))  # noqa: E731
    y, dx = run_big(lane, lambda t, w, b: fastnn.linear(t, w, b, activation="relu"), x, x, w, b)
    compare([late_rows(y), late_rows(dx)], call, [late_rows(x), w, b], [0], late_rows(x), "linear")


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_big_attention(lane, much_memory):
    need(lane, "attention")
    much_memory(60)
    q = big(2**31 // (128 * 64) // 2 + 2, 2, 128, 64)
    k = q  # one tensor for all three: memory
    y, dq = run_big(lane, lambda t, k: fastnn.scaled_dot_product_attention(t, k, k, is_causal=True), q, q, k.detach())
    call = lambda t, k: torch.nn.functional.scaled_dot_product_attention(t, k, k, is_causal=True)  # noqa: E731
    compare([late_rows(y), late_rows(dq)], call, [late_rows(q), late_rows(k)], [0], late_rows(q), "attention")
