"""The calls whose launches tools/triton_aot.py compiles: on tensors without memory, so that sizes cost nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from fastnn import kernels

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float64: "fp64",
}


def cases(odd: bool = False) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that reach every kernel in every configuration, in float32, TF32 and bfloat16 (float16 is cut alike).

    Aligned ones, or those whose rows no 16 elements divide.
    """
    if odd:
        for dtype in (torch.float32, torch.bfloat16):
            yield from ((f"odd {name} {TYPES[dtype]}", run) for name, run in _odd_cases(dtype))
        for name, run in _odd_cases(torch.float32):
            if name.startswith("linear"):
                yield f"odd {name} tf32", functools.partial(_with_tf32, run)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield from ((f"{name} {TYPES[dtype]}", run) for name, run in _row_cases(dtype))
        yield from ((f"{name} {TYPES[dtype]}", run) for name, run in _matrix_cases(dtype))
    for name, run in _matrix_cases(torch.float32):
        if not name.startswith("attention") or name in ("attention 64 ", "attention 256 "):
            yield f"{name} tf32", functools.partial(_with_tf32, run)


def _with_tf32(run: Callable[[], Any]) -> None:
    allowed = [patch.object(module, "precision_of", lambda x: "tf32") for module in (kernels.matmul, kernels.attention)]
    with allowed[0], allowed[1]:
        run()


def _row_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    def x(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    float32 = torch.float32
    for n in (64, 1024, 4096, 16384, 50000):
        yield f"softmax {n}", lambda n=n: kernels.softmax.softmax_fwd(x(4096, n), 1, False, None)
        yield f"softmax {n}", lambda n=n: kernels.softmax.softmax_bwd(x(4096, n), x(4096, n), 1, False, dtype)
        for rms in (False, True):
            options = (1, 1e-5, rms, True)
            w, b = x(n), None if rms else x(n)
            yield f"norm {n}", lambda n=n, w=w, b=b, o=options: kernels.norm.norm_fwd(x(4096, n), None, w, b, *o)
            yield f"norm {n}", lambda n=n, w=w, b=b, o=options: kernels.norm.norm_fwd(x(4096, n), x(4096, n), w, b, *o)
            mask = [True, True, not rms]
            yield (
                f"norm {n}",
                lambda n=n, w=w, rms=rms, mask=mask: kernels.norm.norm_bwd(
                    x(4096, n), None, x(4096, n), w, x(4096, 2, of=float32), 1, rms, dtype, mask
                ),
            )
    yield from _elementwise_cases(x)
    yield "softmax columns", lambda: kernels.softmax.softmax_fwd(x(64, 128, 64), 1, True, None)
    yield "softmax columns", lambda: kernels.softmax.softmax_bwd(x(64, 128, 64), x(64, 128, 64), 1, True, dtype)
    for smoothing, softcap, classes in ((0.0, 0.0, 32000), (0.1, 0.0, 32000), (0.0, 30.0, 1000)):
        target = x(4096, of=torch.int64)
        o = (1, -100, smoothing, 0.0, softcap)
        yield (
            f"cross_entropy {classes}",
            lambda c=classes, t=target, o=o: kernels.cross_entropy.cross_entropy_fwd(x(4096, c), t, None, *o),
        )
        yield (
            f"cross_entropy {classes}",
            lambda c=classes, t=target, o=o: kernels.cross_entropy.cross_entropy_bwd(
                x(of=dtype), x(4096, c), t, None, x(4096, 2, of=float32), x(2, of=float32), *o
            ),
        )


def _elementwise_cases(x: Callable[..., torch.Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every activation alone, and one of them in the other forms."""
    fwd, bwd = kernels.elementwise.activation_fwd, kernels.elementwise.activation_bwd
    t, b = x(4096, 1024), x(1024)
    for code in range(1, 9):
        yield f"activation {code}", lambda code=code: fwd(t, None, None, code, False)
        yield f"activation {code}", lambda code=code: bwd(t, t, None, None, code, False, [True, False, False])
    for name, operands, mask in (
        ("bias", (t, None, b, 4, False), [True, False, True]),
        ("product", (t, t, None, 4, False), [True, True, False]),
        ("packed", (x(4096, 2048), None, None, 4, True), [True, False, False]),
    ):
        yield f"activation {name}", lambda o=operands: fwd(*o)
        yield f"activation {name}", lambda o=operands, m=mask: bwd(t, *o, m)


def _matrix_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    def x(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for m, n, k in ((4096, 4096, 4096), (512, 768, 768), (8, 4096, 4096), (32, 1024, 1024)):
        for activation in (0, 2):
            yield (
                f"linear {m}x{n}x{k}",
                lambda m=m, n=n, k=k, a=activation: kernels.linear.linear_fwd(x(m, k), x(n, k), x(n), a, a == 2),
            )
        yield (
            f"linear {m}x{n}x{k}",
            lambda m=m, n=n, k=k: kernels.linear.linear_bwd(x(m, n), x(m, k), x(n, k), x(m, n), 2, [m, k], [True] * 3),
        )
    plain = (0.0, 0.125, 0.0, -1, -1)
    options = {"": plain, "causal": (0.0, 0.125, 0.0, -1, 0), "softcap dropout window": (0.1, 0.1, 9.0, 128, 0)}
    options["mask"] = plain
    for d in (16, 64, 128, 256):
        for name, o in options.items():
            mask = x(1024) if name == "mask" else None
            seed = torch.zeros((), dtype=torch.int64)
            lse = torch.empty((2, 8, 1024), dtype=torch.float32, device="meta")
            for length in (1, 1024) if name == "causal" else (1024,):
                q, k = x(2, 8, length, d), x(2, 8, 1024, d)
                yield (
                    f"attention {d} {name}",
                    lambda q=q, k=k, m=mask, o=o, s=seed: kernels.attention.attention_fwd(q, k, k, m, s, *o),
                )
            q = x(2, 8, 1024, d)
            yield (
                f"attention {d} {name}",
                lambda q=q, m=mask, o=o, s=seed, lse=lse: kernels.attention.attention_bwd(q, q, q, q, m, s, q, lse, *o),
            )


def _odd_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Sizes that no tile and no 16 bytes divide: masks and narrow accesses in every kernel."""

    def x(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    float32, mask = torch.float32, [True, True, True]
    for n in (1001, 10001, 20001):
        yield f"softmax {n}", lambda n=n: kernels.softmax.softmax_fwd(x(999, n), 1, False, None)
        yield f"softmax {n}", lambda n=n: kernels.softmax.softmax_bwd(x(999, n), x(999, n), 1, False, dtype)
        options = (1, 1e-5, False, True)
        yield f"norm {n}", lambda n=n, o=options: kernels.norm.norm_fwd(x(999, n), x(999, n), x(n), x(n), *o)
        rest = (x(999, 2, of=float32), 1, False, dtype, mask)
        yield f"norm {n}", lambda n=n, r=rest: kernels.norm.norm_bwd(x(999, n), x(999, n), x(999, n), x(n), *r)
        target, o = x(999, of=torch.int64), (1, -100, 0.1, 0.0, 0.0)
        stats = (x(999, 2, of=float32), x(2, of=float32))
        yield (
            f"cross_entropy {n}",
            lambda n=n, t=target, o=o: kernels.cross_entropy.cross_entropy_fwd(x(999, n), t, None, *o),
        )
        yield (
            f"cross_entropy {n}",
            lambda n=n, t=target, s=stats, o=o: kernels.cross_entropy.cross_entropy_bwd(
                x(), x(999, n), t, None, *s, *o
            ),
        )
    fwd, bwd = kernels.elementwise.activation_fwd, kernels.elementwise.activation_bwd
    t, packed, b = x(999, 1001), x(999, 2002), x(1001)
    yield "activation", lambda: fwd(t, None, b, 2, False)
    yield "activation", lambda: bwd(t, t, None, b, 2, False, mask)
    yield "activation", lambda: fwd(packed, None, None, 4, True)
    yield "activation", lambda: bwd(t, packed, None, None, 4, True, [True, False, False])
    for m in (4095, 33):
        w = x(4095, 4095)
        yield f"linear {m}", lambda m=m, w=w: kernels.linear.linear_fwd(x(m, 4095), w, x(4095), 2, True)
        yield (
            f"linear {m}",
            lambda m=m, w=w: kernels.linear.linear_bwd(x(m, 4095), x(m, 4095), w, x(m, 4095), 2, [m, 4095], mask),
        )
    wide, narrow = x(4096, 4096), x(1000, 4096)
    yield "linear 1000", lambda: kernels.linear.linear_fwd(wide, narrow, x(1000), 2, True)
    seed = torch.zeros((), dtype=torch.int64)
    for d in (5, 40, 100, 200):
        q, lse = x(2, 8, 1001, d), x(2, 8, 1001, of=float32)
        for m, o in (
            (None, (0.0, 0.125, 0.0, -1, 0)),
            (None, (0.1, 0.1, 9.0, 128, 0)),
            (x(1001, 1001), (0.0, 0.1, 0.0, -1, -1)),
        ):
            yield f"attention {d}", lambda q=q, m=m, o=o: kernels.attention.attention_fwd(q, q, q, m, seed, *o)
            yield (
                f"attention {d}",
                lambda q=q, m=m, o=o, lse=lse: kernels.attention.attention_bwd(q, q, q, q, m, seed, q, lse, *o),
            )
