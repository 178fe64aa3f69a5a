"""Linear's launchers against float64 truth, on the emulator or a GPU: shapes, layouts and the check."""

from __future__ import annotations

import torch
from matrix_calls import Launchers
from torch import Tensor

from fastnn.ops.linear import _GRAD_FROM_INPUT, ACTIVATION_CODE, activation_slope, linear_reference
from fastnn.testing.policy import FORWARD_FACTOR, GRADIENT_FACTOR, assert_unbiased, assert_within_budget, same_bits

# (M, N, K, layout): every kernel, tails in each index, rows that no 16-byte copy can take.
SMALL = (
    (1, 1, 1, "plain"),
    (3, 5, 7, "plain"),
    (70, 72, 136, "plain"),
    (65, 66, 33, "plain"),
    (8, 200, 1032, "plain"),
    (130, 136, 80, "plain"),
    (64, 64, 64, "transposed weight"),
    (72, 40, 48, "transposed input"),
    (40, 72, 64, "rows apart"),
    (16, 24, 40, "shifted"),
    (5, 0, 8, "plain"),
    (0, 8, 8, "plain"),
    (9, 16, 0, "plain"),
)


def lay_out(t: Tensor, layout: str, which: str) -> Tensor:
    """The same values with other strides."""
    if layout == f"transposed {which}":
        return t.t().contiguous().t()
    if layout == "rows apart":
        wide = torch.full((t.shape[0], t.shape[1] + 24), float("nan"), dtype=t.dtype, device=t.device)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]
    if layout == "shifted":
        flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)
    return t


def check_linear(
    launchers: Launchers,
    shape: tuple[int, int, int],
    layout: str,
    dtype: torch.dtype,
    activation: str | None,
    device: str = "cpu",
    *,
    has_bias: bool = True,
    seed: int = 0,
) -> None:
    """Forward and every gradient within the policy, twice with equal bits."""
    m, n, k = shape
    where = f"{shape} {layout} {dtype} {activation} bias={has_bias}"
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator).to(dtype).to(device)  # noqa: E731
    x, w = lay_out(draw(m, k), layout, "input"), lay_out(draw(n, k) / max(k, 1) ** 0.5, layout, "weight")
    bias, dy = draw(n) if has_bias else None, lay_out(draw(m, n), layout, "gradient")
    code, save_pre = ACTIVATION_CODE[activation], activation in _GRAD_FROM_INPUT
    runs = [launchers.linear_fwd(x, w, bias, code, save_pre) for _ in range(2)]
    (y, pre), again = runs
    assert same_bits(y, again[0]), f"{where}: y differs between runs"
    wide = [None if t is None else t.double() for t in (x, w, bias)]
    truth, rival = linear_reference(*wide, activation), linear_reference(x, w, bias, activation)  # type: ignore[arg-type]
    assert_within_budget(y, truth, rival, dtype, FORWARD_FACTOR, where=f"{where} y")
    assert_unbiased(y, truth, rival, where=f"{where} y")
    if pre is not None:
        assert_within_budget(
            pre,
            linear_reference(*wide, None),  # type: ignore[arg-type]
            linear_reference(x, w, bias, None),
            dtype,
            FORWARD_FACTOR,
            where=f"{where} pre",
        )
    slope = None if activation is None else (pre if save_pre else y)
    grads = launchers.linear_bwd(dy, x, w, slope, code, (True, True, True))
    repeat = launchers.linear_bwd(dy, x, w, slope, code, (True, True, True))

    def formula(t: Tensor, cast: torch.dtype) -> list[Tensor]:
        dz = dy.to(cast) if slope is None else (dy.to(cast) * activation_slope(slope.to(cast), activation)).to(cast)
        return [dz @ w.to(cast), dz.t() @ x.to(cast), dz.sum(0)]

    truths, rivals = formula(dy, torch.float64), formula(dy, dtype)
    for name, found, other, true, theirs in zip(("dx", "dw", "db"), grads, repeat, truths, rivals, strict=True):
        assert found is not None and other is not None
        assert same_bits(found, other), f"{where}: {name} differs between runs"
        assert_within_budget(found, true, theirs, dtype, GRADIENT_FACTOR, where=f"{where} {name}")
