"""Linear's CUDA kernels on the emulator: within the policy in any order, moving what is planned."""

from __future__ import annotations

import pytest
import torch
from emulated import FLOAT_LARGE, FLOAT_SMALL, LARGE, MEDIUM, PLAIN, SMALL_TILE, Emulated
from linear_cases import SMALL, check_linear

from fastnn.ops.linear import ACTIVATION_CODE

TYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = tuple(ACTIVATION_CODE)
SCHEDULES = [(order, early) for order in ("forward", "reverse", "random:7") for early in (False, True)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cases(emulated: Emulated, case: tuple[int, int, int, str], dtype: torch.dtype) -> None:
    at = SMALL.index(case) + TYPES.index(dtype)
    check_linear(emulated, case[:3], case[3], dtype, ACTIVATIONS[at % 7], has_bias=at % 4 != 0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_activations(emulated: Emulated, activation: str | None, dtype: torch.dtype) -> None:
    check_linear(emulated, (24, 40, 32), "plain", dtype, activation)


# A device and a shape for which the policy takes each kernel, with the depth whole and split.
TILES = {
    "large": (LARGE, (128, 256, 1728), 1, 1),
    "medium": (MEDIUM, (256, 128, 320), 1, 1),
    "small": (SMALL_TILE, (64, 128, 192), 4, 1),
    "small, split": (SMALL_TILE, (64, 64, 1536), 132, 5),
    "plain": (PLAIN, (70, 65, 130), 4, 1),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", TILES)
def test_orders(emulated: Emulated, name: str, schedule: tuple[str, bool]) -> None:
    tile, shape, sms, _ = TILES[name]
    emulated.device(90, sms)
    m, n, k = shape
    plan = emulated.plan(m, n, k, aligned=tile != PLAIN, sms=sms)
    assert plan.tile == tile, plan
    if schedule == SCHEDULES[0]:
        check_linear(emulated, shape, "plain", torch.bfloat16, "gelu")
        return
    draw = lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(1)).bfloat16()  # noqa: E731
    x, w = draw(m, k), draw(n, k)
    expected, _ = emulated.linear_fwd(x, w, None, 0, False)
    emulated.schedule(*schedule)
    found, _ = emulated.linear_fwd(x, w, None, 0, False)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", [name for name in TILES if name != "plain"])
def test_traffic(emulated: Emulated, name: str) -> None:
    """Tensor-core kernels read what the plan says (2 %), 16 bytes at a time; matrix loads meet no bank twice."""
    tile, (m, n, k), sms, splits = TILES[name]
    emulated.device(90, sms)
    plan = emulated.plan(m, n, k, sms=sms)
    assert (plan.tile, plan.splits > 1) == (tile, splits > 1), plan
    draw = lambda *s: torch.randn(*s).bfloat16()  # noqa: E731
    emulated.counted()
    emulated.linear_fwd(draw(m, k), draw(n, k), None, 0, False)
    counted = emulated.counted()
    partial = plan.splits * m * n * 4 if plan.splits > 1 else 0
    assert counted.loaded == pytest.approx(plan.traffic + partial, rel=0.02)
    assert counted.wide >= 0.95, f"{counted.wide:.1%} of the bytes in loads of 16 bytes"
    assert counted.mma == m * n * k // (16 * 8 * 16)
    assert counted.ldsm > 0 and counted.ldsm_conflicts == 0


def test_gradients_without_conflicts(emulated: Emulated) -> None:
    """Operands that lie across are read by transposing matrix loads, without conflicts and 16 bytes at a time too."""
    for shape, sms in (((128, 1728, 256), 1), ((1728, 128, 256), 1), ((64, 64, 64), 4)):
        emulated.device(90, sms)
        m, n, k = shape
        draw = lambda *s: torch.randn(*s).bfloat16()  # noqa: E731
        emulated.linear_bwd(draw(m, n), draw(m, k), draw(n, k), None, 0, (True, True, False))
        counted = emulated.counted()
        assert counted.ldsm > 0 and counted.ldsm_conflicts == 0
        assert counted.wide >= 0.95, f"{counted.wide:.1%} of the bytes in loads of 16 bytes"


@pytest.mark.parametrize("arch", (80, 86, 89, 90, 100, 120))
def test_policy(emulated: Emulated, arch: int) -> None:
    """Every plan fits the device and covers the product; large tiles only where they fit."""
    most = 163 << 10 if arch == 80 else 227 << 10 if arch in (90, 100) else 99 << 10
    seen = set()
    for m, n, k in [
        (1, 1, 0),
        (1, 8192, 8192),
        (16, 4096, 4096),
        (512, 4096, 4096),
        (8192, 8192, 8192),
        (100, 7, 10**6),
    ]:
        for float32, aligned in ((False, True), (False, False), (True, True)):
            plan = emulated.plan(m, n, k, float32=float32, aligned=aligned, arch=arch)
            seen.add(plan.tile)
            assert plan.shared <= most and plan.threads in (128, 256)
            assert plan.blocks == -(-m // plan.bm) * -(-n // plan.bn) * plan.splits
            assert plan.splits == 1 or (plan.splits - 1) * plan.split_depth < k <= plan.splits * plan.split_depth
            assert (plan.tile in (FLOAT_LARGE, FLOAT_SMALL)) == float32
    assert (LARGE in seen) == (arch in (80, 90, 100))
    assert emulated.plan(16, 4096, 4096, arch=arch).splits > 1


@pytest.mark.parametrize("shape", ((70, 50, 45), (200, 136, 64), (16, 24, 1032)), ids=str)
def test_tf32(emulated: Emulated, shape: tuple[int, int, int]) -> None:
    """Where it is allowed, operands are rounded to 10 bits and nothing else: exact on such operands, near on others."""
    m, n, k = shape
    draw = lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(len(s) + s[0]))  # noqa: E731
    x, w, dy = draw(m, k), draw(n, k), draw(m, n)
    short = [t.view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32) for t in (x, w, dy)]
    for (a, b, g), bound in (((x, w, dy), 2e-3), (short, 1e-6)):
        y, _ = emulated.linear_fwd(a, b, None, 0, False, tf32=True)
        dx, dw, _ = emulated.linear_bwd(g, a, b, None, 0, (True, True, True), tf32=True)
        for found, left, right in ((y, a, b.t()), (dx, g, b), (dw, g.t(), a)):
            assert found is not None
            truth = left.double() @ right.double()
            error = (found - truth).norm() / truth.norm()
            assert error <= bound
            assert bound < 1e-5 or error > 1e-5  # it was tf32
