"""`KVCache` and attention on it beyond the matrix: what the methods do, threads, compile, autocast, refusals."""

from __future__ import annotations

import random

import pytest
import torch
from operators import tensor

import fastnn
from fastnn import KVCache, attention_varlen, attention_with_kv_cache, record, scaled_dot_product_attention
from fastnn.testing import assert_within_budget, policy, same_bits, targets

every_target = pytest.mark.parametrize("target", targets(), ids=str)
KERNELS = [target for target in targets() if target.isa]


def rows(cache):
    """What each sequence holds."""
    return [
        (cache.keys[b, :, :length].clone(), cache.values[b, :, :length].clone())
        for b, length in enumerate(cache.lengths.tolist())
    ]


def assert_same_rows(cache, expected):
    assert cache.lengths.tolist() == [key.shape[1] for key, _ in expected]
    for (k, v), (key, value) in zip(rows(cache), expected, strict=True):
        assert same_bits(k, key) and same_bits(v, value)


@every_target
@pytest.mark.parametrize("seed", range(4))
def test_methods_do_what_they_say(target, seed):
    """A hundred calls drawn at random, beside a list of tensors for each sequence."""
    draw = random.Random(seed)
    cache = KVCache(3, 2, 4, 5, value_dim=3, grow=True)
    held = [(torch.empty(2, 0, 5), torch.empty(2, 0, 3)) for _ in range(3)]
    with target.forced():
        for step in range(100):
            what = draw.choice(("append", "append", "append", "truncate", "reorder", "reset", "reserve"))
            if what == "append":
                n, b = draw.choice((0, 1, 1, 2, 7)), cache.batch
                key, value = tensor(b, 2, n, 5, seed=step), tensor(b, 2, n, 3, seed=-step)
                cache.append(key, value)
                held = [(torch.cat((k, key[i]), 1), torch.cat((v, value[i]), 1)) for i, (k, v) in enumerate(held)]
            elif what == "truncate":
                one, each = draw.randrange(12), [draw.randrange(12) for _ in held]
                by_one = draw.random() < 0.3
                cache.truncate(one if by_one else torch.tensor(each))
                lengths = [one] * len(held) if by_one else each
                held = [(k[:, :n], v[:, :n]) for (k, v), n in zip(held, lengths, strict=True)]
            elif what == "reorder":
                size = draw.choice((cache.batch, cache.batch, draw.randrange(1, 5)))
                index = [draw.randrange(cache.batch) for _ in range(size)]
                cache.reorder(torch.tensor(index))
                held = [held[i] for i in index]
            elif what == "reset" and draw.random() < 0.2:
                cache.reset()
                held = [(k[:, :0], v[:, :0]) for k, v in held]
            elif what == "reserve":
                cache.reserve(draw.randrange(cache.capacity + 3))
            assert_same_rows(cache, held)


def test_sizes_and_memory():
    cache = KVCache(2, 3, 100, 40, value_dim=24, dtype=torch.bfloat16)
    assert (cache.batch, cache.capacity, cache.dtype, cache.longest) == (2, 100, torch.bfloat16, 0)
    assert cache.keys.shape == (2, 3, 100, 40) and cache.values.shape == (2, 3, 100, 24)
    assert cache.nbytes == 2 * 3 * 100 * (40 + 24) * 2
    assert cache.keys.data_ptr() % 64 == cache.values.data_ptr() % 64 == 0
    assert "KVCache(2, 3, 100, 40, dtype=torch.bfloat16, lengths=[0, 0])" == repr(cache)


def test_growing_doubles_at_least():
    cache = KVCache(1, 1, 4, 2, grow=True)
    capacities = []
    for n in (4, 1, 4, 30):
        cache.append(torch.ones(1, 1, n, 2), torch.ones(1, 1, n, 2))
        capacities.append(cache.capacity)
    assert capacities == [4, 8, 16, 39]


@every_target
def test_a_refused_step_changes_nothing(target):
    cache = KVCache(2, 1, 8, 4)
    cache.append(tensor(2, 1, 6, 4), tensor(2, 1, 6, 4, seed=1))
    cache.truncate(torch.tensor([2, 6]))
    before = (cache.keys.clone(), cache.values.clone(), rows(cache))
    with target.forced():
        for query, more in ((torch.ones(2, 1, 1, 4), 3), (torch.ones(2, 1, 1, 5), 1), (torch.ones(1, 1, 1, 4), 1)):
            with pytest.raises(ValueError, match=r"attention_with_kv_cache|attention_cache_append"):
                attention_with_kv_cache(query, torch.zeros(2, 1, more, 4), torch.zeros(2, 1, more, 4), cache)
    assert_same_rows(cache, before[2])
    assert same_bits(cache.keys, before[0]) and same_bits(cache.values, before[1])


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_by_step_is_causal_attention(target, dtype):
    """A prompt, some tokens at once and one by one: each row of the attention over the whole."""
    q, k, v = (tensor(2, h, 80, 16, dtype=dtype, seed=h) for h in (4, 2, 2))
    truth, rival = (
        torch.nn.functional.scaled_dot_product_attention(
            q.to(d), *(t.to(d).repeat_interleave(2, 1) for t in (k, v)), is_causal=True
        )
        for d in (torch.float64, dtype)
    )
    cache = KVCache(2, 2, 80, 16, dtype=dtype)
    found, at = [], 0
    with target.forced():
        for n in (60, 3, *(1,) * 17):
            found.append(attention_with_kv_cache(*(t[:, :, at : at + n] for t in (q, k, v)), cache))
            at += n
    assert_within_budget(torch.cat(found, 2), truth, rival, dtype, policy.FORWARD_FACTOR)


def long_cache():
    cache = KVCache(2, 2, 2100, 16)
    cache.append(tensor(2, 2, 2100, 16), tensor(2, 2, 2100, 16, seed=1))
    cache.truncate(torch.tensor([2100, 700]))
    return cache


@pytest.mark.parametrize("target", KERNELS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(target):
    """Decoding splits the keys, prompts the queries, sequences of different lengths are taken as threads are free."""
    cache, found = long_cache(), []
    ends = torch.tensor([0, 300, 303, 403])
    q, k = tensor(403, 4, 16), tensor(403, 2, 16, seed=1)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            with target.forced():
                leaves = [t.clone().requires_grad_() for t in (q, k)]
                out = attention_varlen(leaves[0], leaves[1], leaves[1], ends, is_causal=True)
                out.backward(torch.ones_like(out))
                one, many = (attention_with_kv_cache(tensor(2, 4, n, 16), None, None, cache) for n in (1, 100))
                found.append([one, many, out.detach(), *(leaf.grad for leaf in leaves)])
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@every_target
def test_logsumexp_and_queries_that_see_nothing(target):
    """More queries than rows: the first ones stand before the first key."""
    cache = KVCache(2, 1, 8, 4)
    cache.append(tensor(2, 1, 3, 4), tensor(2, 1, 3, 4, seed=1))
    cache.truncate(torch.tensor([3, 0]))
    query = tensor(2, 2, 5, 4, seed=2)
    with target.forced():
        out, lse = attention_with_kv_cache(query, None, None, cache, return_lse=True)
        packed = attention_varlen(
            query.transpose(1, 2).flatten(0, 1),
            cache.keys[0, :, :3].transpose(0, 1),
            cache.values[0, :, :3].transpose(0, 1),
            torch.tensor([0, 5, 10]),
            torch.tensor([0, 3, 3]),
            is_causal=True,
            return_lse=True,
        )
    assert (out[0, :, :2] == 0).all() and (out[1] == 0).all() and (out[0, :, 2:] != 0).any(-1).all()
    assert (lse[0, :, :2] == torch.inf).all() and (lse[1] == torch.inf).all()
    scores = (query[0].double() @ cache.keys[0, :, :3].double().mT * 0.5)[:, 2:]
    seen = scores.masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse[0, :, 2:].double(), torch.logsumexp(seen, -1), rtol=1e-5, atol=1e-6)
    assert same_bits(packed[0].unflatten(0, (2, 5)).transpose(1, 2).contiguous(), out.contiguous())
    assert same_bits(packed[1].unflatten(1, (2, 5)).transpose(0, 1).contiguous(), lse)


def test_kernels_that_run():
    cache = KVCache(1, 1, 3, 4)
    step = [torch.ones(1, 1, 1, 4)] * 3
    with record() as runs:
        attention_with_kv_cache(*step, cache)
    expected = "reference" if not KERNELS else "cpu"
    assert [(run.kernel, run.backend) for run in runs] == [
        ("attention_cache_append", expected),
        ("attention_cache_fwd", expected),
    ]


def test_float64_runs_on_the_reference():
    cache = KVCache(1, 1, 3, 4, dtype=torch.float64)
    step = [torch.ones(1, 1, 1, 4, dtype=torch.float64)] * 3
    assert attention_with_kv_cache(*step, cache).dtype == torch.float64


def test_autocast_takes_the_type_of_the_cache():
    cache = KVCache(1, 1, 8, 4, dtype=torch.bfloat16)
    step = [tensor(1, 1, 2, 4, seed=i) for i in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_with_kv_cache(*step, cache)
        packed = attention_varlen(*(t[0].transpose(0, 1) for t in step), torch.tensor([0, 2]))
    assert out.dtype == packed.dtype == torch.bfloat16
    assert same_bits(cache.keys[:, :, :2], step[1].bfloat16())


def test_inference_mode():
    cache = KVCache(1, 1, 8, 4)
    with torch.inference_mode():
        for n in (2, 1):
            out = attention_with_kv_cache(*[tensor(1, 1, n, 4)] * 3, cache)
    assert cache.lengths.tolist() == [3] and out.shape == (1, 1, 1, 4)


@pytest.mark.usefixtures("extension")
def test_compiles_in_one_graph():
    def step(query, key, value, keys, values, lengths):
        out = attention_with_kv_cache(query, key, value, (keys, values), lengths=lengths, window=(5, -1))
        return out, lengths + key.shape[2]

    def own(query, key, value, cache):
        return attention_with_kv_cache(query, key, value, cache)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    caches = [torch.zeros(2, 2, 32, 8) for _ in range(4)]
    lengths, kept = torch.zeros(2, dtype=torch.int64), [KVCache(2, 2, 32, 8) for _ in range(2)]
    compiled_own = torch.compile(own, backend="aot_eager", fullgraph=True)
    for n in (5, 2, 3):
        new = [tensor(2, h, n, 8, seed=h + n) for h in (4, 2, 2)]
        expected, _ = step(*new, *caches[:2], lengths)
        found, lengths = compiled(*new, *caches[2:], lengths)
        assert same_bits(found, expected)
        assert same_bits(compiled_own(*new, kept[0]), own(*new, kept[1]))
    assert same_bits(caches[0], caches[2]) and same_bits(caches[1], caches[3])
    assert kept[0].lengths.tolist() == [10, 10]
    assert_same_rows(kept[0], rows(kept[1]))
    torch._dynamo.reset()


@pytest.mark.usefixtures("extension")
def test_varlen_compiles_in_one_graph():
    def step(query, key, ends):
        return attention_varlen(query, key, key * 2, ends, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((5, 9), (7, 60), (2, 3)):
        ends = torch.tensor((0, *lengths)).cumsum(0)
        total = int(ends[-1])
        results = []
        for call in (step, compiled):
            leaves = [tensor(total, h, 8, seed=h).requires_grad_() for h in (4, 2)]
            out = call(*leaves, ends)
            out.sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()


@every_target
def test_varlen_is_attention_of_each_sequence(target):
    """The same kernels: bit for bit, where a sequence has as many queries as keys."""
    lengths = (3, 60, 1, 100)
    ends = torch.tensor((0, *lengths)).cumsum(0)
    q, k, v = (tensor(164, 2, 16, seed=i) for i in range(3))
    with target.forced():
        packed = attention_varlen(q, k, v, ends, is_causal=True)
        for begin, length in zip(ends.tolist(), lengths, strict=False):
            alone = [t[None, begin : begin + length].transpose(1, 2) for t in (q, k, v)]
            expected = scaled_dot_product_attention(*alone, is_causal=True)[0].transpose(0, 1)
            assert same_bits(packed[begin : begin + length], expected)


@every_target
def test_varlen_gradients_do_not_cross_sequences(target):
    """The gradient of one sequence's output is zero in every other sequence."""
    ends = torch.tensor([0, 20, 70, 75])
    leaves = [tensor(75, 2, 8, seed=i).requires_grad_() for i in range(3)]
    with target.forced():
        out = attention_varlen(*leaves, ends)
        found = torch.autograd.grad(out[20:70].sum(), leaves)
    for gradient in found:
        assert (gradient[:20] == 0).all() and (gradient[70:] == 0).all()
    assert (found[2][20:70] != 0).all()


@pytest.mark.usefixtures("extension")
def test_varlen_under_functorch_is_refused_or_right():
    q, ends = tensor(10, 2, 8), torch.tensor([0, 4, 10])
    found = torch.func.grad(lambda x: attention_varlen(x, q, q, ends).sum())(q)
    leaf = q.clone().requires_grad_()
    attention_varlen(leaf, q, q, ends).sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-5)


def test_names_are_public():
    assert fastnn.KVCache is KVCache and fastnn.ops.KVCache is KVCache


def test_cache_goes_on_outside_the_mode_it_was_made_in():
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 2, 16)
    with torch.inference_mode():
        cache = KVCache(1, 2, 8, 16)
        attention_with_kv_cache(q, k, k, cache)
        cache.truncate(1)
    with torch.no_grad():
        attention_with_kv_cache(q, k, k, cache)
    cache.reorder(torch.tensor([0]))
    assert cache.lengths.tolist() == [3]
