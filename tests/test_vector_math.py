"""Largest error of exp, log, tanh, erf and sigmoid on every instruction set, over all of float32, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastnn.testing import policy, targets

ISAS = [target.isa for target in targets() if target.isa]
TRUTH = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "erf": torch.special.erf,
    "sigmoid": torch.sigmoid,
}
TINY, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)
SPECIALS = [0.0, -0.0, np.inf, -np.inf, np.nan, TINY, -TINY, 1e-45, -1e-45, LARGEST, -LARGEST, 1.0, -1.0]
# Where e^x overflows, becomes subnormal and vanishes; where tanh, erf and sigmoid become 1.
EDGES = [88.72283, 88.72284, 89.0, -87.33654, -87.33655, -103.27893, -103.97208, -104.0, -105.0, 9.01, 9.1, 4.0, 17.33]


def points(step):
    """Every `step`-th bit pattern of float32, and the neighbourhoods of what is special."""
    patterns = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    special = np.array(SPECIALS + EDGES + [-edge for edge in EDGES], dtype=np.float32).view(np.uint32)
    around = (special[:, None].astype(np.int64) + np.arange(-50, 51)) % 2**32
    return np.concatenate([patterns, around.ravel().astype(np.uint32)]).view(np.float32)


def ulp_of(truth):
    """Spacing of float32 at a float64 value."""
    exponent = np.floor(np.log2(np.maximum(np.abs(truth), TINY)))
    return np.exp2(exponent - 23)


def worst(extension, name, x):
    """Largest error in ulp where the truth is normal, with its argument; largest absolute error where it is not."""
    ours = extension.vector_math(name, x)
    with np.errstate(all="ignore"):
        truth = TRUTH[name](torch.from_numpy(x.astype(np.float64))).numpy()
        rounded = truth.astype(np.float32)
    assert ours.dtype == np.float32 and ours.shape == x.shape
    assert np.array_equal(np.isnan(ours), np.isnan(truth)), f"{name}: NaN out of place"
    near_top = np.abs(truth) > LARGEST * (1 - 2**-22)  # there an infinity is within an ulp
    infinite = np.isinf(rounded) & ~near_top
    assert np.array_equal(ours[infinite], rounded[infinite]), f"{name}: infinity out of place"
    assert np.isfinite(ours[np.isfinite(rounded) & ~near_top]).all(), f"{name}: infinity where a number is"
    finite = np.isfinite(ours) & np.isfinite(truth)
    error = np.where(finite, np.abs(np.where(finite, ours, 0).astype(np.float64) - np.where(finite, truth, 0)), 0)
    normal = np.abs(truth) >= TINY
    ulps = np.where(finite & normal, error / ulp_of(np.where(finite, truth, 1)), 0)
    at = int(ulps.argmax())
    return float(ulps[at]), float(x[at]), float(error[finite & ~normal].max(initial=0.0))


def check(extension, name, isa, step, chunk=2**22):
    before = extension.isa()
    extension.set_isa(isa)
    try:
        x = points(step)
        found = [worst(extension, name, x[i : i + chunk]) for i in range(0, len(x), chunk)]
    finally:
        extension.set_isa(before)
    ulps, at, _ = max(found)
    subnormal = max(absolute for _, _, absolute in found)
    assert ulps <= policy.MAX_ULP[name], f"{name} on {isa}: {ulps:.3f} ulp at {at!r}"
    assert subnormal <= policy.SUBNORMAL_ABS, f"{name} on {isa}: subnormal results are {subnormal:.3g} off"
    return ulps


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", policy.MAX_ULP)
def test_error(name, isa, extension):
    check(extension, name, isa, step=1021)  # a prime: 4.2 million points with all kinds of low bits


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", policy.MAX_ULP)
def test_error_of_sixty_million_points(name, isa, extension):
    check(extension, name, isa, step=67)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", policy.MAX_ULP)
def test_tail_equals_body(name, isa, extension):
    """A value gives the same bits wherever in the array it lies, and no length reads or writes past the end."""
    before = extension.isa()
    extension.set_isa(isa)
    try:
        x = np.random.default_rng(0).normal(size=70).astype(np.float32) * 4
        if name == "log":
            x = np.abs(x)
        whole = extension.vector_math(name, x)
        for length in range(len(x)):
            for start in (0, 1, 3):
                part = extension.vector_math(name, x[start:length].copy())
                assert np.array_equal(part, whole[start:length])
    finally:
        extension.set_isa(before)


@pytest.mark.parametrize("isa", ISAS)
def test_symmetry_and_monotony(isa, extension):
    before = extension.isa()
    extension.set_isa(isa)
    try:
        x = np.linspace(0, 20, 100_001).astype(np.float32)
        for name in ("tanh", "erf"):
            assert np.array_equal(extension.vector_math(name, -x), -extension.vector_math(name, x))
            assert (np.abs(extension.vector_math(name, x)) <= 1).all()
        assert ((extension.vector_math("sigmoid", x) <= 1) & (extension.vector_math("sigmoid", -x) >= 0)).all()
        assert extension.vector_math("exp", np.zeros(1, np.float32))[0] == 1
        assert extension.vector_math("log", np.ones(1, np.float32))[0] == 0
    finally:
        extension.set_isa(before)


def test_unknown_function(extension):
    with pytest.raises(ValueError, match=r"vector_math.*exp, log, tanh, erf.*cosh"):
        extension.vector_math("cosh", np.zeros(3, np.float32))


@pytest.mark.parametrize("bad", ["abc", [object()], {}])
def test_not_an_array(bad, extension):
    with pytest.raises((TypeError, ValueError)):
        extension.vector_math("exp", bad)
