"""Attention's CUDA kernels on the emulator: within the policy in any order, moving what is planned."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import SMALL, Case, check_attention
from emulated import Emulated

TYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEDULES = [(order, early) for order in ("forward", "reverse", "random:7") for early in (False, True)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{SMALL.index(case)}")
def test_cases(emulated: Emulated, case: Case, dtype: torch.dtype) -> None:
    check_attention(emulated, case, dtype)


ORDERS = (
    Case((1, 2, 1, 200, 200, 64, 64), causal=True),
    Case((1, 1, 1, 100, 160, 128, 128)),
    Case((1, 1, 1, 70, 100, 256, 256)),
    Case((1, 1, 1, 70, 100, 100, 100), softcap=20.0),
)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("case", ORDERS, ids=lambda case: f"{case.shape[5]}")
def test_orders(emulated: Emulated, case: Case, dtype: torch.dtype) -> None:
    b, h, h_kv, s_q, s_k, d, d_v = case.shape
    draw = lambda *s: torch.randn(*s, generator=torch.Generator().manual_seed(len(s))).to(dtype)  # noqa: E731
    q, k, v, grad = draw(b, h, s_q, d), draw(b, h_kv, s_k, d), draw(b, h_kv, s_k, d_v), draw(b, h, s_q, d_v)
    options = (0.0, 1 / math.sqrt(d), case.softcap, -1, 0 if case.causal else -1)
    first = None
    for schedule in SCHEDULES if dtype == torch.bfloat16 else SCHEDULES[::2]:
        emulated.schedule(*schedule)
        out, lse = emulated.attention_fwd(q, k, v, mask=None, seed=0, options=options)
        grads = emulated.attention_bwd(grad, q, k, v, out, lse, mask=None, seed=0, options=options)
        found = (out, lse, *grads)
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), schedule


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("d", (64, 80, 128, 256))
def test_traffic(emulated: Emulated, d: int, causal: bool) -> None:
    """Forward reads what the formula says, within 2 %; loads take 16 bytes, those of matrices meet no bank twice."""
    q, k, v = (torch.randn(1, 2, 256, d).bfloat16() for _ in range(3))
    options = (0.0, 1 / math.sqrt(d), 0.0, -1, 0 if causal else -1)
    out, lse = emulated.attention_fwd(q, k, v, mask=None, seed=0, options=options)
    counted = emulated.counted()
    general = d not in (64, 128, 256)
    assert counted.loaded == pytest.approx(emulated.attention_traffic(2, 256, 256, d, d, causal, general), rel=0.02)
    assert counted.ldsm > 0 and counted.ldsm_conflicts == 0
    assert counted.wide >= 0.95, f"{counted.wide:.1%} of the bytes in loads of 16 bytes"
    emulated.attention_bwd(torch.randn_like(q), q, k, v, out, lse, mask=None, seed=0, options=options)
    counted = emulated.counted()
    assert counted.ldsm > 0 and counted.ldsm_conflicts == 0
    assert counted.wide >= 0.95, f"{counted.wide:.1%} of the bytes in loads of 16 bytes"


def test_shared_memory(emulated: Emulated) -> None:
    """Every kernel fits the devices with the least shared memory."""
    for features in (64, 128, 256):
        for general in (False, True):
            assert max(emulated.attention_shared(features, general)) <= 99 << 10
