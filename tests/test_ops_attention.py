"""Attention beyond the matrix: dropout, logsumexp, the mask's gradient, rows that see nothing, in-place changes."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn import scaled_dot_product_attention as attention
from fastnn import testing
from fastnn.ops.attention import dropout_mask, philox
from fastnn.testing import assert_within_budget, find_case, policy, same_bits, targets

KERNELS = [target for target in targets() if target.isa]
every_target = pytest.mark.parametrize("target", targets(), ids=str)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(b=2, h=2, sq=50, sk=101, d=8):
    return tensor(b, h, sq, d), tensor(b, h, sk, d, seed=1), tensor(b, h, sk, d, seed=2)


def seeded(call, seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return call()


def drawn(seed=3):
    """The seed that a call under `seeded` draws."""
    return seeded(lambda: torch.randint(0, 2**62, ()), seed)


class TestPhilox:
    """Philox4x32-10 against the known answers of Random123 (kat_vectors)."""

    @staticmethod
    def rounds(counter, key):
        """Written for a counter of four words: the library's has the upper two zero."""
        (c0, c1, c2, c3), (k0, k1), low = counter, key, 0xFFFFFFFF
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
        return [c0, c1, c2, c3]

    def test_zeros(self):
        found = philox(torch.tensor(0), torch.tensor([0]))[0].tolist()
        assert found == self.rounds([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]

    def test_ones_and_digits_of_pi(self):
        """The formula itself, where the counter has all four words."""
        ones = 0xFFFFFFFF
        assert self.rounds([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
        counter, key = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
        assert self.rounds(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]

    @pytest.mark.parametrize("seed", [1, 2**31, 2**32 - 1, 2**32, 2**61 + 12345, 2**62 - 1])
    def test_any_counter_and_key(self, seed):
        counters = [0, 1, 2**16, 2**31 + 7, 2**32 - 1, 2**32, 2**40 + 99]
        found = philox(torch.tensor(seed), torch.tensor(counters)).tolist()
        words = [[c & 0xFFFFFFFF, c >> 32, 0, 0] for c in counters]
        assert found == [self.rounds(w, [seed & 0xFFFFFFFF, seed >> 32]) for w in words]


def weights(sq, sk, probability, h=2, b=2, threads=1):
    """The attention weights themselves, one key's feature each: uniform but for what is dropped."""
    q, k = torch.zeros(b, h, sq, 4), torch.zeros(b, h, sk, 4)
    torch.set_num_threads(threads)
    try:
        return seeded(lambda: attention(q, k, torch.eye(sk).expand(b, h, sk, sk), dropout_p=probability))
    finally:
        torch.set_num_threads(1)


class TestDropout:
    @every_target
    @pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
    def test_mask_is_the_stated_function_of_seed_and_position(self, target, probability):
        for sq, sk in ((49, 97), (5, 3), (1, 200)):
            with target.forced():
                kept = weights(sq, sk, probability) != 0
            assert torch.equal(kept, dropout_mask((2, 2, sq, sk), drawn(), probability))

    @every_target
    def test_windows_leave_the_mask_where_it_is(self, target):
        """Blocks of keys that begin in the middle of a counter's four."""
        q, k = torch.zeros(1, 1, 150, 4), torch.zeros(1, 1, 150, 4)
        for left in (1, 2, 3, 53):
            call = functools.partial(attention, q, k, torch.eye(150)[None, None], dropout_p=0.5, window=(left, 60))
            with target.forced():
                kept = seeded(call)[0, 0] != 0
            near = torch.ones(150, 150, dtype=torch.bool).triu(-left).tril(60)
            assert torch.equal(kept, near & dropout_mask((1, 1, 150, 150), drawn(), 0.5)[0, 0])

    @every_target
    def test_fraction_kept_and_scale(self, target):
        with target.forced():
            found = weights(100, 250, 0.3)
        kept = found != 0
        assert abs(kept.double().mean().item() - 0.7) < 0.01
        assert ((found[kept] * 250 * 0.7 - 1).abs() < policy.FLOOR[torch.float32] * 10).all()
        for dim in range(4):  # no row, column or head has it all
            others = [d for d in range(4) if d != dim]
            assert (kept.double().mean(others) - 0.7).abs().max() < 0.2

    @pytest.mark.parametrize("target", KERNELS, ids=str)
    def test_mask_is_the_same_for_any_number_of_threads(self, target):
        with target.forced():
            first, *others = [weights(130, 97, 0.3, threads=threads) for threads in (1, 2, 3)]
        assert all(same_bits(first, other) for other in others)

    def test_next_call_differs_and_manual_seed_reproduces(self):
        def both():
            return [attention(*operands(), dropout_p=0.4) for _ in range(2)]

        first, again = seeded(both), seeded(both)
        assert not same_bits(*first) and all(same_bits(a, b) for a, b in zip(first, again, strict=True))
        assert not same_bits(first[0], seeded(both, 4)[0])

    def test_without_dropout_the_generator_is_left_alone(self):
        before = torch.get_rng_state()
        attention(*operands())
        assert torch.equal(torch.get_rng_state(), before)

    @every_target
    def test_backward_drops_what_forward_dropped(self, target):
        """In a group of heads with a mask, a window and a cap, over several tiles: against the formula in float64."""
        case = find_case("attention", "everything")
        for dtype in ("fp32", "bf16"):
            testing.check(case, dtype, target)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint_replays_the_mask(self, reentrant):
        def run(wrap):
            torch.manual_seed(7)
            leaves = [t.requires_grad_() for t in operands()]
            out = wrap(functools.partial(attention, dropout_p=0.4), *leaves)
            torch.rand(3)  # the generator has moved on when backward recomputes
            out.backward(torch.ones_like(out))
            return [out, *(leaf.grad for leaf in leaves)]

        with torch.random.fork_rng(devices=[]):
            plain = run(lambda function, *leaves: function(*leaves))
            replayed = run(lambda function, *leaves: checkpoint(function, *leaves, use_reentrant=reentrant))
        assert all(same_bits(a, b) for a, b in zip(plain, replayed, strict=True))

    def test_retained_graph_keeps_its_mask(self):
        leaves = [t.requires_grad_() for t in operands()]
        out = attention(*leaves, dropout_p=0.4)
        first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        attention(*leaves, dropout_p=0.4)
        second = torch.autograd.grad(out.sum(), leaves)
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_few_queries_weigh_in_backward_as_in_forward(target, dtype):
    """Scores so large that each query sees one key, and that two ways of adding one up differ by e^0.1 and more."""
    draw = torch.Generator().manual_seed(3)
    large = 100.0 if dtype == torch.float16 else 3000.0
    q, k = (large * torch.randn(1, heads, n, 128, generator=draw) for heads, n in ((6, 1), (1, 300)))
    v, grad = torch.randn(1, 1, 300, 16, generator=draw), torch.randn(1, 6, 1, 16, generator=draw)
    q, k, v, grad = (t.to(dtype) for t in (q, k, v, grad))
    v.requires_grad_()
    with target.forced():
        out = attention(q, k, v, enable_gqa=True)
        (found,) = torch.autograd.grad(out, v, grad)
    seen = (q.double() @ k.double().mT).argmax(-1)[0, :, 0]
    assert torch.equal(out[0, :, 0], v[0, 0, seen])
    expected = torch.zeros(300, 16).index_add_(0, seen, grad[0, :, 0].float()).to(dtype)
    assert torch.allclose(found[0, 0].float(), expected.float(), rtol=2e-2, atol=1e-3)


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logsumexp(target, dtype):
    q, k, v = (t.to(dtype) for t in operands())
    mask = torch.rand(50, 101, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[7] = False
    with target.forced():
        out, lse = attention(q, k, v, mask, return_lse=True)
    scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(~mask, float("-inf"))
    truth = torch.logsumexp(scores, -1)
    assert lse.dtype == torch.float32 and lse.isposinf().nonzero()[:, 2].unique().tolist() == [7]
    seen = lse.isfinite()
    rival = torch.logsumexp(scores.float(), -1)
    assert_within_budget(lse[seen], truth[seen], rival[seen], torch.float32, policy.FORWARD_FACTOR)
    assert not out[:, :, 7].any()
    for shape in ((50, 8), (2, 50, 8)):
        assert attention(*[torch.ones(shape)] * 3, return_lse=True)[1].shape == shape[:-1]


def test_logsumexp_is_not_differentiable():
    leaves = [t.requires_grad_() for t in operands()]
    for backend in ("reference", None):
        with fastnn.use_backend(backend):
            out, lse = attention(*leaves, return_lse=True)
        assert out.requires_grad and not lse.requires_grad


@every_target
def test_windows_that_begin_at_any_key(target):
    """Even and odd first keys of the second tile of queries, windows of a few keys: no pair of keys is split."""
    for dtype, left in itertools.product((torch.float32, torch.bfloat16), (0, 1, 2, 13, 20, 47)):
        leaves = [t.to(dtype).requires_grad_() for t in operands(b=1, sq=100, sk=110)]
        grad = tensor(1, 2, 100, 8, seed=4).to(dtype)
        distance = torch.arange(110) - torch.arange(100)[:, None]
        mask = (distance >= -left) & (distance <= 5)

        def results(call, wide=torch.float64, leaves=leaves, grad=grad):
            used = [leaf.detach().to(wide).requires_grad_() for leaf in leaves]
            out = call(*used)
            return [out, *torch.autograd.grad(out, used, grad.to(wide))]

        with target.forced():
            ours = results(functools.partial(attention, window=(left, 5)), dtype)
        torch_call = functools.partial(F.scaled_dot_product_attention, attn_mask=mask)
        truths, rivals = results(torch_call), results(torch_call, dtype)
        for name, mine, truth, rival in zip(("output", "q", "k", "v"), ours, truths, rivals, strict=True):
            factor = policy.FORWARD_FACTOR if name == "output" else policy.GRADIENT_FACTOR
            assert_within_budget(mine, truth, rival, dtype, factor, where=f"window ({left}, 5) {dtype} {name}")


@every_target
@pytest.mark.parametrize("sq", [6, 60])
def test_query_that_sees_nothing(target, sq):
    """Zeros and zero gradients, as torch; NaN nowhere. Few queries and many have kernels of their own."""
    leaves = [t.requires_grad_() for t in operands(sq=sq, sk=9)]
    mask = torch.ones(sq, 9, dtype=torch.bool)
    mask[1], mask[4] = False, False
    for given in (mask, torch.zeros(sq, 9).masked_fill(~mask, float("-inf"))):
        with target.forced():
            out = attention(*leaves, given)
            found = torch.autograd.grad(out, leaves, torch.ones_like(out))
        rival = F.scaled_dot_product_attention(*leaves, given)
        truth = F.scaled_dot_product_attention(*(t.double() for t in leaves), given)
        assert_within_budget(out, truth, rival, torch.float32, policy.FORWARD_FACTOR)
        assert not out[:, :, [1, 4]].any() and not found[0][:, :, [1, 4]].any()
        assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("shape", [(50, 101), (2, 1, 1, 101), (1, 2, 50, 101), (50, 1)])
def test_gradient_of_the_mask(shape):
    """The reference's, in plain PyTorch."""
    mask = tensor(*shape, seed=5)

    def gradients(call, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (*operands(), mask)]
        out = call(*leaves)
        return torch.autograd.grad(out, leaves[3] if shape[-1] > 1 else leaves[2], out.detach())[0]

    ours, rival = gradients(attention, torch.float32), gradients(F.scaled_dot_product_attention, torch.float32)
    truth = gradients(F.scaled_dot_product_attention, torch.float64)
    assert_within_budget(ours, truth, rival, torch.float32, policy.GRADIENT_FACTOR)


def test_what_only_the_reference_can_run_is_refused_where_a_backend_is_forced(extension):
    mask = torch.zeros(50, 101, requires_grad=True)
    with fastnn.use_backend("cpu"):
        with pytest.raises(NotImplementedError, match=r"attention.*attn_mask requires grad"):
            attention(*operands(), mask)
        with pytest.raises(NotImplementedError, match=r"attention.*attn_mask is float64"):
            attention(*operands(), mask.detach().double())
        with torch.no_grad():
            attention(*operands(), mask)


@pytest.mark.parametrize("changed", ["query", "key", "value", "attn_mask", "output"])
def test_in_place_change_before_backward(changed):
    names = ("query", "key", "value")
    tensors = {name: t.requires_grad_() for name, t in zip(names, operands(), strict=True)}
    tensors["attn_mask"] = torch.zeros(50, 101)
    out = attention(**tensors)
    with torch.no_grad():
        (out if changed == "output" else tensors[changed]).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_target
def test_one_tensor_in_all_roles(target):
    def gradient(call, dtype):
        t = tensor(1, 2, 30, 8).to(dtype).requires_grad_()
        return torch.autograd.grad(call(t, t, t), t, tensor(1, 2, 30, 8, seed=1).to(dtype))[0]

    with target.forced():
        ours = gradient(attention, torch.float32)
    theirs = functools.partial(gradient, F.scaled_dot_product_attention)
    assert_within_budget(ours, theirs(torch.float64), theirs(torch.float32), torch.float32, policy.GRADIENT_FACTOR)


@every_target
def test_heads_and_queries_do_not_affect_each_other(target):
    q, k, v = operands(sk=50)
    spoilt = [t.clone() for t in (q, k, v)]
    for t in spoilt:
        t[0, 1], t[1] = float("nan"), float("inf")
    spoilt[0][0, 0, 1:] = float("nan")
    with target.forced(), testing.poisoned():
        clean, alone = attention(q, k, v), attention(*spoilt)
    assert same_bits(clean[0, 0, 0], alone[0, 0, 0])
    assert alone[0, 0, 1:].isnan().all() and alone[0, 1].isnan().all()


@pytest.mark.parametrize("layout", ["heads outside", "heads inside"])
def test_output_is_laid_out_as_the_query(layout):
    q, k, v = operands()
    if layout == "heads inside":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    for backend in (None, *(["cpu"] if KERNELS else [])):
        with fastnn.use_backend(backend):
            out = attention(q, k, v)
        assert (out.transpose(1, 2) if layout == "heads inside" and KERNELS else out).is_contiguous()
    expected = attention(*operands())
    assert same_bits(out.contiguous(), expected)


@pytest.mark.parametrize(
    ("shapes", "result"),
    [
        (((5, 8), (2, 3, 9, 8), (2, 3, 9, 8)), (2, 3, 5, 8)),
        (((1, 3, 5, 8), (4, 3, 9, 8), (4, 3, 9, 8)), (4, 3, 5, 8)),
        (((4, 3, 5, 8), (1, 1, 9, 8), (1, 1, 9, 8)), (4, 3, 5, 8)),
        (((2, 1, 3, 5, 8), (4, 3, 9, 8), (4, 3, 9, 8)), (2, 4, 3, 5, 8)),
        (((3, 5, 8), (9, 8), (9, 8)), (3, 5, 8)),
    ],
)
def test_batches_and_heads_broadcast(shapes, result):
    q, k, v = (tensor(*shape, seed=index) for index, shape in enumerate(shapes))
    ours = attention(q, k, v)
    assert ours.shape == result
    full = [t.expand(*result[:-2], *t.shape[-2:]) for t in (q, k, v)]
    truth = F.scaled_dot_product_attention(*(t.double() for t in full))
    assert_within_budget(ours, truth, F.scaled_dot_product_attention(*full), torch.float32, policy.FORWARD_FACTOR)
