"""Shapes and memory layouts that nobody thought of: drawn at random, the same ones every time."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fastnn import linear, log_softmax, softmax, testing
from fastnn.ops.linear import ACTIVATIONS, linear_reference
from fastnn.testing import Case, find_case, targets
from fastnn.testing.inputs import ARRANGE, fill

SIZES = (0, 1, 1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 33, 47, 49, 65)
FEW, MANY = range(40), range(40, 1500)


def view(draw, shape, dtype, generator):
    """A tensor of that shape that is a random view: permuted, sliced with steps, offset, expanded."""
    order = draw.sample(range(len(shape)), len(shape))
    steps = [draw.choice((1, 1, 2, 3)) for _ in shape]
    margins = [draw.choice((0, 0, 1, 2)) for _ in shape]
    stretched = [draw.random() < 0.12 and size > 0 for size in shape]
    full = [
        (1 if stretched[d] else shape[d]) * steps[d] + margins[d] for d in order
    ]  # the memory behind the view, in permuted order
    base = torch.full(full, float("nan"), dtype=dtype)
    back = base.permute([order.index(d) for d in range(len(shape))])
    for d, size in enumerate(shape):
        length = 1 if stretched[d] else size
        back = back[(slice(None),) * d + (slice(margins[d], margins[d] + length * steps[d], steps[d]),)]
    back.copy_(fill(back.shape, dtype, generator))
    return back.expand(shape)


def random_case(seed):
    """A case of softmax, log_softmax or linear."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        shape = [draw.choice(SIZES) for _ in range(draw.randint(1, 4))]
        while torch.Size(shape).numel() > 60_000:
            shape[draw.randrange(len(shape))] = 2
        dim, log = draw.randrange(-len(shape), len(shape)), draw.random() < 0.5
        ours, theirs = (log_softmax, torch.log_softmax) if log else (softmax, torch.softmax)
        return dataclasses.replace(
            find_case("softmax", "rows"),
            name=f"random {seed}: shape {shape} dim {dim}{' log' if log else ''}",
            make=lambda dtype, generator: {"input": view(random.Random(seed), shape, dtype, generator)},
            call=lambda inputs: ours(inputs["input"], dim),
            reference=lambda inputs: theirs(inputs["input"], dim),
            bites=False,
        )
    return random_linear(seed, draw)


def random_linear(seed, draw):
    lead = [draw.choice((0, 1, 2, 3, 4, 5, 9, 17, 40)) for _ in range(draw.randint(0, 3))]
    k, n = draw.choice(SIZES), draw.choice(SIZES)
    while torch.Size(lead).numel() > 400:
        lead[draw.randrange(len(lead))] = 2
    has_bias, activation = draw.random() < 0.6, draw.choice(list(ACTIVATIONS))

    def make(dtype, generator):
        again = random.Random(seed)
        found = {
            "input": view(again, [*lead, k], dtype, generator),
            "weight": view(again, [n, k], dtype, generator),
        }
        return {**found, "bias": view(again, [n], dtype, generator)} if has_bias else found

    return Case(
        op="linear",
        name=f"random {seed}: input {[*lead, k]} out {n} {activation}{' bias' if has_bias else ''}",
        layout="strided",
        make=make,
        call=lambda i: linear(i["input"], i["weight"], i.get("bias"), activation=activation),
        reference=lambda i: linear_reference(i["input"], i["weight"], i.get("bias"), activation),
        forward_kernel="linear_fwd",
        backward_kernel="linear_bwd",
        differentiable=("input", "weight", "bias") if has_bias else ("input", "weight"),
        bites=False,
    )


def check(seed, target):
    case = random_case(seed)
    draw = random.Random(seed)
    dtype = draw.choice(target.dtypes)
    grad_layout = draw.choice(sorted(ARRANGE))
    if grad_layout == "expanded" and "dim" in case.name:
        grad_layout = "strided"  # equal along the softmax, it has gradient 0: rounding noise against rounding noise
    testing.check(case, dtype, target, seed=seed, grad_layout=grad_layout)


@pytest.mark.parametrize("target", targets(), ids=str)
@pytest.mark.parametrize("seed", FEW)
def test_random(seed, target):
    check(seed, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", targets(), ids=str)
def test_many_random(target):
    for seed in MANY:
        check(seed, target)
