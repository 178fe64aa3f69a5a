"""Every op on rows that lie more than 2^31 elements apart: memory that is never touched costs nothing."""

from __future__ import annotations

import torch
from torch import Tensor

import fastnn

APART, LONG = 2**30 + 65536, 2100
WIDTH = 48  # a multiple of 16: attention copies other heads, and nothing would be far apart

CALLS = {
    "softmax": lambda x: fastnn.softmax(x, -1),
    "log_softmax": lambda x: fastnn.log_softmax(x, -1),
    "cross_entropy": lambda x: fastnn.cross_entropy(x, torch.tensor([7, 0, 39]), reduction="none"),
    "long_softmax": lambda x: fastnn.softmax(x, -1),
    "norm": lambda x: fastnn.layer_norm(x, (WIDTH,)),
    "long_norm": lambda x, w: fastnn.rms_norm(x, (LONG,), w[0]),
    "add_norm": lambda x, r: fastnn.add_rms_norm(x, r)[0],
    "activation": lambda x: fastnn.gelu(x),
    "bias": lambda x: fastnn.gelu(x, bias=torch.ones(WIDTH, dtype=torch.float16, requires_grad=True)),
    "product": lambda x, y: fastnn.swiglu(x, y),
    "linear": lambda x, w: fastnn.linear(x, w, activation="silu"),
    "attention": lambda q, k, v: fastnn.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None]),
}
"""What is computed of tensors (3, WIDTH), or (3, LONG): rows that no program holds whole."""


def compare(name: str, offset: int = 0) -> None:
    """The third rows begin beyond 2^31 elements; results and gradients have the bits of neighbouring rows'.

    `offset` elements before the first: 1 keeps every wide access and the copy engine out.
    """
    call = CALLS[name]
    count = call.__code__.co_argcount
    draw = torch.Generator().manual_seed(1)
    width = LONG if name.startswith("long") else WIDTH
    near = [torch.randn(3, width, generator=draw).half() for _ in range(count + 1)]
    memory = torch.empty(2 * APART + 4096 * (count + 2), dtype=torch.float16)
    far = [memory.as_strided(t.shape, (APART, 1), 4096 * i + offset).copy_(t) for i, t in enumerate(near)]
    with fastnn.use_backend("triton"):
        for ours, expected in zip(_results(call, far), _results(call, near), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def _results(call, tensors: list[Tensor]) -> list[Tensor]:
    *inputs, dy = (t.detach() for t in tensors)
    leaves = [t.requires_grad_() for t in inputs]
    y = call(*leaves)
    if y.dim() == 4:
        dy = dy[None, None]
    grad = dy[:, 0] if y.dim() == 1 else dy[..., : y.shape[-1]]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]
