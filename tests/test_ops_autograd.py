"""What autograd may ask of an op: second derivatives, some gradients only, in-place changes, hooks, checkpoints."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastnn import linear, log_softmax, softmax, testing
from fastnn.ops.linear import ACTIVATIONS
from fastnn.testing import assert_within_budget, best, cases, find_case, policy, same_bits

NAMES = [(op, case.name) for op in testing.op_names() for case in cases(op) if case.differentiable]
EVERYDAY = [
    (op, name)
    for op, name in NAMES
    if find_case(op, name).layout in ("contiguous", "strided", "transposed", "one_row") and not find_case(op, name).wide
]


def leaves_of(case, dtype=torch.float32, wanted=None):
    wanted = case.differentiable if wanted is None else wanted
    return {name: t.detach().requires_grad_(name in wanted) for name, t in case.inputs(dtype).items()}


def converted(leaves, dtype):
    """The same leaves in another floating type; class indices and masks stay what they are."""
    return {
        name: (t.detach().to(dtype) if t.is_floating_point() else t).requires_grad_(t.requires_grad)
        for name, t in leaves.items()
    }


def grad_for(output):
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return values.to(output.dtype).requires_grad_()


def double_backward(case, call, dtype):
    """Gradients of a scalar made of the first gradients, with respect to the inputs and to grad_output."""
    leaves = converted(leaves_of(case), dtype)
    output = call(leaves)
    grad = grad_for(output)
    wanted = [leaves[name] for name in case.differentiable]
    first = torch.autograd.grad(output, wanted, grad, create_graph=True)
    weights = [torch.randn(g.shape, generator=torch.Generator().manual_seed(7)).to(dtype) for g in first]
    total = sum((g * w).sum() for g, w in zip(first, weights, strict=True))
    return [*first, *torch.autograd.grad(total, [*wanted, grad], materialize_grads=True)]


@pytest.mark.parametrize(("op", "name"), EVERYDAY)
def test_double_backward(op, name):
    case = find_case(op, name)
    with best().forced():
        ours = double_backward(case, case.call, torch.float32)
    rival = double_backward(case, case.reference, torch.float32)
    truth = double_backward(case, case.reference, torch.float64)
    for index, found in enumerate(zip(ours, truth, rival, strict=True)):
        where = f"{op}/{name}, derivative {index} under create_graph"
        assert_within_budget(*found, torch.float32, policy.GRADIENT_FACTOR, where=where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("softmax", "rows"),
        ("softmax", "log_rows"),
        ("linear", "gelu_bias"),
        ("cross_entropy", "everything_mean"),
        ("linear_cross_entropy", "everything_mean"),
        ("linear_cross_entropy", "everything_none"),
        ("attention", "everything"),
        ("norm", "add_layer_rows"),
        ("norm", "rms_rows"),
        ("activation", "silu_float32_bias_rows"),
        ("activation", "gelu_pair_rows"),
        ("activation", "silu_packed_rows"),
        ("masked_softmax", "rows_bool"),
        ("mlp", "plain_gelu"),
        ("mlp", "gated_silu"),
        ("rope", "halves_rows"),
        ("dropout_add", "rows_0.3"),
        ("rope", "neighbours_float32_tables"),
    ],
)
def test_double_backward_keeps_the_dtype(op, name, dtype):
    case = find_case(op, name)
    with best().forced():
        found = double_backward(case, case.call, dtype)
    assert {g.dtype for g in found} == {dtype}


def test_double_backward_to_float32_from_half():
    x = torch.randn(4, 9).half().requires_grad_()
    y = softmax(x, -1, torch.float32)
    (dx,) = torch.autograd.grad(y, x, grad_for(y), create_graph=True)
    assert dx.dtype == torch.float16
    (ddx,) = torch.autograd.grad(dx.float().square().sum(), x)
    assert ddx.dtype == torch.float16 and ddx.abs().max() > 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_double_backward_with_a_frozen_weight(activation):
    x, w, b = torch.randn(5, 7, requires_grad=True), torch.randn(6, 7), torch.randn(6, requires_grad=True)

    def second(call, dtype):
        leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (x, w, b)]
        output = call(*leaves)
        grad = grad_for(output)
        first = torch.autograd.grad(output, [leaves[0], leaves[2]], grad, create_graph=True)
        total = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(total, [leaves[0], leaves[2], grad], materialize_grads=True)]

    def reference(x, w, b):
        return ACTIVATIONS[activation](torch.nn.functional.linear(x, w, b))

    ours = second(lambda x, w, b: linear(x, w, b, activation=activation), torch.float32)
    for found in zip(ours, second(reference, torch.float64), second(reference, torch.float32), strict=True):
        assert_within_budget(*found, torch.float32, policy.GRADIENT_FACTOR)


class Seen(TorchDispatchMode):
    """Notes what each raw backward operator returned."""

    def __init__(self):
        super().__init__()
        self.returned = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.returned[str(function)] = result
        return result


def subsets(case):
    for count in range(1, len(case.differentiable) + 1):
        yield from itertools.combinations(case.differentiable, count)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_only_the_wanted_gradients_are_computed(activation, extension):
    case = find_case("linear", f"{activation}_bias")
    for wanted in subsets(case):
        leaves = leaves_of(case, wanted=wanted)
        output = case.call(leaves)
        with Seen() as seen:
            found = torch.autograd.grad(output, [leaves[name] for name in wanted], torch.ones_like(output))
        returned = seen.returned["fastnn.linear_bwd.default"]
        assert [g is not None for g in returned] == [name in wanted for name in ("input", "weight", "bias")]
        full = leaves_of(case)
        everything = torch.autograd.grad(case.call(full), list(full.values()), torch.ones_like(output))
        for name, ours in zip(wanted, found, strict=True):
            assert same_bits(ours, everything[list(full).index(name)]), f"{name} depends on which others are wanted"


@pytest.mark.parametrize(("op", "name"), EVERYDAY)
def test_some_gradients_only(op, name):
    case = find_case(op, name)
    for wanted in subsets(case):
        results = []
        for call, dtype in ((case.call, None), (case.reference, torch.float64), (case.reference, None)):
            leaves = leaves_of(case, wanted=wanted)
            if dtype is not None:
                leaves = converted(leaves, dtype)
            output = call(leaves)
            grad = grad_for(output).detach()
            results.append(torch.autograd.grad(output, [leaves[key] for key in wanted], grad))
            assert all(leaves[key].grad is None for key in leaves)
        for found in zip(*results, strict=True):
            assert_within_budget(*found, torch.float32, policy.GRADIENT_FACTOR, where=f"{op}/{name} {wanted}")


@pytest.mark.parametrize(("op", "name"), EVERYDAY)
def test_no_gradient_wanted_builds_no_graph(op, name):
    case = find_case(op, name)
    output = case.call(leaves_of(case, wanted=()))
    assert not output.requires_grad and output.grad_fn is None
    with torch.no_grad():
        assert not case.call(leaves_of(case)).requires_grad
    with torch.inference_mode():
        assert same_bits(case.call(leaves_of(case, wanted=())).clone(), output)


@pytest.mark.parametrize(("op", "name"), EVERYDAY)
def test_retain_graph(op, name):
    case = find_case(op, name)
    leaves = leaves_of(case)
    output = case.call(leaves)
    grad = grad_for(output).detach()
    wanted = [leaves[key] for key in case.differentiable]
    first = torch.autograd.grad(output, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(output, wanted, grad)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, wanted, grad)


@pytest.mark.parametrize(("op", "name"), EVERYDAY)
def test_gradients_accumulate(op, name):
    case = find_case(op, name)
    leaves = {key: t.clone().detach().requires_grad_(t.requires_grad) for key, t in leaves_of(case).items()}
    for _ in range(2):
        case.call(leaves).sum().backward()  # an expanded grad_output
    once = {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in leaves.items()}
    case.call(once).sum().backward()
    for key in case.differentiable:
        assert same_bits(leaves[key].grad, once[key].grad * 2)


class TestInPlaceChanges:
    """Between forward and backward, of what backward reads: RuntimeError, as torch."""

    message = "modified by an inplace operation"

    @pytest.mark.parametrize("function", [softmax, log_softmax])
    def test_softmax_output(self, function):
        y = function(torch.randn(3, 5, requires_grad=True), -1)
        y.mul_(2)
        with pytest.raises(RuntimeError, match=self.message):
            y.sum().backward()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("changed", ["input", "weight"])
    def test_linear_operand(self, activation, changed):
        leaves = leaves_of(find_case("linear", "relu_bias"))
        y = linear(leaves["input"], leaves["weight"], leaves["bias"], activation=activation)
        with torch.no_grad():
            leaves[changed].mul_(2)
        with pytest.raises(RuntimeError, match=self.message):
            y.sum().backward()

    @pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
    def test_linear_output(self, activation):
        leaves = leaves_of(find_case("linear", "relu_bias"))
        y = linear(leaves["input"], leaves["weight"], leaves["bias"], activation=activation)
        y.mul_(2)
        with pytest.raises(RuntimeError, match=self.message):
            y.sum().backward()

    def test_input_may_change_where_no_gradient_reads_it(self):
        """As torch: with a frozen weight the input is not saved."""
        x, w = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
        y = linear(x, w)
        with torch.no_grad():
            x.mul_(2)
        y.sum().backward()
        assert_within_budget(x.grad, w.double().sum(0).expand(4, 5), w.sum(0).expand(4, 5), torch.float32, 3.0)


def gradients(case, call):
    leaves = leaves_of(case)
    output = call(leaves)
    return [output, *torch.autograd.grad(output, [leaves[key] for key in case.differentiable], grad_for(output))]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("op", "name"), EVERYDAY[::3])
def test_checkpointing(op, name, reentrant):
    case = find_case(op, name)

    def recomputed(leaves):
        keys = list(leaves)
        return checkpoint(
            lambda *values: case.call(dict(zip(keys, values, strict=True))), *leaves.values(), use_reentrant=reentrant
        )

    if reentrant:  # takes backward() only
        leaves = leaves_of(
            case
        )  # not copies: those would be dense, and sums of other layouts differ in their last bits
        output = recomputed(leaves)
        output.backward(grad_for(output).detach())
        found = [output, *(leaves[key].grad for key in case.differentiable)]
    else:
        found = gradients(case, recomputed)
    assert all(same_bits(a, b) for a, b in zip(found, gradients(case, case.call), strict=True))


@pytest.mark.parametrize(("op", "name"), EVERYDAY[::3])
def test_saved_tensor_hooks(op, name):
    case = find_case(op, name)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone().numpy(force=True), tensor.dtype

    def unpack(pair):
        return torch.from_numpy(pair[0]).to(pair[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = gradients(case, case.call)
    assert packed
    assert all(same_bits(a, b) for a, b in zip(found, gradients(case, case.call), strict=True))
    with torch.autograd.graph.save_on_cpu():
        found = gradients(case, case.call)
    assert all(same_bits(a, b) for a, b in zip(found, gradients(case, case.call), strict=True))


def test_tensor_hooks_and_retain_grad():
    x = torch.randn(3, 5, requires_grad=True)
    hidden = softmax(x, -1)
    hidden.retain_grad()
    hidden.register_hook(lambda grad: grad * 2)
    linear(hidden, torch.ones(2, 5)).sum().backward()
    assert torch.equal(hidden.grad, torch.full((3, 5), 4.0))


def test_anomaly_mode_names_the_function():
    x = torch.randn(3, 5, requires_grad=True)
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning),
        pytest.raises(RuntimeError, match="Softmax"),
    ):
        softmax(x, -1).backward(torch.full((3, 5), float("nan")))
