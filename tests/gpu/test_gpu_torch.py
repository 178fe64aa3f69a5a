"""Torch's own machinery around our ops on a GPU: compile, autocast, dropout, accelerate, higher derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_lanes import LANES, grad_for, inputs_of, lanes_and_cases, need, results_of
from torch import nn

import fastnn
from fastnn import testing
from fastnn.testing import same_bits
from fastnn.testing.devices import torchs_sound_kernels


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


ATTENTION = {
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
    "blocked_full": {},
    "few": {"enable_gqa": True},
}


def call_of(case):
    """The case's call; attention's without the random state that it keeps around it."""
    if case.op != "attention":
        return case.call

    def call(inputs):
        tensors = (inputs["query"], inputs["key"], inputs["value"], inputs.get("attn_mask"))
        return fastnn.scaled_dot_product_attention(*tensors, **ATTENTION[case.name])

    return call


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("lane", "case"), lanes_and_cases())
def test_compiled_without_a_graph_break(lane, case, dynamic, fresh_compiler):
    """One graph, forward and backward, with the bits of the eager call."""
    need(lane, case.op)
    if case.name in ("dropout", "everything"):
        pytest.skip("torch.compile draws its own random numbers")
    inputs = inputs_of(case, "bf16")
    grad = grad_for(case, "bf16")
    compiled = torch.compile(call_of(case), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with lane.forced():
        expected = results_of(case, inputs, grad)
        leaves = {name: t.detach().requires_grad_(name in case.differentiable) for name, t in inputs.items()}
        with fastnn.record() as runs:
            y = compiled(leaves)
            gradients = torch.autograd.grad(y, [leaves[name] for name in case.differentiable], grad)
    for part, a, b in zip(case.parts, [y.detach(), *gradients], expected, strict=True):
        assert same_bits(a, b), part
    assert {run.backend for run in runs} == {lane.backend}


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_compiled_by_inductor(lane, fresh_compiler):
    for op in ("linear", "norm", "softmax"):
        need(lane, op)

    def block(x, w, n):
        return fastnn.softmax(fastnn.linear(fastnn.rms_norm(x * 2, n.shape, n), w, activation="gelu_tanh") + 1, -1)

    x, w, n = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in ((33, 64), (96, 64), (64,))
    )
    with lane.forced():
        y, z = block(x, w, n), torch.compile(block, fullgraph=True)(x, w, n)
        expected, found = (torch.autograd.grad(t, (x, w, n), torch.ones_like(t)) for t in (y, z))
    for a, b in zip((z.detach(), *found), (y.detach(), *expected), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


AUTOCAST = {
    "activation": (lambda x, w, n: fastnn.gelu(x, bias=n), lambda x, w, n: F.gelu(x + n)),
    "linear": (
        lambda x, w, n: fastnn.linear(x, w, activation="gelu"),
        lambda x, w, n: F.gelu(F.linear(x, w)),
    ),
    "softmax": (lambda x, w, n: fastnn.softmax(x, -1), lambda x, w, n: torch.softmax(x, -1)),
    "log_softmax": (lambda x, w, n: fastnn.log_softmax(x, -1), lambda x, w, n: torch.log_softmax(x, -1)),
    "norm": (lambda x, w, n: fastnn.layer_norm(x, n.shape, n), lambda x, w, n: F.layer_norm(x, n.shape, n)),
    "attention": (
        lambda x, w, n: fastnn.scaled_dot_product_attention(x[None, None], w[None, None], w[None, None]),
        lambda x, w, n: F.scaled_dot_product_attention(x[None, None], w[None, None], w[None, None]),
    ),
    "cross_entropy": (
        lambda x, w, n: fastnn.cross_entropy(x, torch.arange(len(x), device="cuda")),
        lambda x, w, n: F.cross_entropy(x, torch.arange(len(x), device="cuda")),
    ),
}


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", AUTOCAST)
@pytest.mark.parametrize("lane", LANES, ids=str)
def test_autocast_takes_and_gives_torchs_types(lane, op, given, cast):
    need(lane, op.replace("log_", ""))
    operands = [torch.randn(s, device="cuda").to(given).requires_grad_() for s in ((5, 12), (7, 12), (12,))]
    ours, theirs = AUTOCAST[op]
    with lane.forced(), torchs_sound_kernels("cuda"), torch.autocast("cuda", dtype=cast):
        y, z = ours(*operands), theirs(*operands)
    assert y.dtype == z.dtype
    torch.testing.assert_close(y, z, atol=3e-2, rtol=3e-2)
    y.sum().backward()
    assert {t.grad.dtype for t in operands if t.grad is not None} == {given}


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 37, 50), (1, 2, 3, 301), (1, 1, 128, 128)])
def test_dropout_drops_what_the_cpu_drops(lane, shape, extension):
    """Uniform weights on the unit vectors: the result is the mask itself."""
    need(lane, "attention")
    b, h, sq, sk = shape
    q, k, v = torch.zeros(b, h, sq, 16), torch.zeros(b, h, sk, 16), torch.eye(sk).expand(b, h, sk, sk)
    masks = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(11)
        with fastnn.use_backend(lane.backend if device == "cuda" else "cpu"):
            y = fastnn.scaled_dot_product_attention(*(t.to(device) for t in (q, k, v)), dropout_p=0.3)
        masks.append(y.cpu() != 0)
    assert torch.equal(*masks)
    assert 0.6 < masks[0].double().mean() < 0.8


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_second_derivatives(lane):
    need(lane, "softmax")
    x = torch.randn(4, 9, device="cuda", dtype=torch.float32, requires_grad=True)
    w = torch.randn(4, 9, device="cuda")
    with lane.forced():
        (g,) = torch.autograd.grad((fastnn.softmax(x, -1) * w).sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(g.square().sum(), x)
    (g,) = torch.autograd.grad((torch.softmax(x.double(), -1) * w).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def model(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 32), nn.Softmax(-1)]
    return nn.Sequential(*layers).to("cuda", dtype)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lane", LANES, ids=str)
def test_accelerate_a_model_on_the_gpu(lane, dtype, training):
    for op in ("linear", "norm", "softmax"):
        need(lane, op)
    net = model(dtype).train(training)
    x = torch.randn(8, 64, device="cuda", dtype=dtype)
    with lane.forced():
        with fastnn.accelerate(net, example_inputs=x, freeze=True) as report:
            assert report.verified, report
            with fastnn.record() as runs:
                net(x)
        assert {run.backend for run in runs} == {lane.backend}
        assert {"linear_fwd", "norm_fwd", "softmax_fwd"} <= {run.kernel for run in runs}
        assert all("packed" not in entry.kernel for entry in report.entries)
        found = fastnn.explain(net, x)
    assert {part.backend for part in found.parts if part.kernel} == {lane.backend}
    assert found.ms > 0 and any(part.limit_ms for part in found.parts)


def test_info_and_verify_speak_of_the_gpu():
    found = fastnn.info()
    assert found["gpus"] and found["gpus"][0]["name"] in torch.cuda.get_device_name(0)
    from fastnn.verify import verify

    report = verify(6)
    assert not report.failures  # in so short a time compiling kernels leaves some parts out
    assert {str(target) for target in testing.targets("cuda")} <= {part.target for part in report.parts}
