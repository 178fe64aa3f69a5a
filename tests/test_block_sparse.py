"""Block-sparse weights: their form, what a product reads, bits over threads and rows, gradients, the layer's life."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import fastnn
from fastnn import sparse, testing
from fastnn.nn import BlockSparseLinear
from fastnn.ops.block_sparse import block_sparse_linear_reference
from fastnn.testing import same_bits

TARGETS = [target for target in testing.targets() if target.isa]
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pattern(n, k, depth, density=0.4, seed=0):
    return torch.rand(sparse.block_grid(n, k, depth), generator=torch.Generator().manual_seed(seed)) < density


def blocks(n=50, k=70, depth=4, density=0.4, dtype=torch.float32):
    return sparse.to_blocks(randn(n, k, dtype=dtype, seed=1), pattern(n, k, depth, density), depth=depth)


def run(x, parts, bias=None, n=50, **options):
    return fastnn.block_sparse_linear(x, *parts, bias, out_features=n, **options)


# ---- the form


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_form_there_and_back(depth):
    weight, mask = randn(50, 37), pattern(50, 37, depth)
    parts = sparse.to_blocks(weight.t().contiguous().t(), mask, depth=depth)
    every = mask.repeat_interleave(16, 0).repeat_interleave(depth, 1)[:50, :37]
    assert torch.equal(sparse.to_dense(*parts, 50, 37), weight * every)
    assert parts.values.shape == (int(mask.sum()), depth, 16) and parts.starts[-1] == mask.sum()
    again = sparse.to_blocks(weight * every, depth=depth)  # finds the blocks by itself
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    single = sparse.to_blocks(weight, every & (weight > 0), depth=depth)  # a mask of weights
    assert torch.equal(sparse.to_dense(*single, 50, 37), weight * (every & (weight > 0)))


def test_where_a_value_lies():
    parts = sparse.to_blocks(torch.zeros(20, 9).index_put((torch.tensor([17]), torch.tensor([6])), torch.tensor(3.0)))
    assert parts.columns.tolist() == [1] and parts.starts.tolist() == [0, 0, 1]
    assert parts.values.nonzero().tolist() == [[0, 2, 1]]


def test_what_has_no_blocks_is_refused():
    with pytest.raises(ValueError, match="to_blocks: weight must be floating"):
        sparse.to_blocks(torch.ones(3))
    with pytest.raises(ValueError, match="depth must be one of 2, 4, 8, 16; got 3"):
        sparse.to_blocks(torch.ones(3, 3), depth=3)
    with pytest.raises(ValueError, match=r"mask must have .*\(20, 9\).*\(2, 3\); got \(3, 3\)"):
        sparse.to_blocks(torch.ones(20, 9), torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        sparse.to_blocks(torch.ones(20, 9), torch.ones(2, 3))


# ---- bits


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(target, dtype):
    """Forward and backward; of products large enough to be split."""
    x, parts = randn(70, 300, dtype=dtype), blocks(200, 300, 2, 0.6, dtype)
    grad, found = randn(70, 200, dtype=dtype, seed=3), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with target.forced():
                leaves = [t.clone().requires_grad_() for t in (x, parts.values)]
                y = run(leaves[0], (leaves[1], *parts[1:]), None, 200)
                found.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@every_target
def test_what_is_not_kept_takes_no_part(target):
    parts = sparse.to_blocks(randn(50, 70), pattern(50, 70, 4), depth=4)
    x = randn(9, 70)
    held = torch.zeros(sparse.block_grid(50, 70), dtype=torch.bool)
    for s in range(4):
        held[s, parts.columns[parts.starts[s] : parts.starts[s + 1]].long()] = True
    strip, column = (~held).nonzero()[0].tolist()
    spoilt = x.clone()
    spoilt[:, 4 * column] = float("nan")
    with target.forced():
        clean, found = run(x, parts), run(spoilt, parts)
    outputs = slice(16 * strip, min(16 * strip + 16, 50))
    assert same_bits(found[:, outputs], clean[:, outputs])
    assert found[:, held[:, column].repeat_interleave(16)[:50]].isnan().all()


def test_a_misplaced_block_is_refused():
    x, (values, columns, starts) = randn(2, 70), blocks()
    for b in range(len(columns)):
        for wrong in (-1, 17, 18, int(columns[b - 1]), int(columns[b]), 2**31 - 1, -(2**31)):
            moved = columns.clone()
            moved[b] = wrong
            refused = []
            for backend in ("reference", "cpu"):
                try:
                    with fastnn.use_backend(backend):
                        run(x, (values, moved, starts))
                    refused.append(None)
                except (ValueError, IndexError) as error:
                    refused.append(type(error))
            assert (refused[0] is None) == (refused[1] is None), (b, wrong, refused)


# ---- gradients


def test_second_derivative():
    parts = blocks(20, 10, 2, dtype=torch.float64)
    x, bias = randn(3, 10, dtype=torch.float64), randn(20, dtype=torch.float64)

    def call(x, v, b):
        with fastnn.use_backend("reference"):
            return run(x, (v, *parts[1:]), b, 20, activation="gelu")

    leaves = [t.requires_grad_() for t in (x, parts.values, bias)]
    floats = [t.detach().float().requires_grad_() for t in leaves]
    y = run(floats[0], (floats[1], *parts[1:]), floats[2], 20, activation="gelu")
    (dx,) = torch.autograd.grad(y.square().sum(), floats[0], create_graph=True)
    ours = torch.autograd.grad(dx.square().sum(), floats)
    truth_dx = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    truth = torch.autograd.grad(truth_dx.square().sum(), leaves)
    assert all(torch.allclose(a.double(), b, 1e-4, 1e-4) for a, b in zip(ours, truth, strict=True))


def test_only_what_is_wanted_is_computed():
    x, parts = randn(5, 70), blocks()
    for wanted in ((True, False), (False, True)):
        leaves = [t.detach().clone().requires_grad_(w) for t, w in zip((x, parts.values), wanted, strict=True)]
        run(leaves[0], (leaves[1], *parts[1:])).sum().backward()
        assert [t.grad is not None for t in leaves] == list(wanted)


# ---- the layer


def test_layer_trains_saves_and_loads():
    torch.manual_seed(0)
    dense = torch.nn.Linear(70, 50)
    layer = BlockSparseLinear.from_dense(dense.weight, dense.bias, pattern(50, 70, 4), activation="relu")
    assert layer.bias is dense.bias and layer.density == layer.blocks / (4 * 18) and f"{layer.blocks} (" in repr(layer)
    x, before = randn(8, 70), layer.dense().detach().clone()
    first = (layer(x) - 1).square().mean()
    for _ in range(20):
        loss = (layer(x) - 1).square().mean()
        for parameter, gradient in zip(layer.parameters(), torch.autograd.grad(loss, layer.parameters()), strict=True):
            parameter.data -= gradient
    after = layer.dense()
    assert loss < 0.8 * first and torch.equal(after == 0, before == 0), "the pattern stays"
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = BlockSparseLinear(70, 50, blocks=layer.blocks, activation="relu")
    assert not other.dense().any()
    other(x)
    other.load_state_dict(torch.load(file))
    for one in (other, copy.deepcopy(layer), layer.double().float()):
        assert same_bits(one(x), layer(x)) and same_bits(one.dense(), after)


class Doubled(torch.nn.Module):
    def forward(self, bias):
        return 2 * bias


def test_layer_with_a_parametrized_bias():
    layer = BlockSparseLinear.from_dense(randn(50, 70), torch.nn.Parameter(randn(50, seed=3)), pattern(50, 70, 4))
    x = randn(3, 70)
    torch.nn.utils.parametrize.register_parametrization(layer.requires_grad_(False), "bias", Doubled())
    parts = layer.values, layer.columns, layer.starts
    assert same_bits(layer(x), run(x, parts, 2 * randn(50, seed=3)))


def test_layer_says_what_does_not_fit():
    with pytest.raises(ValueError, match="blocks must be an int from 0 to 8, got 9"):
        BlockSparseLinear(16, 20, blocks=9)
    with pytest.raises(ValueError, match="depth must be one of"):
        BlockSparseLinear(16, 20, blocks=1, depth=5)
    with pytest.raises(ValueError, match="activation must be one of"):
        BlockSparseLinear(16, 20, blocks=1, activation="swish")
    with pytest.raises(ValueError, match=r"in_features = 16, got shape \(3, 15\)"):
        BlockSparseLinear(16, 20, blocks=1)(torch.ones(3, 15))


def test_autocast_takes_the_low_type():
    parts, x = blocks(), randn(5, 70)
    low = [t.bfloat16() for t in (x, parts.values)]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x, parts)
    assert same_bits(found, run(low[0], (low[1], *parts[1:])))


@pytest.mark.slow
def test_compiles_whole():
    layer = BlockSparseLinear.from_dense(randn(50, 70), None, pattern(50, 70, 4), activation="gelu")
    x = randn(5, 70).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    ours, expected = compiled(x), layer(x)
    assert same_bits(ours, expected)
    a, b = (torch.autograd.grad(y.sum(), (x, layer.values)) for y in (ours, expected))
    assert all(same_bits(p, q) for p, q in zip(a, b, strict=True))


def test_reference_is_what_the_blocks_stand_for():
    parts, x, bias = blocks(), randn(5, 70), randn(50)
    found = block_sparse_linear_reference(x, *parts, bias, 50, "tanh")
    assert torch.equal(found, torch.nn.functional.linear(x, sparse.to_dense(*parts, 50, 70), bias).tanh())
