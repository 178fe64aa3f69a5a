"""Options of cross_entropy and attention in combinations drawn at random: torch's result within the policy, or refused.

2,000 combinations, and 200 more of attention over sequences (4,000 in the slow run), of shapes, types, memory orders,
instruction sets and options, the same ones every time. Truth is torch in float64, the rival torch in the tested type:
its own op where that has the options, else composed of its ops.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F

from fastnn import (
    KVCache,
    attention_varlen,
    attention_with_kv_cache,
    cross_entropy,
    scaled_dot_product_attention,
    testing,
)
from fastnn.ops.attention import dropout_mask
from fastnn.ops.cross_entropy import LossOptions, cross_entropy_reference
from fastnn.testing import assert_within_budget, policy
from fastnn.testing.inputs import arrange

CHUNK = 50
TYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Drawn:
    """One combination: tensors by name, the two calls, and whether it must be refused."""

    tensors: dict
    differentiable: tuple
    ours: object
    theirs: object
    refused: str = ""


def normal(draw, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))


def uniform(draw, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))


def arranged(draw, t):
    """The same values in another memory order."""
    kind = draw.choice(("", "", "strided", "offset", "padded_rows", "transposed"))
    return arrange(t, kind)


# ---- cross-entropy


def draw_loss(draw):
    dtype = draw.choice(TYPES)
    classes, rows = draw.choice((1, 2, 3, 7, 16, 17, 33, 64, 100, 1000)), draw.choice((0, 1, 2, 5, 33))
    inner = draw.choice(((), (), (), (3,), (2, 4)))
    shape = (classes,) if draw.random() < 0.1 else (rows, classes, *inner)
    class_dim, per_row = (1, (shape[0], *shape[2:])) if len(shape) > 1 else (0, ())
    tensors = {"input": arranged(draw, normal(draw, *shape).to(dtype))}
    refused, ignored = "", -100
    if draw.random() < 0.3:
        shares = torch.softmax(normal(draw, *shape), class_dim)
        tensors["target"] = arranged(draw, shares.to(dtype))
        if draw.random() < 0.05:
            ignored, refused = 0, "ignore_index"
    else:
        ignored = draw.choice((-100, -100, 0, classes - 1, -1))
        target = (uniform(draw, *per_row) * classes).long()
        if draw.random() < 0.5:
            target = torch.where(uniform(draw, *per_row) < 0.3, ignored, target)
        if draw.random() < 0.04 and target.numel():
            target.view(-1)[-1], refused = classes, str(classes)
            refused = "" if ignored == classes else refused
        tensors["target"] = arranged(draw, target)
    if draw.random() < 0.4:
        tensors["weight"] = arranged(draw, (uniform(draw, classes) + 0.1).to(dtype))
    options = LossOptions(
        draw.choice(("mean", "sum", "none")),
        ignored,
        draw.choice((0.0, 0.0, 0.1, 0.9, 1.0)),
        draw.choice((0.0, 0.0, 1e-2)),
        draw.choice((0.0, 0.0, 5.0, 30.0)),
    )
    if draw.random() < 0.02:
        options, refused = options._replace(label_smoothing=1.5), "label_smoothing"

    def ours(input, target, weight=None):
        return cross_entropy(input, target, weight, **options._asdict())

    def theirs(input, target, weight=None):
        return cross_entropy_reference(input, target, weight, options)

    return Drawn(tensors, ("input",), ours, theirs, refused), f"{dtype} {shape} {options}"


# ---- attention


def draw_mask(draw, dtype, b, h, sq, sk):
    shape = draw.choice(((sq, sk), (b, 1, 1, sk), (b, h, sq, sk), (1, h, sq, sk), (1, sk), (sq, 1)))
    visible = uniform(draw, *shape) < 0.7
    kind = draw.choice(("bool", "additive", "blocked"))
    if kind == "bool":
        return arranged(draw, visible)
    values = normal(draw, *shape).to(dtype)
    return arranged(draw, values if kind == "additive" else values.masked_fill(~visible, -math.inf))


def draw_operands(draw, dtype):
    d = draw.choice((1, 3, 8, 16, 17, 32, 64))
    dv = d if draw.random() < 0.8 else draw.choice((1, 5, 33))
    sq, sk = draw.choice((1, 2, 4, 7, 16, 49, 60)), draw.choice((1, 3, 5, 16, 60, 97, 110))
    sk = sq if draw.random() < 0.4 else sk
    b, hk, group = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 1, 3))
    inside = draw.random() < 0.4

    def heads(h, s, features):
        values = normal(draw, b, h, s, features).to(dtype)
        return values.transpose(1, 2).contiguous().transpose(1, 2) if inside else arranged(draw, values)

    return heads(hk * group, sq, d), heads(hk, sk, d), heads(hk, sk, dv)


def compose(query, key, value, mask, scale, causal, window, cap, dropout, seed, position=0, first_draw=0):
    """What one writes in torch for the options that its own op lacks: in the type of the operands throughout.

    Query i stands at key position + i; dropout's first counter is `first_draw`.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    left, right = window or (-1, -1)
    right = 0 if causal else right
    ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    visible = ones.triu(position - left) if left >= 0 else ones
    visible = visible & (ones.tril(position + right) if right >= 0 else ones)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~visible, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    if seed is not None:
        weights = weights * dropout_mask(tuple(weights.shape), seed, dropout, first=first_draw) / (1 - dropout)
    return weights @ value


def draw_attention(draw):
    dtype = draw.choice(TYPES)
    q, k, v = draw_operands(draw, dtype)
    (b, h, sq, d), (_, hk, sk, _) = q.shape, k.shape
    tensors, refused = {"query": q, "key": k, "value": v}, ""
    if draw.random() < 0.5:
        tensors["attn_mask"] = draw_mask(draw, dtype, b, h, sq, sk)
    causal = draw.random() < 0.3
    window = draw_window(draw)
    cap, dropout = draw.choice((0.0, 0.0, 0.0, 5.0, 30.0)), draw.choice((0.0, 0.0, 0.0, 0.3))
    scale, gqa, seed = draw.choice((None, None, 0.5)), h != hk, draw.randrange(2**31)
    if draw.random() < 0.02:
        dropout, refused = 1.0, "dropout_p"
    elif draw.random() < 0.02 and gqa and hk > 1:
        gqa, refused = False, "heads"
    elif draw.random() < 0.02:
        window, refused = (-3, 1), "window"
    given = {"is_causal": causal, "scale": scale, "enable_gqa": gqa}

    def ours(query, key, value, attn_mask=None):
        torch.manual_seed(seed)
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout, **given, window=window, softcap=cap)

    def composed(query, key, value, attn_mask=None):
        torch.manual_seed(seed)
        drawn = torch.randint(0, 2**62, ()) if dropout else None
        return compose(query, key, value, attn_mask, scale or 1 / math.sqrt(d), causal, window, cap, dropout, drawn)

    def torchs(query, key, value, attn_mask=None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, **given)

    torch_has_it = window is None and not cap and not dropout and not (causal and "attn_mask" in tensors)
    theirs = torchs if torch_has_it else composed
    text = (
        f"{dtype} {tuple(q.shape)} {tuple(k.shape)} {tuple(v.shape)} {given} window {window} cap {cap} drop {dropout}"
    )
    # Of the one key that is seen the gradients of query and key are zero, and close to it where few are: noise.
    few = sq < 4 or sk < 5 or window == (0, 0)
    return Drawn(tensors, ("value",) if few else ("query", "key", "value"), ours, theirs, refused), text


# ---- attention over sequences


def draw_window(draw):
    return draw.choice((None, None, None, (0, 0), (5, -1), (-1, 3), (20, 4)))


def draw_varlen(draw):
    dtype, sequences = draw.choice(TYPES), draw.choice((1, 1, 2, 4))
    queries = [draw.choice((0, 1, 2, 7, 8, 9, 16, 49, 60)) for _ in range(sequences)]
    keys = [n if draw.random() < 0.5 else draw.choice((0, 1, 3, 16, 60, 97, 110)) for n in queries]
    hk, group, d = draw.choice((1, 2)), draw.choice((1, 1, 3)), draw.choice((1, 3, 8, 16, 17, 32, 64))
    dv = d if draw.random() < 0.8 else draw.choice((1, 5, 33))
    ends = {"cu_seqlens_q": queries, "cu_seqlens_k": keys}
    bounds = {name: torch.tensor([0, *lengths]).cumsum(0) for name, lengths in ends.items()}
    refused = ""
    if draw.random() < 0.04:
        refused = draw.choice(tuple(ends))
        bounds[refused][-1] += draw.choice((-1, 1))
    shapes = {"query": (sum(queries), hk * group, d), "key": (sum(keys), hk, d), "value": (sum(keys), hk, dv)}
    tensors = {name: arranged(draw, normal(draw, *shape).to(dtype)) for name, shape in shapes.items()}
    causal, window, cap = draw.random() < 0.5, draw_window(draw), draw.choice((0.0, 0.0, 5.0))
    dropout, scale, seed = draw.choice((0.0, 0.0, 0.3)), draw.choice((None, None, 0.5)), draw.randrange(2**31)

    def ours(query, key, value, cu_seqlens_q, cu_seqlens_k):
        torch.manual_seed(seed)
        options = {"dropout_p": dropout, "is_causal": causal, "scale": scale, "window": window, "softcap": cap}
        return attention_varlen(query, key, value, cu_seqlens_q.to(draw_type), cu_seqlens_k.to(draw_type), **options)

    def theirs(query, key, value, cu_seqlens_q, cu_seqlens_k):
        torch.manual_seed(seed)
        drawn = torch.randint(0, 2**62, ()) if dropout else None
        heads = [t.transpose(0, 1)[None] for t in (query, key, value)]
        parts = zip(*(t.split(n, 2) for t, n in zip(heads, (queries, keys, keys), strict=True)), strict=True)
        found, first = [], 0
        for q, k, v in parts:
            n, m = q.shape[2], k.shape[2]
            options = (None, scale or 1 / math.sqrt(d), causal, window, cap, dropout, drawn, m - n, first)
            found.append(compose(q, k, v, *options) if m else q.new_zeros(*q.shape[:3], dv))
            first += q.shape[1] * n * ((m + 3) // 4)
        return torch.cat(found, 2)[0].transpose(0, 1) + 0 * (query.sum() + key.sum() + value.sum())

    draw_type = draw.choice((torch.int32, torch.int64))
    pairs = tuple(zip(queries, keys, strict=True))
    few = window == (0, 0) or any(0 < n < 4 or 0 < m < 5 or (causal and n > m) for n, m in pairs)
    wanted = ("value",) if few else ("query", "key", "value")
    text = f"{dtype} {queries} {keys} {shapes} causal {causal} window {window} cap {cap} drop {dropout} scale {scale}"
    return Drawn({**tensors, **bounds}, wanted, ours, theirs, refused), text


def draw_cached(draw):
    dtype, new = draw.choice(TYPES), draw.choice((1, 1, 1, 2, 5, 8, 9, 50))
    before = [draw.choice((0, 1, 5, 17, 64, 255, 300, 1100)) for _ in range(draw.choice((1, 2, 3)))]
    hk, group, d = draw.choice((1, 2)), draw.choice((1, 2, 4, 7)), draw.choice((1, 3, 8, 17, 32, 40, 64, 128))
    dv = d if draw.random() < 0.7 else draw.choice((1, 33, 80))
    room, longest = draw.choice((0, 3)), max(before) + new
    tensors = {
        "query": arranged(draw, normal(draw, len(before), hk * group, new, d).to(dtype)),
        "key": arranged(draw, normal(draw, len(before), hk, new, d).to(dtype)),
        "value": arranged(draw, normal(draw, len(before), hk, new, dv).to(dtype)),
        "key_cache": normal(draw, len(before), hk, longest + room, d).to(dtype),
        "value_cache": normal(draw, len(before), hk, longest + room, dv).to(dtype),
    }
    for i, length in enumerate(before):
        tensors["key_cache"][i, :, length:] = tensors["value_cache"][i, :, length:] = math.nan
    refused = "room" if not room and draw.random() < 0.2 else ""
    own, causal, window = draw.random() < 0.5, draw.random() < 0.7, draw_window(draw)
    cap, scale = draw.choice((0.0, 0.0, 5.0)), draw.choice((None, None, 0.5))
    lengths = torch.tensor(before) + (1 if refused else 0)

    def ours(query, key, value, key_cache, value_cache):
        options = {"is_causal": causal, "scale": scale, "window": window, "softcap": cap}
        keys, values = key_cache.clone(), value_cache.clone()
        if not own:
            return attention_with_kv_cache(query, key, value, (keys, values), lengths=lengths, **options)
        cache = KVCache(*keys.shape, value_dim=dv, dtype=keys.dtype)
        cache.append(keys[:, :, : int(lengths.max())], values[:, :, : int(lengths.max())])
        cache.truncate(lengths)
        return attention_with_kv_cache(query, key, value, cache, **options)

    def theirs(query, key, value, key_cache, value_cache):
        found = []
        for i, length in enumerate(before):
            keys, values = (
                torch.cat((old[i : i + 1, :, :length], t[i : i + 1]), 2)
                for old, t in ((key_cache, key), (value_cache, value))
            )
            options = (None, scale or 1 / math.sqrt(d), causal, window, cap, 0.0, None, length)
            found.append(compose(query[i : i + 1], keys, values, *options))
        return torch.cat(found)

    text = f"{dtype} {before} + {new} heads {hk} x {group} d {d} {dv} {own} causal {causal} window {window} cap {cap}"
    return Drawn(tensors, (), ours, theirs, refused), text


# ---- the judge


def results(call, tensors, differentiable, dtype=None, grad=None):
    """Output and gradients, and the grad_output that made them."""
    leaves = {}
    for name, t in tensors.items():
        t = t.to(dtype) if dtype is not None and t.is_floating_point() else t
        leaves[name] = t.detach().requires_grad_(name in differentiable)
    output = call(**leaves)
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    if not differentiable:
        return [output], grad
    wanted = [leaves[name] for name in differentiable]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad.to(output.dtype))], grad


def judge(drawn, target, where):
    if drawn.refused:
        with pytest.raises((ValueError, IndexError), match=drawn.refused), target.forced():
            drawn.ours(**drawn.tensors)
        return
    with target.forced(), testing.poisoned(), torch.random.fork_rng(devices=[]):
        ours, grad = results(drawn.ours, drawn.tensors, drawn.differentiable)
    with torch.random.fork_rng(devices=[]):
        theirs, _ = results(drawn.theirs, drawn.tensors, drawn.differentiable, grad=grad)
        truth, _ = results(drawn.theirs, drawn.tensors, drawn.differentiable, torch.float64, grad)
    for part, mine, true, rival in zip(("forward", *drawn.differentiable), ours, truth, theirs, strict=True):
        factor = policy.FORWARD_FACTOR if part == "forward" else policy.GRADIENT_FACTOR
        assert_within_budget(mine, true, rival, mine.dtype, factor, where=f"{where} {part}")


def chunks(draw_case, count, of_the_suite):
    """(what draws, first seed) of CHUNK combinations; those beyond `of_the_suite` are for the slow run."""
    for start in range(0, count, CHUNK):
        marks = () if start < of_the_suite else pytest.mark.slow
        yield pytest.param(draw_case, start, id=f"{draw_case.__name__}-{start}", marks=marks)


@pytest.mark.parametrize(
    ("draw_case", "start"),
    [
        *chunks(draw_loss, 1000, 1000),
        *chunks(draw_attention, 1000, 1000),
        *chunks(draw_varlen, 2000, 100),
        *chunks(draw_cached, 2000, 100),
    ],
)
def test_options_in_any_combination(draw_case, start):
    kernels = [target for target in testing.targets() if target.isa] or [testing.REFERENCE]
    for seed in range(start, start + CHUNK):
        draw = random.Random(seed)
        drawn, text = draw_case(draw)
        target = draw.choice(kernels)
        judge(drawn, target, f"{draw_case.__name__} {seed} on {target}: {text}")
