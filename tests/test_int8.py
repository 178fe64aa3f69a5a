"""int8 linear: bits, rows of every kind, gradients, the layer's life."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn
from fastnn import testing
from fastnn.nn import Int8Linear
from fastnn.ops import quantize_rows
from fastnn.ops.linear_int8 import linear_int8_reference, quantize_rows_reference
from fastnn.testing import assert_within_budget, policy, same_bits

TARGETS = [target for target in testing.targets() if target.isa]
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_layer(n=50, k=33, bias=True, **options):
    weight = torch.nn.Parameter(randn(n, k))
    return Int8Linear.from_float(weight, torch.nn.Parameter(randn(n, seed=1)) if bias else None, **options)


# ---- bits

SIZES = ((1, 4, 1), (1, 130, 1), (5, 33, 50), (16, 768, 193), (17, 35, 49), (130, 300, 65), (6, 17000, 18), (3, 0, 20))


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_plain_pytorch(target, dtype):
    """Codes, sums and results: so they are the same on every instruction set."""
    for m, k, n in SIZES:
        x, (codes, scale), bias = randn(m, k, dtype=dtype), quantize_rows_reference(randn(n, k)), randn(n)
        for activation in (None, "relu"):
            for b in (None, bias, bias.to(dtype)):
                with target.forced():
                    found = fastnn.linear_int8(x, codes, scale, b, activation=activation)
                assert same_bits(found, linear_int8_reference(x, codes, scale, b, activation)), (m, k, n, activation)
        with target.forced():
            ours = quantize_rows(x)
        assert all(same_bits(a, b) for a, b in zip(ours, quantize_rows_reference(x), strict=True))


@every_target
def test_any_number_of_threads(target):
    """Splits of rows and outputs, and rows alone, have the bits of one thread."""
    threads = torch.get_num_threads()
    for m, k, n in ((1, 768, 400), (70, 300, 130), (300, 64, 50)):
        x, parts, bias = randn(m, k), quantize_rows_reference(randn(n, k, seed=1)), randn(n)
        try:
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                with target.forced():
                    found.append(fastnn.linear_int8(x, *parts, bias))
        finally:
            torch.set_num_threads(threads)
        assert all(same_bits(found[0], other) for other in found[1:]), (m, k, n)
        with target.forced():
            assert same_bits(found[0][-1:], fastnn.linear_int8(x[-1:], *parts, bias))


@every_target
def test_sums_are_exact_at_their_longest(target):
    """131072 products of 127 x 127 are just below 2^31; a sum that saturates anywhere is far off."""
    signs = torch.tensor([[1.0], [-1.0]])
    x = signs * 127.0 * torch.ones(2, 131072)
    codes = (x / 127).to(torch.int8) * 127
    with target.forced():
        found = fastnn.linear_int8(x, codes, torch.ones(2))
    assert torch.equal(found, 127.0 * 127.0 * 131072 * signs * signs.T)


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_kind(target, dtype):
    inf, nan = float("inf"), float("nan")
    x = randn(7, 21, dtype=dtype)
    x[1] = 0
    x[2, 20], x[3, 0], x[4, 7] = nan, inf, -inf
    x[5, 20] = 6e4  # all others round to nothing
    with target.forced():
        codes, scale = quantize_rows(x)
        result = fastnn.linear_int8(x, *quantize_rows_reference(0.1 * randn(18, 21)), randn(18))
    assert scale.isnan().tolist() == [False, False, True, True, True, False, False]
    assert not codes[1:5].any() and (scale[1], codes.abs().amax(1)[[0, 5, 6]].tolist()) == (2.0**-126, [127] * 3)
    assert codes[5].tolist() == [0] * 20 + [127]
    assert torch.equal(result[1], randn(18).to(dtype)), "a row of zeros gives the bias"
    assert result[2:5].isnan().all() and result[[0, 1, 5, 6]].isfinite().all()


def test_values_next_to_zero_and_next_to_infinity():
    for size in (1e-45, 1e-38, 1e-30, 3e38):
        x = torch.tensor([[size, -size, 0.0]])
        codes, scale = quantize_rows(x)
        assert scale.isfinite().all() and ((codes.double() * scale.double() - x.double()).abs() <= 0.501 * scale).all()
        assert size < 1e-35 or codes.tolist() == [[127, -127, 0]]


def test_error_is_that_of_rounding():
    """At most half a step of each operand: no accuracy is lost beyond the codes."""
    x, w = randn(40, 500), randn(60, 500)
    truth = x.double() @ w.double().T
    found = fastnn.linear_int8(x, *quantize_rows(w)).double()
    step_x, step_w = (t.abs().amax(1).double() / 127 for t in (x, w))
    bound = 0.5 * (step_x[:, None] * w.abs().sum(1).double() + x.abs().sum(1).double()[:, None] * step_w)
    bound += 500 * 0.25 * step_x[:, None] * step_w
    assert ((found - truth).abs() <= bound).all()
    assert (found - truth).norm() / truth.norm() < 0.02


# ---- gradients


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradient_is_that_of_the_rounded_weight(activation, extension):
    codes, scale = quantize_rows(randn(20, 33))
    x, bias, grad = randn(7, 33), randn(20), randn(7, 20, seed=3)
    weight = codes.double() * scale.double()[:, None]

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    ours = gradients(lambda x, b: fastnn.linear_int8(x, codes, scale, b, activation=activation), torch.float32)
    args = codes, scale
    rival = gradients(lambda x, b: linear_int8_reference(x, *args, b, activation), torch.float32)
    truth = gradients(lambda x, b: linear_int8_reference(x, *args, b, activation), torch.float64)
    for three in zip(ours, truth, rival, strict=True):
        assert_within_budget(*three, torch.float32, policy.GRADIENT_FACTOR)
    if activation is None:
        assert torch.allclose(truth[0], grad.double() @ weight)


def test_second_derivative_and_functorch():
    codes, scale = quantize_rows(randn(20, 33))
    x = randn(7, 33).requires_grad_()
    (dx,) = torch.autograd.grad(fastnn.linear_int8(x, codes, scale).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert dx.isfinite().all() and ddx.isfinite().all() and ddx.any()
    single = torch.func.vmap(lambda row: fastnn.linear_int8(row, codes, scale))(x.detach())
    assert same_bits(single, linear_int8_reference(x.detach(), codes, scale, None, None))


def test_the_rest_of_a_model_trains(extension):
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)).train()
    fastnn.quantize_(model, fastnn.Int8Dynamic(), include="2")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, wanted = randn(64, 16), randn(64, 8, seed=2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---- the layer


def test_autocast_runs_in_its_type(extension):
    layer, x = make_layer(), randn(5, 33)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x)
    expected = linear_int8_reference(x.bfloat16(), layer.weight, layer.weight_scale, layer.bias, None)
    assert same_bits(found, expected.detach())


def recorded(layer, x):
    with fastnn.record() as runs, torch.no_grad():
        layer(x)
    return [run.kernel for run in runs]


def test_packs_once_and_follows_its_buffers(extension):
    layer, x = make_layer(), randn(5, 33)
    assert recorded(layer, x) == ["linear_int8_pack", "linear_int8_fwd"]
    assert recorded(layer, x) == ["linear_int8_fwd"]
    assert layer.packed.nbytes >= layer.weight.nbytes
    for change in (
        lambda: layer.weight.neg_(),
        lambda: layer.weight_scale.mul_(2),
        lambda: layer.load_state_dict(make_layer().state_dict()),
        lambda: setattr(layer, "weight", layer.weight.clone().roll(1, 0)),
    ):
        change()
        expected = linear_int8_reference(x, layer.weight, layer.weight_scale, layer.bias.detach(), None)
        assert same_bits(layer(x).detach(), expected)


def test_copies_have_no_packed_copy(extension):
    layer, x = make_layer(activation="gelu"), randn(5, 33)
    expected = layer(x).detach()
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.packed.nbytes == 0
        assert same_bits(other(x).detach(), expected)


def test_scale_stays_float32(extension):
    for change in (Int8Linear.half, Int8Linear.bfloat16, lambda m: m.to(torch.float64).to(torch.float16)):
        layer = make_layer()
        scale = layer.weight_scale.clone()
        change(layer)
        assert same_bits(layer.weight_scale, scale) and layer.weight.dtype == torch.int8
        assert layer(randn(2, 33, dtype=layer.bias.dtype)).isfinite().all()


def test_floating_weights_are_not_loaded_into_codes():
    layer = make_layer()
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match="weight must be int8 codes, got torch"):
        layer.load_state_dict({**layer.state_dict(), "weight": randn(50, 33)})
    assert torch.equal(layer.weight, before)


def test_constructor_and_from_float():
    assert repr(Int8Linear(3, 4, activation="relu")) == (
        "Int8Linear(in_features=3, out_features=4, bias=True, activation='relu')"
    )
    new = Int8Linear(33, 50)
    new.load_state_dict(make_layer().state_dict())
    assert same_bits(new(randn(5, 33)).detach(), make_layer()(randn(5, 33)).detach())
    with pytest.raises(ValueError, match="activation"):
        Int8Linear(3, 4, activation="swish")
    with pytest.raises(ValueError, match="131072"):
        Int8Linear(131073, 1)
    with pytest.raises(ValueError, match="NaN"):
        Int8Linear.from_float(torch.full((2, 3), float("nan")))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile_keeps_one_graph(backend, extension):
    layer, x = make_layer(activation="relu"), randn(5, 33)
    with torch.no_grad():
        found: Tensor = torch.compile(layer, fullgraph=True, backend=backend)(x)
        assert same_bits(found, layer(x))


def test_without_a_kernel_the_reference_runs():
    layer, x = make_layer(), randn(5, 33)
    expected = layer(x).detach()
    with fastnn.use_backend("reference"), fastnn.record() as runs:
        assert same_bits(layer(x).detach(), expected)
    assert [run.backend for run in runs] == ["reference"]
    with fastnn.use_backend("triton"), pytest.raises(NotImplementedError, match="linear_int8"):
        layer(x)
