"""Codes in groups: rounding, bits over instruction sets, threads and rows, gradients, the layers' life."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastnn
from fastnn import testing
from fastnn.nn import Int4Linear, Int8WeightOnlyLinear
from fastnn.ops import dequantize_groups, quantize_groups
from fastnn.ops.groups import pack_nibbles, unpack_nibbles
from fastnn.ops.linear_groupwise import linear_groupwise_reference
from fastnn.testing import assert_within_budget, policy, same_bits

TARGETS = [target for target in testing.targets() if target.isa]
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("int4", "offset", "int8")
FORMS = ({"bits": 4}, {"bits": 4, "symmetric": False}, {"bits": 8})
SIZES = ((1, 4, 1, 2), (1, 130, 33, 64), (5, 33, 50, 7), (16, 576, 65, 64), (17, 1100, 19, 1000), (3, 0, 20, 4))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(x, parts, bias, group, **options):
    return fastnn.linear_groupwise(x, *parts, bias, group_size=group, **options)


# ---- rounding


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_rounds_to_the_nearest_code(form):
    weight = randn(6, 45)
    codes, scale, offset = quantize_groups(weight, 16, **form)
    assert scale.shape == (6, 3) and scale.dtype == torch.float16 and (offset is None) == form.get("symmetric", True)
    found = dequantize_groups(codes, scale, offset, 45, 16, torch.float32)
    steps = scale.float().abs().repeat_interleave(16, 1)[:, :45]
    # Half a step; the largest of the other sign is clipped by up to one, and float16 moves the ends a little.
    bound = (1.0 if form == {"bits": 4} else 0.5) * steps + 1e-2 * steps
    assert ((found - weight).abs() <= bound).all()
    again = quantize_groups(found, 16, **form)
    assert same_bits(dequantize_groups(*again, 45, 16, torch.float32), found), "what codes stand for rounds to itself"


def test_formulas_of_the_codes():
    weight = torch.tensor([[8.0, -1.0, 0.0, 7.0, 0.25]])
    codes, scale, _ = quantize_groups(weight, 4)
    assert scale.tolist() == [[-1.0, -0.03125]] and unpack_nibbles(codes, 5).tolist() == [[0, 9, 8, 1, 0]]
    codes, scale, offset = quantize_groups(weight, 4, symmetric=False)
    assert offset.tolist() == [[-1.0, 0.25]] and scale.tolist()[0] == [torch.tensor(0.6).half().item(), 0.0]
    assert unpack_nibbles(codes, 5).tolist() == [[15, 0, 2, 13, 0]]
    codes, scale, _ = quantize_groups(torch.tensor([[127.0, -127.0, 0.4, 0.6]]), 4, bits=8)
    assert codes.tolist() == [[127, -127, 0, 1]] and scale.tolist() == [[1.0]]
    zeros = quantize_groups(torch.zeros(2, 5), 4)
    assert not dequantize_groups(*zeros, 5, 4, torch.float32).any()
    row = torch.tensor([[1, 2, 15]], dtype=torch.uint8)
    assert pack_nibbles(row).tolist() == [[0x21, 0x0F]] and torch.equal(unpack_nibbles(pack_nibbles(row), 3), row)


def test_what_cannot_be_rounded_is_refused():
    for weight, words in (
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinite"),
        (torch.tensor([[1e6, 1.0]]), "float16"),
        (torch.ones(3), "2 dimensions"),
    ):
        with pytest.raises(ValueError, match=words):
            quantize_groups(weight, 2)
    for options in ({"group_size": 0}, {"group_size": 2, "bits": 3}, {"group_size": 2, "bits": 8, "symmetric": False}):
        with pytest.raises(ValueError, match="group_size be at least 1"):
            quantize_groups(torch.ones(2, 2), **options)


# ---- bits


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_inputs_give_the_bits_of_plain_pytorch(target, dtype):
    """So they are the same on every instruction set."""
    for m, k, n, group in SIZES:
        x, bias = randn(m, k, dtype=dtype), randn(n)
        for form in FORMS[:2]:
            parts = quantize_groups(randn(n, k, seed=1), group, **form)
            for activation, b in ((None, None), ("relu", bias)):
                with target.forced():
                    found = run(x, parts, b, group, int8_input=True, activation=activation)
                expected = linear_groupwise_reference(x, *parts, b, group, True, activation)
                assert same_bits(found, expected), (m, k, n, group, form, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_instruction_set(dtype):
    for m, k, n, group in SIZES:
        x, bias = randn(m, k, dtype=dtype), randn(n)
        for form in FORMS:
            parts = quantize_groups(randn(n, k, seed=1), group, **form)
            found = []
            for target in TARGETS:
                with target.forced():
                    found.append(run(x, parts, bias, group, activation="relu"))
            assert all(same_bits(found[0], other) for other in found[1:]), (m, k, n, group, form)


@every_target
@pytest.mark.parametrize("int8_input", [False, True], ids=["float", "int8"])
def test_a_row_does_not_depend_on_its_company(target, int8_input):
    """Nor on the number of threads: sums are exact inside a block and added in order."""
    x, parts = randn(70, 300), quantize_groups(randn(130, 300, seed=1), 64)
    threads = torch.get_num_threads()
    with target.forced():
        alone = torch.cat([run(row[None], parts, None, 64, int8_input=int8_input) for row in x])
        assert same_bits(run(x, parts, None, 64, int8_input=int8_input), alone)
        for rows in (2, 3, 4, 5, 6, 7, 8, 9):
            assert same_bits(run(x[:rows], parts, None, 64, int8_input=int8_input), alone[:rows]), rows
        try:
            torch.set_num_threads(2)
            for rows in (1, 40, 70):
                assert same_bits(run(x[:rows], parts, None, 64, int8_input=int8_input), alone[:rows])
        finally:
            torch.set_num_threads(threads)


@every_target
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_sums_are_exact_at_their_longest(target, form):
    """The largest codes and numbers in the longest block: sums that saturate or lose bits anywhere are far off."""
    x = torch.tensor([[8388000.0], [-8355710.0]]) * torch.ones(2, 256)
    weight = torch.ones(3, 256)
    weight[1], weight[2, 0] = -1, 0
    parts = quantize_groups(weight, 256, **form)
    truth = x.double() @ dequantize_groups(*parts, 256, 256, torch.float64).T
    with target.forced():
        found = run(x, parts, None, 256)
        assert ((found.double() - truth).abs() <= 2e-7 * truth.abs().max()).all()
        if form["bits"] == 4:
            assert same_bits(
                run(x, parts, None, 256, int8_input=True),
                linear_groupwise_reference(x, *parts, None, 256, True, None),
            )


@every_target
@pytest.mark.parametrize("int8_input", [False, True], ids=["float", "int8"])
def test_rows_of_every_kind(target, int8_input):
    inf, nan = float("inf"), float("nan")
    x = randn(7, 41)
    x[1] = 0
    x[2, 40], x[3, 0], x[4, 7] = nan, inf, -inf
    x[5, 40] = 6e4
    bias = randn(18)
    for form in FORMS[:2] if int8_input else FORMS:
        parts = quantize_groups(0.1 * randn(18, 41), 16, **form)
        with target.forced():
            found = run(x, parts, bias, 16, int8_input=int8_input)
        assert same_bits(found[1], bias), "a row of zeros gives the bias"
        assert found[2:5].isnan().all() and found[[0, 1, 5, 6]].isfinite().all()


def test_small_inputs_are_exact_down_to_the_least_step():
    parts = quantize_groups(torch.eye(4), 4)
    for size in (2.0**-99, 2.0**-77, 1.0, 2.0**100):
        x = size * torch.tensor([[1.0, -1.0, 0.0, 1.0]])
        assert torch.equal(run(x, parts, None, 4), x)
    assert not run(torch.full((1, 4), 2.0**-102), parts, None, 4).any()


# ---- gradients


@pytest.mark.parametrize("int8_input", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradient_is_that_of_the_rounded_weight(activation, int8_input, extension):
    parts = quantize_groups(randn(20, 33), 8, symmetric=False)
    x, bias, grad = randn(7, 33), randn(20), randn(7, 20, seed=3)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    def plain(x, b):
        return linear_groupwise_reference(x, *parts, b, 8, int8_input, activation)

    options = {"int8_input": int8_input, "activation": activation}
    ours = gradients(lambda x, b: run(x, parts, b, 8, **options), torch.float32)
    rival, truth = gradients(plain, torch.float32), gradients(plain, torch.float64)
    for three in zip(ours, truth, rival, strict=True):
        assert_within_budget(*three, torch.float32, policy.GRADIENT_FACTOR)


def test_second_derivative_and_functorch():
    parts, x = quantize_groups(randn(20, 33), 8), randn(7, 33).requires_grad_()
    (dx,) = torch.autograd.grad(run(x, parts, None, 8).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert dx.isfinite().all() and ddx.isfinite().all() and ddx.any()
    single = torch.func.vmap(lambda row: run(row, parts, None, 8))(x.detach())
    assert torch.allclose(single, run(x.detach(), parts, None, 8), atol=1e-5)


# ---- the layers


def make_layer(kind=Int4Linear, **options):
    options.setdefault("group_size", 8)
    return kind.from_float(torch.nn.Parameter(randn(50, 33)), torch.nn.Parameter(randn(50, seed=1)), **options)


def recorded(layer, x):
    with fastnn.record() as runs, torch.no_grad():
        layer(x)
    return [run.kernel for run in runs]


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"int8_input": True}], ids=["int4", "offset", "int8_input"]
)
def test_packs_once_and_follows_its_buffers(options, extension):
    layer, x = make_layer(**options), randn(5, 33)
    assert recorded(layer, x) == ["linear_groupwise_pack", "linear_groupwise_fwd"]
    assert recorded(layer, x) == ["linear_groupwise_fwd"]
    changes = [
        lambda: layer.weight.bitwise_xor_(5),
        lambda: layer.weight_scale.mul_(2),
        lambda: layer.load_state_dict(make_layer(**options).state_dict()),
        lambda: setattr(layer, "weight", layer.weight.clone().roll(1, 0)),
    ]
    if "symmetric" in options:
        changes.append(lambda: layer.weight_offset.mul_(2))
    for change in changes:
        change()
        expected = x.double() @ layer.dequantized(torch.float64).T + layer.bias.detach().double()
        near = 0.05 if layer.int8_input else 1e-5
        assert ((layer(x).detach().double() - expected).abs() <= near * expected.abs().max()).all()


def test_copies_have_no_packed_copy(extension):
    for layer in (make_layer(activation="gelu", symmetric=False), make_layer(Int8WeightOnlyLinear)):
        x = randn(5, 33)
        expected = layer(x).detach()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.packed.nbytes == 0
            assert same_bits(other(x).detach(), expected)


def test_scales_stay_float16(extension):
    for change in (Int4Linear.float, Int4Linear.bfloat16, lambda m: m.to(torch.float64)):
        layer = make_layer(symmetric=False)
        before = layer.weight_scale.clone(), layer.weight_offset.clone()
        change(layer)
        assert same_bits(layer.weight_scale, before[0]) and same_bits(layer.weight_offset, before[1])
        assert layer(randn(2, 33, dtype=layer.bias.dtype)).isfinite().all()


def test_floating_weights_are_not_loaded_into_codes():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="weight must be uint8 codes, got torch"):
        layer.load_state_dict({**layer.state_dict(), "weight": randn(50, 17)})


def test_constructors():
    assert repr(Int4Linear(3, 4, activation="relu")) == (
        "Int4Linear(in_features=3, out_features=4, bias=True, group_size=64, symmetric=True, int8_input=False, "
        "activation='relu')"
    )
    new = Int4Linear(33, 50, group_size=8)
    new.load_state_dict(make_layer().state_dict())
    assert same_bits(new(randn(5, 33)).detach(), make_layer()(randn(5, 33)).detach())
    assert torch.equal(Int8WeightOnlyLinear(3, 4)(randn(2, 3)), torch.zeros(2, 4)), "a new layer's weight is zero"
    assert torch.equal(Int4Linear(3, 4)(randn(2, 3)), torch.zeros(2, 4))
    for kind in (Int4Linear, Int8WeightOnlyLinear):
        with pytest.raises(ValueError, match="activation"):
            kind(3, 4, activation="swish")
        with pytest.raises(ValueError, match="group_size"):
            kind(3, 4, group_size=0)


def test_compile_keeps_one_graph(extension):
    layer, x = make_layer(activation="relu"), randn(5, 33)
    with torch.no_grad():
        assert same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_autocast_runs_in_its_type(extension):
    layer, x = make_layer(), randn(5, 33)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x)
    with torch.no_grad():
        assert found.dtype == torch.bfloat16 and same_bits(found, layer(x.bfloat16()))


def test_without_a_kernel_the_reference_runs():
    layer, x = make_layer(int8_input=True), randn(5, 33)
    expected = layer(x).detach()
    with fastnn.use_backend("reference"), fastnn.record() as runs:
        assert same_bits(layer(x).detach(), expected)
    assert [run.backend for run in runs] == ["reference"]
    with fastnn.use_backend("triton"), pytest.raises(NotImplementedError, match="linear_groupwise"):
        layer(x)
