"""The raw operators: private, but a call of one may never drop a gradient in silence, and torch's own checks pass."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from torch.func import grad, jvp, vmap

from fastnn import _extension, testing
from fastnn.ops import activation as activations
from fastnn.ops import quantize_groups
from fastnn.ops.linear import ACTIVATION_CODE, ACTIVATIONS
from fastnn.sparse import to_blocks, to_int8_blocks
from fastnn.testing import assert_within_budget, cases, op_names, policy, same_bits

pytestmark = pytest.mark.usefixtures("extension")

RAW = (
    "activation_bwd",
    "activation_fwd",
    "attention_bwd",
    "attention_cache_append",
    "attention_cache_fwd",
    "attention_fwd",
    "attention_varlen_bwd",
    "attention_varlen_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "dropout_add_bwd",
    "dropout_add_fwd",
    "linear_block_sparse_bwd",
    "linear_block_sparse_fwd",
    "linear_block_sparse_int8_fwd",
    "linear_block_sparse_int8_pack",
    "linear_bwd",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_fwd",
    "linear_groupwise_fwd",
    "linear_groupwise_pack",
    "linear_groupwise_rows",
    "linear_int8_fwd",
    "linear_int8_pack",
    "linear_int8_quantize",
    "linear_pack",
    "linear_packed_fwd",
    "masked_softmax_bwd",
    "masked_softmax_fwd",
    "mlp_bwd",
    "mlp_fwd",
    "mlp_packed_fwd",
    "norm_bwd",
    "norm_fwd",
    "rope_bwd",
    "rope_fwd",
    "softmax_bwd",
    "softmax_fwd",
)


def raw(name):
    return getattr(torch.ops.fastnn, name).default


def tensor(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def samples(dtype=torch.float32):
    """(operator, arguments without grad_handled) for every raw operator, in many forms."""
    x, w, b = tensor(5, 12, dtype=dtype), tensor(7, 12, dtype=dtype, seed=1), tensor(7, dtype=dtype, seed=2)
    g, pre = tensor(5, 7, dtype=dtype, seed=3), tensor(5, 7, dtype=dtype, seed=4)
    deep, strided = tensor(2, 3, 12, dtype=dtype), tensor(5, 24, dtype=dtype)[:, ::2]
    for log in (False, True):
        yield "softmax_fwd", (x, 1, log, None)
        yield "softmax_fwd", (strided, 0, log, None)
        yield "softmax_fwd", (deep.permute(2, 0, 1), -2, log, None)
        yield "softmax_fwd", (x, 1, log, torch.float32)
        y = torch.softmax(x, 1) if not log else torch.log_softmax(x, 1)
        yield "softmax_bwd", (x, y, 1, log, dtype)
        yield "softmax_bwd", (strided, y, 1, log, dtype)
    for activation in (0, 1, 2):
        yield "linear_fwd", (x, w, b, activation, activation == 2)
        yield "linear_fwd", (strided, w, None, activation, True)
        yield "linear_fwd", (deep, w, b, activation, False)
        yield "linear_bwd", (g, x, w, pre, activation, [5, 12], [True, True, True])
        yield "linear_bwd", (g.t().contiguous().t(), x, w, pre, activation, [5, 12], [False, True, False])
        yield "linear_bwd", (g, None, w, pre, activation, [5, 12], [True, False, True])
    yield "linear_pack", (w,)
    with torch.no_grad():
        packed = torch.ops.fastnn.linear_pack(w)
    yield "linear_packed_fwd", (x, packed, b, 7, 1)
    yield "linear_packed_fwd", (deep, packed, None, 7, 2)
    yield from int8_samples(x, deep, strided, b)
    yield from groupwise_samples(x, deep, strided, b)
    yield from block_sparse_samples(x, deep, strided, g, pre, b)
    yield from block_sparse_int8_samples(x, deep, strided, b)
    yield from cross_entropy_samples(x, strided)
    yield from attention_samples(dtype)
    yield from sequence_samples(dtype)
    yield from norm_samples(x, deep, strided)
    yield from activation_samples(x, deep, strided)
    yield from rope_samples(dtype)
    yield from dropout_add_samples(x, deep, strided)
    yield from masked_softmax_samples(x, deep, strided)
    yield from mlp_samples(x, deep, strided, w)
    yield from linear_cross_entropy_samples(x, strided, w, b)


def int8_samples(x, deep, strided, bias):
    codes, scale = torch.arange(-42, 42, dtype=torch.int8).view(7, 12), torch.rand(7) + 0.1
    with torch.no_grad():
        packed = torch.ops.fastnn.linear_int8_pack(codes, scale)
    codes = codes + 42  # opcheck compares packed codes as float32: four negative ones would be NaN
    yield "linear_int8_pack", (codes, scale)
    yield "linear_int8_pack", (codes.t().contiguous().t(), scale)
    for values in (x, deep, strided):
        yield "linear_int8_quantize", (values,)
        yield "linear_int8_fwd", (values, packed, bias, 7, 2)
    yield "linear_int8_fwd", (x, packed, bias.float(), 7, 0)
    yield "linear_int8_fwd", (strided[:2], packed, None, 7, 1)


def groupwise_samples(x, deep, strided, bias):
    index = torch.tensor([[0, 6], [3, 3]])
    for bits, offsets in ((4, False), (4, True), (8, False)):
        codes, scale, offset = quantize_groups(tensor(7, 12, seed=5), 5, bits=bits, symmetric=not offsets)
        weight = codes, scale, offset, 12, 5, bits
        with torch.no_grad():
            packed = torch.ops.fastnn.linear_groupwise_pack(*weight)
        # opcheck compares packed codes as float32: zeros cannot be NaN
        yield "linear_groupwise_pack", (codes * 0, scale * 0, offset if offset is None else offset * 0, 12, 5, bits)
        yield "linear_groupwise_rows", (index, *weight, 1)
        for values in (x, deep, strided):
            yield "linear_groupwise_fwd", (values, packed, bias, 7, 5, bits, offsets, bits == 4, 2)
        yield "linear_groupwise_fwd", (x, packed, bias.float(), 7, 5, bits, offsets, False, 0)
        yield "linear_groupwise_fwd", (strided[:2], packed, None, 7, 5, bits, offsets, False, 1)


def block_sparse_samples(x, deep, strided, grad, pre, bias):
    parts = to_blocks(tensor(7, 12, dtype=x.dtype, seed=1), torch.tensor([[True, False, True]]))
    for activation in (0, 1, 2):
        yield "linear_block_sparse_fwd", (x, *parts, bias, 7, activation, activation == 2)
        yield "linear_block_sparse_fwd", (strided, *parts, None, 7, activation, True)
        yield "linear_block_sparse_fwd", (deep, *parts, bias, 7, activation, False)
        yield "linear_block_sparse_bwd", (grad, x, *parts, pre, activation, [5, 12], [True, True, True])
        apart = grad.t().contiguous().t()
        yield "linear_block_sparse_bwd", (apart, x, *parts, pre, activation, [5, 12], [False, True, False])
        yield "linear_block_sparse_bwd", (grad, None, *parts, pre, activation, [5, 12], [True, False, True])


def block_sparse_int8_samples(x, deep, strided, bias):
    codes, columns, starts, scale = to_int8_blocks(tensor(7, 12, seed=1), torch.tensor([[True, False, True]]))
    with torch.no_grad():
        packed = torch.ops.fastnn.linear_block_sparse_int8_pack(codes, starts, scale)
    # opcheck compares sums of codes as float32: zeros cannot be NaN
    yield "linear_block_sparse_int8_pack", (codes * 0, starts, scale * 0)
    for values in (x, deep, strided):
        yield "linear_block_sparse_int8_fwd", (values, codes, columns, starts, packed, bias, 7, 2)
    yield "linear_block_sparse_int8_fwd", (strided[:2], codes, columns, starts, packed, None, 7, 1)


def cross_entropy_samples(x, strided):
    target, weight = torch.tensor([0, 3, -100, 11, 5]), x[0].abs() + 0.1
    stats, divisors = torch.stack([x.float().amax(1), x.float().abs().sum(1).log()], 1), torch.tensor([2.0, 4.0])
    for reduction in (0, 1, 2):
        grad = x[:, 0] if reduction == 0 else x[0, 0]
        yield "cross_entropy_fwd", (x, target, weight, reduction, -100, 0.1, 0.01, 0.0)
        yield "cross_entropy_bwd", (grad, x, target, weight, stats, divisors, reduction, -100, 0.1, 0.01, 0.0)
    shares = torch.softmax(x, 1)
    yield "cross_entropy_fwd", (strided, shares, None, 1, -100, 0.0, 0.0, 5.0)
    yield "cross_entropy_fwd", (strided.t(), torch.arange(12) % 5, None, 1, -100, 0.0, 0.0, 0.0)
    yield "cross_entropy_bwd", (x[0, 0], strided, shares, None, stats, divisors, 1, -100, 0.0, 0.0, 5.0)


def attention_samples(dtype):
    q, k, v = (tensor(2, 4, n, d, dtype=dtype, seed=n) for n, d in ((5, 6), (9, 6), (9, 7)))
    shared = [t[:, :2] for t in (k, v)]
    inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    visible, added, seed = torch.arange(45).view(5, 9) % 3 > 0, tensor(4, 5, 9, dtype=dtype, seed=3), torch.tensor(7)
    for operands in ((q, k, v), (q, *shared), inside):
        for mask, seeded, options in (
            (None, None, (0.0, 0.4, 0.0, -1, -1)),
            (visible, None, (0.0, 0.4, 5.0, 3, 2)),
            (added, seed, (0.3, 0.4, 0.0, -1, 0)),
        ):
            yield "attention_fwd", (*operands, mask, seeded, *options)
            with torch.no_grad():
                out, lse = torch.ops.fastnn.attention_fwd(*operands, mask, seeded, *options)
            grad = tensor(*out.shape, dtype=dtype, seed=8)
            yield "attention_bwd", (grad, *operands, mask, seeded, out, lse, *options)


def sequence_samples(dtype):
    """Attention over sequences: end to end, and on a cache."""
    q, k, v = (tensor(n, h, 6, dtype=dtype, seed=n) for n, h in ((9, 4), (12, 2), (12, 2)))
    bounds_q, bounds_k, seed = (
        torch.tensor([0, 2, 2, 9]),
        torch.tensor([0, 7, 9, 12], dtype=torch.int32),
        torch.tensor(7),
    )
    apart = q.repeat_interleave(2, -1)[..., ::2]
    for query, seeded, options in ((q, None, (0.0, 0.4, 0.0, -1, 0)), (apart, seed, (0.3, 0.4, 5.0, 3, -1))):
        call = (query, k, v, bounds_q, bounds_k, seeded)
        yield "attention_varlen_fwd", (*call, *options)
        with torch.no_grad():
            out, lse = torch.ops.fastnn.attention_varlen_fwd(*call, *options)
        yield "attention_varlen_bwd", (tensor(*out.shape, dtype=dtype, seed=8), *call, out, lse, *options)
    keys, values = tensor(2, 2, 9, 6, dtype=dtype), tensor(2, 2, 9, 7, dtype=dtype, seed=1)
    query, lengths = tensor(2, 4, 3, 6, dtype=dtype, seed=2), torch.tensor([4, 6])
    inside = query.transpose(1, 2).contiguous().transpose(1, 2)
    yield "attention_cache_fwd", (query, keys, values, lengths, 0.4, 0.0, -1, 0)
    yield "attention_cache_fwd", (inside, keys, values, lengths, 0.4, 5.0, 2, -1)
    yield "attention_cache_append", (query[:, :2], values[:, :, :3], keys, values, lengths)
    yield "attention_cache_append", (inside[:, 2:, :1], values[:, :, 3:4], keys, values, lengths)


def norm_samples(x, deep, strided):
    weight, bias, stats = x[0].abs() + 0.1, x[1], torch.rand(5, 2) + 0.5
    grad, wide = x.flip(0), x.float()[0]
    for rms in (False, True):
        shift = None if rms else bias
        yield "norm_fwd", (x, None, weight, shift, 1, 1e-5, rms, False)
        yield "norm_fwd", (strided, x, weight[:1].expand(12), shift, 1, 1e-5, rms, True)
        yield "norm_fwd", (deep, None, wide, None, 1, 1e-5, rms, True)
        yield "norm_fwd", (deep.mT, None, None, None, 2, 1e-5, rms, True)
        yield "norm_bwd", (grad, None, x, weight, stats, 1, rms, x.dtype, [True, True, not rms])
        yield "norm_bwd", (strided, grad, x, wide, stats, 1, rms, torch.float32, [True, False, False])
        yield "norm_bwd", (deep.mT, None, deep.mT, None, stats[:2], 2, rms, x.dtype, [False, True, True])


def activation_samples(x, deep, strided):
    grad, scalar = x.flip(0), x[0, 0]
    for code in (1, 2, 7):
        yield "activation_fwd", (x, None, x[1], code, False)
        yield "activation_fwd", (deep.mT, None, None, code, False)
        yield "activation_fwd", (x, strided, None, code, False)
        yield "activation_fwd", (strided, None, None, code, True)
        yield "activation_bwd", (grad, x, None, x[1], code, False, [True, False, True])
        yield "activation_bwd", (strided, x, grad, None, code, False, [True, True, False])
        yield "activation_bwd", (grad[:, :6], strided, None, None, code, True, [True, False, False])
    yield "activation_fwd", (scalar, None, None, 4, False)
    yield "activation_bwd", (scalar, scalar, scalar, None, 4, False, [False, True, False])
    yield "activation_bwd", (grad, x, None, x.float()[1], 4, False, [False, False, True])


def masked_softmax_samples(x, deep, strided):
    visible = x > -0.5
    for mask in (None, visible, visible[0], strided, x[:, :1].float()):
        for causal in (False, True):
            yield "masked_softmax_fwd", (strided, mask, 0.3, causal)
    yield "masked_softmax_fwd", (deep.mT, deep[:, :1, :1].mT > 0, -2.0, True)
    yield "masked_softmax_fwd", (x[0], None, 1.0, False)
    yield "masked_softmax_bwd", (strided, torch.softmax(x, 1), 0.3)
    yield "masked_softmax_bwd", (deep.mT, torch.softmax(deep, 1).mT, 0.3)


def mlp_samples(x, deep, strided, w):
    back, b_in, b_out, factor = w.t()[:5], w[:, 0], x[:, 0], w.flip(0)
    every = [True, True, True, False, True, True]
    for values in (x, deep, strided):
        z, grad = values[..., :7].contiguous(), values[..., 1:6].contiguous()
        for save in (False, True):
            yield "mlp_fwd", (values, w, b_in, None, back, b_out, 2, save)
            yield "mlp_fwd", (values, w, None, factor, back, None, 4, save)
        yield "mlp_bwd", (grad, values, w, b_in, None, back, None, None, 2, every)
        yield "mlp_bwd", (grad, values, w, None, factor, back, z, z + 1, 4, [True, False, False, True, False, False])
        with torch.no_grad():
            packed = [torch.ops.fastnn.linear_pack(t) for t in (w, factor, back)]
        yield "mlp_packed_fwd", (values, packed[0], b_in, None, packed[2], b_out, 7, 5, 2)
        yield "mlp_packed_fwd", (values, packed[0], None, packed[1], packed[2], None, 7, 5, 4)


def linear_cross_entropy_samples(x, strided, w, b):
    target, weight = torch.tensor([0, 3, -100, 6, 5]), b.abs() + 0.1
    for reduction, mask in ((0, [False] * 3), (1, [True] * 3), (2, [True, False, True])):
        options = (reduction, -100, 0.1, 0.01, 5.0)
        yield "linear_cross_entropy_fwd", (x, w, b, target, weight, *options, mask)
        with torch.no_grad():
            stats = torch.ops.fastnn.linear_cross_entropy_fwd(x, w, b, target, weight, *options, mask)[1]
        grad = torch.ones(5)[: 5 if reduction == 0 else 1].squeeze(0)
        yield "linear_cross_entropy_bwd", (grad, x, w, b, target, weight, stats, *options, [True, True, False])
    plain = (1, -100, 0.0, 0.0, 0.0)
    yield (
        "linear_cross_entropy_fwd",
        (strided, w.t().contiguous().t(), None, target, None, *plain, [False, True, False]),
    )


def dropout_add_samples(x, deep, strided):
    for seed, p in ((torch.tensor(7), 0.3), (None, 0.0)):
        yield "dropout_add_fwd", (x, strided, seed, p)
        yield "dropout_add_fwd", (deep.mT, deep.mT, seed, p)
        yield "dropout_add_bwd", (strided, seed, p)
    yield "dropout_add_bwd", (x[0, 0], torch.tensor(3), 0.5)


def rope_samples(dtype):
    q, k, cos, sin = (
        tensor(*shape, dtype=dtype, seed=len(shape)) for shape in ((2, 4, 5, 6), (2, 2, 5, 6), (5, 6), (5, 6))
    )
    at, inside = torch.tensor([3, 0, 4, 4, 1]), q.transpose(1, 2).contiguous().transpose(1, 2)
    for interleaved in (False, True):
        yield "rope_fwd", (q, k, cos, sin, None, 6, interleaved, 1)
        yield "rope_fwd", (inside, k, cos[None], sin[None], None, 6, interleaved, 1)
        yield "rope_fwd", (q.transpose(1, 2), None, cos.float(), sin.float(), at, 6, interleaved, 2)
        yield "rope_fwd", (q, k.mT.contiguous().mT, cos[:, :2], sin[:, :2], at.expand(2, 5), 4, interleaved, 1)
        yield "rope_bwd", (q, k, cos, sin, None, 6, interleaved, 1, [True, False])
        yield "rope_bwd", (inside, None, cos[:, :2], sin[:, :2], at, 4, interleaved, 1, [False, False])
        yield "rope_bwd", (None, k.transpose(1, 2), cos, sin, at, 6, interleaved, 2, [False, True])


def handled(name, arguments):
    """With `grad_handled` where the operator has it."""
    has = any(argument.name == "grad_handled" for argument in raw(name)._schema.arguments)
    return (*arguments, True) if has else tuple(arguments)


def wants_gradient(arguments):
    return tuple(
        a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )


SAMPLES = list(samples()) if _extension._C is not None else []
IDS = [f"{name}-{index}" for index, (name, _) in enumerate(SAMPLES)]
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CHECKS = {"linear_pack": ALL_CHECKS[:2]}  # never traced: the size of its result depends on the instruction set
every_sample = pytest.mark.parametrize(("name", "arguments"), SAMPLES, ids=IDS)


def test_these_are_all():
    """Nothing is registered in the namespace beyond what is tested here."""
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastnn::")}
    assert registered == set(RAW) == {name for name, _ in SAMPLES}


@every_sample
def test_opcheck(name, arguments):
    """Schema, autograd registration, fake tensors with true strides, tracing with dynamic shapes."""
    torch.library.opcheck(raw(name), handled(name, arguments), test_utils=CHECKS.get(name, ALL_CHECKS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_of_half_precision(dtype):
    for name, arguments in samples(dtype):
        checks = set(CHECKS.get(name, ALL_CHECKS)) & {"test_schema", "test_faketensor"}
        torch.library.opcheck(raw(name), handled(name, arguments), test_utils=sorted(checks))


@every_sample
def test_gradient_is_right_or_refused(name, arguments):
    """Called bare on inputs that require grad, in grad mode."""
    arguments = wants_gradient(arguments)
    try:
        result = raw(name)(*arguments)
    except RuntimeError as error:
        assert name in str(error) and "gradient" in str(error)
        return
    pytest.fail(f"{name} returned {type(result).__name__}: its gradient is dropped without a word")


@pytest.mark.parametrize("name", [name for name in RAW if name.endswith("_fwd")])
def test_gradient_by_functorch_is_refused(name):
    arguments = next(a for n, a in SAMPLES if n == name)

    def first(x):
        result = raw(name)(x, *arguments[1:])
        return (result[0] if isinstance(result, tuple) else result).sum()

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="gradient"):
        warnings.simplefilter("ignore")
        grad(first)(arguments[0])
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="gradient"):
        warnings.simplefilter("ignore")
        jvp(first, (arguments[0],), (arguments[0],))


@every_sample
def test_runs_without_grad_mode(name, arguments):
    """As inference does: also on tensors that require grad."""
    with torch.no_grad():
        found = raw(name)(*wants_gradient(arguments))
    expected = raw(name)(*handled(name, arguments))
    for ours, other in zip(_tensors(found), _tensors(expected), strict=True):
        assert same_bits(ours, other)


@every_sample
def test_fake_tensor_has_the_real_shape_strides_and_dtype(name, arguments):
    real = raw(name)(*handled(name, arguments))
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in handled(name, arguments)]
        if name in CHECKS:
            with pytest.raises(UnsupportedOperatorException):
                raw(name)(*given)
            return
        fake = raw(name)(*given)
    for r, f in zip(_tensors(real), _tensors(fake), strict=True):
        assert (f.shape, f.stride(), f.dtype, f.device) == (r.shape, r.stride(), r.dtype, r.device)


def _tensors(result):
    return [t for t in (result if isinstance(result, (tuple, list)) else (result,)) if t is not None]


def test_vmap_falls_back_and_is_right():
    """Slow, one sample at a time, but not wrong."""
    name, arguments = SAMPLES[0]
    x = torch.stack([arguments[0], arguments[0] * 2])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = vmap(lambda t: raw(name)(t, *handled(name, arguments)[1:]))(x)
    for ours, one in zip(found, x, strict=True):
        assert same_bits(ours, raw(name)(one, *handled(name, arguments)[1:]))


@every_sample
def test_inputs_are_not_written(name, arguments):
    written = [argument.alias_info is not None for argument in raw(name)._schema.arguments]
    arguments = [torch.zeros_like(a) if w else a for a, w in zip(arguments, written, strict=False)]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with testing.poisoned():
        raw(name)(*handled(name, arguments))
    for a, b, w in zip(arguments, before, written, strict=False):
        assert not isinstance(a, torch.Tensor) or same_bits(a, b) != w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pre_activation_is_what_backward_needs(activation, dtype):
    x, w, b = tensor(9, 17, dtype=dtype), tensor(19, 17, dtype=dtype, seed=1), tensor(19, dtype=dtype, seed=2)
    output, pre = raw("linear_fwd")(x, w, b, ACTIVATION_CODE[activation], True, True)
    linear = torch.nn.functional.linear
    truth, rival = linear(x.double(), w.double(), b.double()), linear(x, w, b)
    assert_within_budget(pre, truth, rival, dtype, policy.FORWARD_FACTOR)
    assert_within_budget(
        output, ACTIVATIONS[activation](truth), ACTIVATIONS[activation](rival), dtype, policy.FORWARD_FACTOR
    )


@pytest.mark.parametrize("mask", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_backward_gives_what_the_mask_asks_for(mask):
    x, w, g = tensor(5, 12), tensor(7, 12, seed=1), tensor(5, 7, seed=2)
    found = raw("linear_bwd")(g, x, w, None, 0, [5, 12], [bool(m) for m in mask], True)
    assert [t is not None for t in found] == [bool(m) for m in mask]


def test_activation_codes_agree():
    """The order in Python is the order in C++: each code computes what its name says."""
    x, eye = tensor(3, 8) * 3, torch.eye(8)
    for name, code in activations.ACTIVATION_CODE.items():
        if name is not None:
            call = activations.ACTIVATIONS[name]
            ours = raw("activation_fwd")(x, None, None, code, False, True)
            assert_within_budget(ours, call(x.double()), call(x), torch.float32, policy.FORWARD_FACTOR, where=name)
    for name, code in ACTIVATION_CODE.items():
        ours = raw("linear_fwd")(x, eye, None, code, False, True)[0]
        rival = ACTIVATIONS[name](x)
        assert_within_budget(
            ours, ACTIVATIONS[name](x.double()), rival, torch.float32, policy.FORWARD_FACTOR, where=name
        )


def test_cases_name_every_raw_operator():
    named = {
        kernel for op in op_names() for case in cases(op) for kernel in (case.forward_kernel, case.backward_kernel)
    }
    by_layers = {  # test_ops_packing.py, test_int8.py, test_block_sparse_int8.py, test_groupwise.py, test_kv_cache.py
        "linear_pack", "linear_int8_pack", "linear_int8_quantize", "linear_groupwise_pack", "linear_groupwise_rows",
        "attention_cache_append", "linear_block_sparse_int8_pack",
    }  # fmt: skip
    assert named - {""} == set(RAW) - by_layers
