"""What the Triton operators promise beside their numbers: schemas, shapes without values, one graph, refusals."""

from __future__ import annotations

import far
import pytest
import torch

import fastnn
from fastnn import _dispatch, testing
from fastnn.testing import interpreter

DEVICE, FLOAT32 = torch.device("cpu"), torch.float32
OPS = [op for op in testing.op_names() if not _dispatch.why_no_kernel(op, "triton")]
NAMES = [f"{op}_{direction}" for op in OPS for direction in ("fwd", "bwd")]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


WITHOUT_KERNELS = {"dropout_add", "linear_cross_entropy", "masked_softmax", "mlp", "rope"}


def test_every_op_is_there():
    for op in testing.op_names():
        if op in WITHOUT_KERNELS:
            assert _dispatch.why_not(op, "triton", DEVICE, FLOAT32) == f"{op} has no triton kernel"
            continue
        assert _dispatch.why_not(op, "triton", DEVICE, FLOAT32) == ""
        assert "float64" in _dispatch.why_not(op, "triton", DEVICE, torch.float64)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", far.CALLS)
def test_offsets_have_64_bits(name, offset):
    far.compare(name, offset)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_compiled_operators(name, extension):
    ours, theirs = (torch._C._get_schema(f"{library}::{name}", "") for library in ("fastnn_triton", "fastnn"))
    assert str(ours).removeprefix("fastnn_triton") == str(theirs).removeprefix("fastnn")


def raw_calls():
    options = (0.0, 0.25, 0.0, -1, 0, True)
    q, x, w = randn(1, 2, 20, 16), randn(7, 40), randn(24, 40)
    target, loss = torch.arange(7), (1, -100, 0.1, 0.0, 0.0, True)
    yield "softmax_fwd", (x, 1, False, None, True)
    yield "softmax_bwd", (x, x.softmax(1), 1, False, FLOAT32, True)
    yield "norm_fwd", (x, None, x[0].clone(), None, 1, 1e-5, False, True, True)
    yield "norm_bwd", (x, None, x, x[0].clone(), randn(7, 2), 1, False, FLOAT32, [True, True, True], True)
    yield "linear_fwd", (x, w, None, 2, True, True)
    yield "linear_bwd", (randn(7, 24), x, w, randn(7, 24), 2, [7, 40], [True, True, True], True)
    yield "attention_fwd", (q, q, q, None, None, *options)
    yield "attention_bwd", (q, q, q, q, None, None, q, randn(1, 2, 20), *options)
    yield "activation_fwd", (x, None, x[0].clone(), 2, False, True)
    yield "activation_bwd", (x, x, None, x[0].clone(), 2, False, [True, False, True], True)
    yield "activation_fwd", (x, None, None, 4, True, True)
    yield "activation_bwd", (x[:, :20], x, None, None, 4, True, [True, False, False], True)
    yield "cross_entropy_fwd", (x, target, None, *loss)
    yield "cross_entropy_bwd", (torch.ones(()), x, target, None, randn(7, 2), torch.full((2,), 7.0), *loss)


@pytest.mark.parametrize(("name", "arguments"), [pytest.param(*call, id=call[0]) for call in raw_calls()])
def test_opcheck(name, arguments):
    """The schema tells the truth, and the shape-only kernel gives what the kernel gives."""
    _dispatch.why_not("softmax", "triton", DEVICE, FLOAT32)
    operator = getattr(torch.ops.fastnn_triton, name).default
    with torch.no_grad():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_raw_operator_refuses_gradients():
    _dispatch.why_not("softmax", "triton", DEVICE, FLOAT32)
    with pytest.raises(RuntimeError, match=r"softmax_fwd.*without gradients"):
        torch.ops.fastnn_triton.softmax_fwd(randn(2, 3), 1, False, None)


def test_every_operator_is_checked():
    assert {name for name, _ in raw_calls()} == set(NAMES)


@pytest.mark.parametrize(
    "op", ["softmax", "linear", "attention", "layer_norm", "add_rms_norm", "cross_entropy", "gelu", "swiglu"]
)
def test_compile_keeps_one_graph(op):
    calls = {
        "softmax": (lambda x: fastnn.softmax(x * 2, -1), (randn(5, 40),)),
        "linear": (lambda x, w: fastnn.linear(x, w, activation="gelu"), (randn(5, 40), randn(8, 40))),
        "attention": (fastnn.scaled_dot_product_attention, (randn(1, 2, 20, 16),) * 3),
        "cross_entropy": (lambda x: fastnn.cross_entropy(x, torch.arange(5) * 3), (randn(5, 40),)),
        "gelu": (lambda x, b: fastnn.gelu(x, bias=b), (randn(5, 40), randn(40))),
        "swiglu": (lambda x: fastnn.swiglu(x * 2), (randn(5, 40),)),
        "add_rms_norm": (
            lambda x, r, w: fastnn.add_rms_norm(x, r, w)[0],
            (randn(5, 40), randn(5, 40), randn(40)),
        ),
        "layer_norm": (lambda x, w: fastnn.layer_norm(x, (40,), w), (randn(5, 40), randn(40))),
    }
    function, tensors = calls[op]
    leaves = [t.clone().requires_grad_() for t in tensors]
    with fastnn.use_backend("triton"), fastnn.record() as runs:
        expected = function(*leaves)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
        assert torch.equal(compiled, expected)
        found = torch.autograd.grad(compiled.sum(), leaves)
        for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
            assert torch.equal(ours, theirs)
    assert {run.backend for run in runs} == {"triton"} and len(runs) >= 4


def test_bad_target_makes_its_row_nan():
    """No exception: it would wait for the GPU."""
    x = randn(3, 5).requires_grad_()
    with fastnn.use_backend("triton"):
        loss = fastnn.cross_entropy(x, torch.tensor([1, 7, 2]), reduction="none")
        (dx,) = torch.autograd.grad(loss[[0, 2]].sum() + loss[1], x)
    assert loss.isnan().tolist() == [False, True, False]
    assert dx.isnan().any(1).tolist() == [False, True, False]


class TestInterpreter:
    """The repairs bite."""

    def test_out_of_bounds_is_seen(self):
        import triton
        import triton.language as tl

        @triton.jit
        def careless(x_ptr, BLOCK: tl.constexpr):
            tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

        with pytest.raises(Exception, match="out of bounds"):
            careless[(1,)](torch.zeros(10), 16)

    def test_arithmetic_on_bfloat16_is_refused(self):
        import triton
        import triton.language as tl

        @triton.jit
        def careless(x_ptr, BLOCK: tl.constexpr):
            at = x_ptr + tl.arange(0, BLOCK)
            tl.store(at, tl.load(at) + tl.load(at))

        with pytest.raises(Exception, match="bfloat16"):
            careless[(1,)](torch.zeros(16, dtype=torch.bfloat16), 16)

    def test_rounding_to_bfloat16(self):
        import triton
        import triton.language as tl

        @triton.jit
        def copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
            i = tl.arange(0, BLOCK)
            tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))

        x = torch.cat([randn(1000), torch.tensor([float("inf"), float("nan"), -0.0, 1e-40, 3.4e38, 1 + 2.0**-8])])
        x = torch.cat([x, torch.zeros(1024 - len(x))])
        y = torch.empty(1024, dtype=torch.bfloat16)
        copy[(1,)](x, y, 1024)
        assert torch.equal(y.float().nan_to_num(7), x.bfloat16().float().nan_to_num(7))

    def test_repair_is_done_once(self):
        interpreter.repair()
