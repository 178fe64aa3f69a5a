"""functorch transforms and forward-mode AD give what torch's own ops give, in any combination."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import fastnn
from fastnn import testing
from fastnn.ops.linear import ACTIVATIONS, linear_reference
from fastnn.testing import assert_within_budget, find_case, policy


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def functions():
    for name, ours, theirs in (
        ("softmax", fastnn.softmax, torch.softmax),
        ("log_softmax", fastnn.log_softmax, torch.log_softmax),
    ):
        yield pytest.param(lambda x, f=ours: f(x, -1), lambda x, f=theirs: f(x, -1), id=name)
    w, b = tensor(6, 5, seed=1), tensor(6, seed=2)
    for activation in ACTIVATIONS:
        yield pytest.param(
            lambda x, a=activation: fastnn.linear(x, w, b, activation=a),
            lambda x, a=activation: linear_reference(x, w, b, a),
            id=f"linear-{activation}",
        )
    yield from losses()
    yield from attentions()
    yield from norms()
    yield from glus()
    yield from ropes()
    yield from blocks()
    r = tensor(5, seed=7)
    yield pytest.param(lambda x: fastnn.dropout_add(x, r.expand_as(x), 0.3, False), lambda x: x + r, id="dropout_add")
    hidden = torch.arange(5) != 2
    for name, mask in (("bool", hidden), ("additive", tensor(5, seed=6))):

        def theirs(x, mask=mask):
            x = 0.7 * x
            return torch.softmax(x + mask if mask.is_floating_point() else x.masked_fill(~mask, -torch.inf), -1)

        yield pytest.param(
            lambda x, mask=mask: fastnn.masked_softmax(x, mask, 0.7), theirs, id=f"masked_softmax-{name}"
        )


def ropes():
    """Each element as the only feature pair of a token, (x, 2 x)."""
    cos, sin = fastnn.rope_tables(5, 2)

    def rotated(x, function):
        pairs = torch.stack((x.reshape(-1, 5), 2 * x.reshape(-1, 5)), -1)
        return function(pairs).sum(-1).reshape(x.shape)

    def ours(x):
        return fastnn.rope(x, None, cos, sin, 0, rotary_dim=2)[0]

    def theirs(x):
        a, b = x.unbind(-1)
        return torch.stack((a * cos[:, 0] - b * sin[:, 0], b * cos[:, 0] + a * sin[:, 0]), -1)

    yield pytest.param(lambda x: rotated(x, ours), lambda x: rotated(x, theirs), id="rope")


def glus():
    b, up = tensor(5, seed=1), tensor(5, seed=2)
    yield pytest.param(lambda x: fastnn.gelu(x, "tanh", bias=b), lambda x: F.gelu(x + b, approximate="tanh"), id="gelu")
    yield pytest.param(lambda x: fastnn.swiglu(x, up.expand_as(x)), lambda x: F.silu(x) * up.expand_as(x), id="swiglu")
    yield pytest.param(
        lambda x: fastnn.geglu(torch.cat((x, 2 * x), -1)), lambda x: F.gelu(x) * 2 * x, id="geglu_packed"
    )


def blocks():
    w, b, up = tensor(4, 5, seed=1), tensor(4, seed=2), tensor(4, 5, seed=3)
    yield pytest.param(
        lambda x: fastnn.mlp(x, w, b, w.t(), None, "gelu", recompute=True),
        lambda x: F.linear(F.gelu(F.linear(x, w, b)), w.t()),
        id="mlp",
    )
    yield pytest.param(
        lambda x: fastnn.swiglu_mlp(x, w, up, w.t()),
        lambda x: F.linear(F.silu(F.linear(x, w)) * F.linear(x, up), w.t()),
        id="swiglu_mlp",
    )


def norms():
    w, b = tensor(5, seed=1), tensor(5, seed=2)
    r = tensor(5, seed=3)
    yield pytest.param(
        lambda x: fastnn.layer_norm(x, (5,), w, b), lambda x: F.layer_norm(x, (5,), w, b), id="layer_norm"
    )
    yield pytest.param(lambda x: fastnn.rms_norm(x, (5,), w, 0.1), lambda x: F.rms_norm(x, (5,), w, 0.1), id="rms_norm")
    yield pytest.param(
        lambda x: sum(fastnn.add_layer_norm(x, r.expand_as(x), w, b)),
        lambda x: F.layer_norm(x + r, (5,), w, b) + x + r,
        id="add_layer_norm",
    )


def losses():
    """The last dimension as classes; the loss of each row."""
    target, shares = torch.arange(5), torch.softmax(tensor(5, seed=3), 0)
    for name, options in (("plain", {}), ("smoothed", {"label_smoothing": 0.1})):
        for kind, t in (("indices", target[2]), ("probabilities", shares)):

            def ours(x, t=t, options=options):
                return fastnn.cross_entropy(x.reshape(-1, 5), t.expand(x.numel() // 5, *t.shape), **options)[None]

            def theirs(x, t=t, options=options):
                return F.cross_entropy(x.reshape(-1, 5), t.expand(x.numel() // 5, *t.shape), **options)[None]

            yield pytest.param(ours, theirs, id=f"cross_entropy-{name}-{kind}")


def attentions():
    """The rows as queries of one feature each (* 5), keys and values fixed."""
    k, v = tensor(1, 1, 7, 3, seed=1), tensor(1, 1, 7, 4, seed=2)
    visible, features = (torch.arange(7) % 3 > 0)[None], tensor(3, seed=4)
    for name, mask, options in (("plain", None, {"scale": 0.3}), ("masked", visible, {"scale": 0.3})):

        def call(x, function, mask=mask, options=options):
            return function(x.reshape(1, 1, -1, 1) * features, k, v, mask, **options)[0, 0]

        yield pytest.param(
            lambda x, call=call: call(x, fastnn.scaled_dot_product_attention),
            lambda x, call=call: call(x, F.scaled_dot_product_attention),
            id=f"attention-{name}",
        )


both = pytest.mark.parametrize(("ours", "theirs"), list(functions()))


def agree(ours, theirs):
    for a, b in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True):
        assert a.abs().max() > 1e-3, "nothing to compare"
        assert_within_budget(a, b.double(), b, b.dtype, policy.GRADIENT_FACTOR)


@both
def test_vmap(ours, theirs):
    x = tensor(4, 3, 5)
    agree(vmap(ours)(x), vmap(theirs)(x))
    agree(vmap(ours, in_dims=1)(x), vmap(theirs, in_dims=1)(x))
    agree(vmap(vmap(ours))(x), vmap(vmap(theirs))(x))


def test_vmap_over_weights():
    x, w, b = tensor(3, 5), tensor(4, 6, 5), tensor(4, 6)
    agree(
        vmap(lambda w, b: fastnn.linear(x, w, b, activation="gelu"))(w, b),
        vmap(lambda w, b: linear_reference(x, w, b, "gelu"))(w, b),
    )


@both
def test_grad(ours, theirs):
    x = tensor(3, 5)
    agree(grad(lambda x: ours(x).square().sum())(x), grad(lambda x: theirs(x).square().sum())(x))


@both
def test_per_sample_grad(ours, theirs):
    x = tensor(4, 5)
    agree(vmap(grad(lambda x: ours(x).square().sum()))(x), vmap(grad(lambda x: theirs(x).square().sum()))(x))


@both
def test_jacobians(ours, theirs):
    x = tensor(2, 5)
    agree(jacrev(ours)(x), jacrev(theirs)(x))
    agree(jacfwd(ours)(x), jacfwd(theirs)(x))


@both
def test_hessian(ours, theirs):
    x = tensor(5)
    agree(hessian(lambda x: ours(x).pow(3).sum())(x), hessian(lambda x: theirs(x).pow(3).sum())(x))


@both
def test_jvp_and_vjp(ours, theirs):
    x, t = tensor(3, 5), tensor(3, 5, seed=3)
    agree(jvp(ours, (x,), (t,)), jvp(theirs, (x,), (t,)))
    agree(linearize(ours, x)[1](t), linearize(theirs, x)[1](t))
    out, pull = vjp(theirs, x)
    cotangent = tensor(*out.shape, seed=4)
    agree(vjp(ours, x)[1](cotangent), pull(cotangent))


@both
def test_jvp_under_no_grad(ours, theirs):
    """Forward mode does not ask for grad mode."""
    x, t = tensor(3, 5), tensor(3, 5, seed=3)
    with torch.no_grad():
        agree(jvp(ours, (x,), (t,)), jvp(theirs, (x,), (t,)))


@both
def test_dual_numbers(ours, theirs):
    x, t = tensor(3, 5), tensor(3, 5, seed=3)
    with forward_ad.dual_level():
        mine, other = (forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))) for f in (ours, theirs))
        agree([mine.primal, mine.tangent], [other.primal, other.tangent])


def test_dual_weight():
    x, w, t = tensor(3, 5), tensor(6, 5), tensor(6, 5, seed=3)
    with forward_ad.dual_level():
        mine = forward_ad.unpack_dual(fastnn.linear(x, forward_ad.make_dual(w, t), activation="silu")).tangent
        other = forward_ad.unpack_dual(linear_reference(x, forward_ad.make_dual(w, t), None, "silu")).tangent
        agree(mine, other)


@pytest.mark.parametrize("frozen", [False, True])
def test_layer_under_functional_call(frozen):
    layer = fastnn.nn.Linear(5, 6, activation="gelu")
    if frozen:
        layer.freeze().eval()
        with torch.no_grad():
            layer(tensor(3, 5))
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = tensor(3, 5)
    ours = grad(lambda p: functional_call(layer, p, (x,)).square().sum())(parameters)
    theirs = grad(lambda p: linear_reference(x, p["weight"], p["bias"], "gelu").square().sum())(parameters)
    agree([ours["weight"], ours["bias"]], [theirs["weight"], theirs["bias"]])
    stacked = {name: torch.stack([p, p * 2]) for name, p in parameters.items()}
    agree(
        vmap(lambda p: functional_call(layer, p, (x,)))(stacked),
        vmap(lambda p: linear_reference(x, p["weight"], p["bias"], "gelu"))(stacked),
    )


@pytest.mark.parametrize(
    ("op", "name", "argument"),
    [
        ("softmax", "rows", "input"),
        ("linear", "gelu_bias", "input"),
        ("linear_cross_entropy", "mean", "linear_weight"),
        ("cross_entropy", "3x17x5", "input"),
        ("norm", "layer_rows", "input"),
        ("activation", "silu_pair_rows", "gate"),
        ("attention", "three_dims", "query"),
        ("rope", "halves_rows", "query"),
        ("dropout_add", "rows_0.3", "input"),
        ("masked_softmax", "rows_bool", "input"),
        ("mlp", "gated_silu", "input"),
    ],
)
def test_forced_kernel_refuses_in_words(op, name, argument, extension):
    case = find_case(op, name)
    inputs = case.inputs(torch.float32)
    with testing.best().forced(), pytest.raises(NotImplementedError, match=f"fastnn.{op}.*functorch"):
        grad(lambda x: case.call({**inputs, argument: x}).sum())(inputs[argument])


def test_transforms_leave_kernels_to_ordinary_calls(extension):
    with fastnn.record() as runs:
        vmap(lambda x: fastnn.softmax(x, -1))(tensor(2, 3))
        fastnn.softmax(tensor(2, 3), -1)
    assert sorted(run.backend for run in runs) == ["cpu", "reference"]
