"""Block-sparse linear on int8 codes: the form, bits, rows of every kind, gradients, the layer's life."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastnn
from fastnn import sparse, testing
from fastnn.nn import BlockSparseLinear, Int8BlockSparseLinear
from fastnn.ops.block_sparse_int8 import block_sparse_linear_int8_reference
from fastnn.ops.linear_int8 import linear_int8_reference, quantize_rows_reference
from fastnn.testing import assert_within_budget, policy, same_bits

TARGETS = [target for target in testing.targets() if target.isa]
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pattern(n, k, depth, density=0.4, seed=0):
    return torch.rand(sparse.block_grid(n, k, depth), generator=torch.Generator().manual_seed(seed)) < density


def parts_of(n=50, k=70, depth=4, density=0.4):
    return sparse.to_int8_blocks(randn(n, k, seed=1), pattern(n, k, depth, density), depth=depth)


def make_layer(n=50, k=70, depth=4, **options):
    bias = torch.nn.Parameter(randn(n, seed=2))
    return Int8BlockSparseLinear.from_dense(randn(n, k, seed=1), bias, pattern(n, k, depth), depth=depth, **options)


# ---- the form


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_form_is_that_of_the_rounded_weight(depth):
    weight, mask = randn(50, 37), pattern(50, 37, depth)
    parts = sparse.to_int8_blocks(weight.t().contiguous().t(), mask, depth=depth)
    values, columns, starts = sparse.to_blocks(weight, mask, depth=depth)
    codes, scale = quantize_rows_reference(sparse.to_dense(values, columns, starts, 50, 37))
    assert parts.codes.shape == (int(mask.sum()), depth // 4, 16, 4) and same_bits(parts.scale, scale)
    assert torch.equal(parts.columns, columns) and torch.equal(parts.starts, starts)
    dense = sparse.to_dense(*parts[:3], 50, 37, scale=parts.scale)
    assert same_bits(dense, codes.float() * scale[:, None])


def test_where_a_code_lies():
    weight = torch.zeros(20, 24).index_put((torch.tensor([17]), torch.tensor([14])), torch.tensor(-3.0))
    parts = sparse.to_int8_blocks(weight, depth=8)
    assert parts.columns.tolist() == [1] and parts.starts.tolist() == [0, 0, 1]
    assert parts.codes.nonzero().tolist() == [[0, 1, 1, 2]] and parts.codes[0, 1, 1, 2] == -127


def test_what_has_no_codes_is_refused():
    with pytest.raises(ValueError, match="depth must be one of 4, 8, 16, whole units of 4 codes; got 2"):
        sparse.to_int8_blocks(torch.ones(3, 3), depth=2)
    with pytest.raises(ValueError, match="to_int8_blocks: weight has NaN or infinite"):
        sparse.to_int8_blocks(torch.full((3, 3), float("inf")))
    parts = parts_of()
    with pytest.raises(ValueError, match=r"to_dense: scale must have shape \(50,\), got \(1,\)"):
        sparse.to_dense(*parts[:3], 50, 70, scale=torch.ones(1))
    with pytest.raises(TypeError, match="to_dense: codes must be int8"):
        sparse.to_dense(*sparse.to_blocks(randn(50, 70)), 50, 70, scale=parts.scale)


# ---- bits

SIZES = (
    (1, 4, 1, 4),
    (1, 1100, 33, 4),
    (2, 70, 50, 8),
    (4, 71, 50, 4),
    (5, 33, 50, 4),
    (16, 768, 193, 4),
    (130, 300, 65, 16),
)


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_plain_pytorch(target, dtype):
    """Codes, sums and results: so they are the same on every instruction set, and those of the dense layer."""
    for m, k, n, depth in SIZES:
        x, parts, bias = randn(m, k, dtype=dtype), parts_of(n, k, depth), randn(n)
        values = sparse.to_dense(*parts[:3], n, k, scale=torch.ones(n))
        for activation in (None, "relu"):
            for b in (None, bias, bias.to(dtype)):
                with target.forced():
                    found = fastnn.block_sparse_linear_int8(x, *parts, b, activation=activation)
                expected = linear_int8_reference(x, values.to(torch.int8), parts.scale, b, activation)
                assert same_bits(found, expected), (m, k, n, depth, activation)


@every_target
def test_any_number_of_threads(target):
    """Of products large enough to be split; a row alone has the same bits."""
    x, parts, bias = randn(70, 300), parts_of(400, 300, 4, 0.6), randn(400)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with target.forced():
                found.append(fastnn.block_sparse_linear_int8(x, *parts, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(found[0], other) for other in found[1:])
    with target.forced():
        assert same_bits(found[0][-1:], fastnn.block_sparse_linear_int8(x[-1:], *parts, bias))


def test_rows_that_come_in_parts(extension):
    """Codes of 512 rows are held at once where a row has many."""
    x, parts = randn(514, 17000), parts_of(18, 17000, 4, 0.01)
    found = fastnn.block_sparse_linear_int8(x, *parts)
    for m in (0, 511, 512, 513):
        assert same_bits(found[m], fastnn.block_sparse_linear_int8(x[m], *parts)), m


@every_target
def test_sums_are_exact_at_their_longest(target):
    """131072 products of 127 x 127 are just below 2^31; a sum that saturates anywhere is far off."""
    signs = torch.tensor([[1.0], [-1.0]])
    x = signs * 127.0 * torch.ones(2, 131072)
    parts = sparse.to_int8_blocks(x, depth=16)
    with target.forced():
        found = fastnn.block_sparse_linear_int8(x, *parts[:3], torch.ones(2))
    assert torch.equal(found, 127.0 * 127.0 * 131072 * signs * signs.T)


@every_target
def test_what_lies_beyond_the_weight_counts_as_zero(target):
    """Codes beyond in_features and out_features are there and may be anything."""
    x, parts = randn(5, 70), parts_of(50, 70, 16, 1.0)
    codes = parts.codes.clone()
    last = parts.columns == 4
    codes[last, 1:, :, 2:] = 99  # columns 70 to 79 are those from the second unit's third on
    codes[last, 2:] = 99
    codes[parts.starts[3] :, :, 2:] = 99
    with target.forced():
        found = fastnn.block_sparse_linear_int8(x, codes, *parts[1:])
    assert same_bits(found, block_sparse_linear_int8_reference(x, *parts, None, None))


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_kind(target, dtype):
    """NaN and infinities make a row NaN wherever they are: the row has one scale."""
    x, parts, bias = randn(7, 70, dtype=dtype), parts_of(density=0.1), randn(50)
    x[1] = 0
    for row, value in ((2, "nan"), (3, "inf"), (4, "-inf")):
        x[row, 69] = float(value)
    x[5, 69] = 6e3  # all others round to nothing
    with target.forced():
        found = fastnn.block_sparse_linear_int8(x, *parts, bias)
    assert torch.equal(found[1], bias.to(dtype)), "a row of zeros gives the bias"
    assert found[2:5].isnan().all() and found[[0, 1, 5, 6]].isfinite().all()


# ---- gradients


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradient_is_that_of_the_rounded_weight(activation, extension):
    parts, x, bias, grad = parts_of(20, 33), randn(7, 33), randn(20), randn(7, 20, seed=3)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    ours = gradients(lambda x, b: fastnn.block_sparse_linear_int8(x, *parts, b, activation=activation), torch.float32)
    rival = gradients(lambda x, b: block_sparse_linear_int8_reference(x, *parts, b, activation), torch.float32)
    truth = gradients(lambda x, b: block_sparse_linear_int8_reference(x, *parts, b, activation), torch.float64)
    for three in zip(ours, truth, rival, strict=True):
        assert_within_budget(*three, torch.float32, policy.GRADIENT_FACTOR)
    if activation is None:
        weight = sparse.to_dense(*parts[:3], 20, 33, scale=parts.scale)
        assert torch.allclose(truth[0], grad.double() @ weight.double())


def test_second_derivative_and_functorch():
    parts, x = parts_of(20, 33), randn(7, 33).requires_grad_()
    (dx,) = torch.autograd.grad(fastnn.block_sparse_linear_int8(x, *parts).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert dx.isfinite().all() and ddx.isfinite().all() and ddx.any()
    single = torch.func.vmap(lambda row: fastnn.block_sparse_linear_int8(row, *parts))(x.detach())
    assert same_bits(single, block_sparse_linear_int8_reference(x.detach(), *parts, None, None))


# ---- the layer


def expected_of(layer, x):
    parts = layer.weight, layer.columns, layer.starts, layer.weight_scale
    return block_sparse_linear_int8_reference(x, *parts, layer.bias, layer.activation).detach()


def recorded(layer, x):
    with fastnn.record() as runs, torch.no_grad():
        layer(x)
    return [run.kernel for run in runs]


def test_packs_once_and_follows_its_buffers(extension):
    layer, x = make_layer(), randn(5, 70)
    fwd, pack = "linear_block_sparse_int8_fwd", "linear_block_sparse_int8_pack"
    assert recorded(layer, x) == [pack, fwd] and recorded(layer, x) == [fwd]
    assert layer.packed.nbytes == 64 * 8, "the codes are read in place"
    other = Int8BlockSparseLinear.from_dense(randn(50, 70, seed=5), mask=pattern(50, 70, 4))
    for change in (
        lambda: layer.weight.neg_(),
        lambda: layer.weight_scale.mul_(2),
        lambda: layer.load_state_dict({**other.state_dict(), "bias": randn(50)}),
        lambda: setattr(layer, "weight", layer.weight.clone().roll(1, 0)),
    ):
        change()
        assert same_bits(layer(x).detach(), expected_of(layer, x))


def test_from_float_and_copies(extension):
    floats = BlockSparseLinear.from_dense(
        randn(50, 70, seed=1), torch.nn.Parameter(randn(50, seed=2)), pattern(50, 70, 4), activation="gelu"
    )
    layer, x = Int8BlockSparseLinear.from_float(floats), randn(5, 70)
    assert layer.bias is floats.bias and layer.blocks == floats.blocks and layer.density == floats.density
    step = layer.weight_scale[:, None]
    assert ((layer.dequantized() - floats.dense()).abs() <= 0.501 * step).all()
    expected = layer(x).detach()
    assert same_bits(expected, make_layer(activation="gelu")(x).detach())
    assert set(layer.state_dict()) == {"weight", "weight_scale", "columns", "starts", "bias"}
    new = Int8BlockSparseLinear(70, 50, blocks=layer.blocks, activation="gelu")
    assert not new.dequantized().any()
    new.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), new):
        assert other.packed.nbytes == 0 and same_bits(other(x).detach(), expected)


def test_types_stay_and_floats_are_not_loaded(extension):
    for change in (Int8BlockSparseLinear.half, lambda m: m.to(torch.float64).to(torch.bfloat16)):
        layer = make_layer()
        scale = layer.weight_scale.clone()
        change(layer)
        assert same_bits(layer.weight_scale, scale) and layer.weight.dtype == torch.int8
        assert layer(randn(2, 70, dtype=layer.bias.dtype)).isfinite().all()
    with pytest.raises(RuntimeError, match="weight must be int8 codes, got torch"):
        layer.load_state_dict({**layer.state_dict(), "weight": layer.weight.float()})


def test_autocast_runs_in_its_type(extension):
    layer, x = make_layer(), randn(5, 70)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert same_bits(layer(x), expected_of(layer, x.bfloat16()))


@pytest.mark.slow
def test_compile_keeps_one_graph(extension):
    layer, x = make_layer(activation="relu"), randn(5, 70)
    with torch.no_grad():
        assert same_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_a_call_that_needs_only_the_kernel_still_checks(extension):
    """Without gradients a layer's call goes straight to the kernel."""
    layer, x = make_layer(), randn(5, 70)
    with torch.no_grad():
        assert layer(x.double()).dtype == torch.float64  # by the reference
        for bad, error in ((x[:, :69], ValueError), (torch.tensor(1.0), ValueError), (x.int(), TypeError)):
            with pytest.raises(error, match=r"in_features|floating|dimension"):
                layer(bad)
        with pytest.raises(TypeError, match="Tensor"):
            layer([1.0] * 70)
        layer.columns[-1] = 18
        with pytest.raises(IndexError, match=r"columns of strip 3 must be in \[0, 18\)"):
            layer(x)


def test_constructor_says_what_does_not_fit():
    layer = Int8BlockSparseLinear(16, 20, blocks=3, depth=8, activation="relu")
    assert "blocks=3 (75.0%), depth=8, activation='relu'" in repr(layer)
    for wrong, match in (
        ({"blocks": 9}, "blocks must be an int from 0 to 8, got 9"),
        ({"blocks": 1, "depth": 2}, "depth must be one of 4, 8, 16, whole units of 4 codes; got 2"),
        ({"blocks": 1, "activation": "swish"}, "activation must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            Int8BlockSparseLinear(16, 20, **wrong)
    with pytest.raises(ValueError, match="131072"):
        Int8BlockSparseLinear(131073, 1, blocks=0)


def test_without_a_kernel_the_reference_runs():
    layer, x = make_layer(), randn(5, 70)
    expected = layer(x).detach()
    with fastnn.use_backend("reference"), fastnn.record() as runs:
        assert same_bits(layer(x).detach(), expected)
    assert [run.backend for run in runs] == ["reference"]
    with fastnn.use_backend("triton"), pytest.raises(NotImplementedError, match="linear_block_sparse_int8"):
        layer(x)
