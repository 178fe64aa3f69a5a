"""Rows of feed-forward blocks, plain and gated, and of queries, keys and values from one product.

Beside times they show memory: how far the process grows during a call, with the block's middle kept or computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import nn
from ...ops.mlp import mlp, mlp_reference, swiglu_mlp
from ..bench_cases import Bar, BenchCase, Direction, Node, Ours, Results, Work, forward_backward
from ..cases import DTYPES, Inputs

Shape = tuple[int, int, int]
"""(tokens, features, hidden); the result has as many features as the input."""

_NAMES = {"mlp": ("input", "w1", "b1", "w2", "b2"), "swiglu_mlp": ("input", "w_gate", "w_up", "w_down")}
_ACTIVATION: dict[str, Any] = {"mlp": "gelu_tanh", "swiglu_mlp": "silu"}

_PUBLIC: tuple[tuple[str, Shape], ...] = (
    ("mlp", (1, 768, 3072)),
    ("mlp", (128, 768, 3072)),
    ("mlp", (2048, 768, 3072)),
    ("swiglu_mlp", (1, 2048, 5632)),
    ("swiglu_mlp", (128, 2048, 5632)),
    ("swiglu_mlp", (2048, 768, 2048)),
)
"""The blocks of GPT-2 small and BERT-base, of TinyLlama, and a small gated one in training."""

_QKV: tuple[tuple[int, int, int, int], ...] = ((128, 768, 12, 12), (1, 2048, 32, 4))
"""(tokens, features, heads, heads of keys and values), heads of 64."""
_HEAD = 64

_SWEEP: tuple[Shape, ...] = tuple(
    (m, *sizes)
    for sizes in ((64, 256), (100, 391), (256, 1024), (509, 1021), (768, 2048), (1024, 2816), (768, 3072), (2048, 5632))
    for m in (2, 5, 16, 61, 127, 509, 1024)
)
"""From two tokens to a batch, with the widths of transformers and primes."""

_ONNX: dict[str, tuple[Node, ...]] = {
    "mlp": (
        Node("Gemm", ("input", "w1", "b1"), {"transB": 1}),
        Node("Gelu", ("y",), {"approximate": "tanh"}),
        Node("Gemm", ("y", "w2", "b2"), {"transB": 1}),
    ),
    "swiglu_mlp": (
        Node("Gemm", ("input", "w_gate"), {"transB": 1}, output="g"),
        Node("Gemm", ("input", "w_up"), {"transB": 1}, output="u"),
        Node("Sigmoid", ("g",), output="s"),
        Node("Mul", ("g", "s"), output="a"),
        Node("Mul", ("a", "u"), output="h"),
        Node("Gemm", ("h", "w_down"), {"transB": 1}),
    ),
}


def _make(kind: str, shape: Shape, direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    m, features, hidden = shape
    sizes = {
        "input": (m, features),
        **dict.fromkeys(("w1", "w_gate", "w_up"), (hidden, features)),
        **dict.fromkeys(("w2", "w_down"), (features, hidden)),
        "b1": (hidden,),
        "b2": (features,),
        "grad": (m, features),
    }
    found = {}
    for name in (*_NAMES[kind], *(["grad"] if direction == "fb" else [])):
        values = torch.randn(sizes[name], generator=generator)
        found[name] = (values / sizes[name][1] ** 0.5 if name[0] == "w" else values).to(dtype)
    return found


def _torch_call(kind: str, inputs: Inputs) -> Tensor:
    x, first, *rest = (inputs[name] for name in _NAMES[kind])
    if kind == "mlp":
        b1, w2, b2 = rest
        return mlp_reference(x, first, b1, None, w2, b2, _ACTIVATION[kind])
    return mlp_reference(x, first, None, rest[0], rest[1], None, _ACTIVATION[kind])


def _torch_recompute(kind: str, inputs: Inputs) -> Tensor:
    """torch's way to keep nothing between forward and backward."""

    def block(*operands: Tensor) -> Tensor:
        return _torch_call(kind, dict(zip(_NAMES[kind], operands, strict=True)))

    found: Tensor = checkpoint(block, *(inputs[name] for name in _NAMES[kind]), use_reentrant=False)
    return found


def _our_call(kind: str, recompute: bool, inputs: Inputs) -> Tensor:
    operands: list[Any] = [inputs[name] for name in _NAMES[kind]]
    function: Callable[..., Tensor] = mlp if kind == "mlp" else swiglu_mlp
    return function(*operands, activation=_ACTIVATION[kind], recompute=recompute)


def _prepare(kind: str, direction: Direction, recompute: bool, inputs: Inputs) -> Callable[[], Results]:
    call = partial(_our_call, kind, recompute)
    if direction == "fb":
        return lambda: forward_backward(call, _NAMES[kind], inputs)
    return lambda: (call(inputs),)


def _prepare_packed(kind: str, inputs: Inputs) -> Callable[[], Results]:
    """A frozen block, whose weights are packed by its first call."""
    features, options = inputs["input"].shape[1], {"device": "meta", "dtype": inputs["input"].dtype}
    layer: Any
    if kind == "mlp":
        layer = nn.MLP(features, inputs["w1"].shape[0], None, _ACTIVATION[kind], **options)  # type: ignore[arg-type]
        names = {"w1": layer.fc1, "w2": layer.fc2}
        for name, owner in (("b1", layer.fc1), ("b2", layer.fc2)):
            owner.bias = torch.nn.Parameter(inputs[name], requires_grad=False)
    else:
        layer = nn.SwiGLU(features, inputs["w_up"].shape[0], **options)  # type: ignore[arg-type]
        names = {"w_gate": layer.gate_proj, "w_up": layer.up_proj, "w_down": layer.down_proj}
    for name, owner in names.items():
        owner.weight = torch.nn.Parameter(inputs[name], requires_grad=False)
    layer.freeze().eval()
    return lambda: (layer(inputs["input"]),)


def _work(kind: str, shape: Shape, dtype: str, direction: Direction, recompute: bool) -> Work:
    m, features, hidden = shape
    size, unit = DTYPES[dtype].itemsize, "bf16" if dtype == "bf16" else "fp32"
    products = 2 if kind == "mlp" else 3
    weights = products * features * hidden + (features + hidden if kind == "mlp" else 0)
    tokens, operations = m * features, 2 * products * m * features * hidden
    if direction == "fwd":
        return Work((tokens + weights) * size, tokens * size, operations, unit)
    # Backward reads input, weights and the result's gradient again, and writes a gradient of each operand; where the
    # middle is not kept, all products but the last run once more.
    again = 2 * (products - 1) * m * features * hidden if recompute else 0
    read, written = 2 * (tokens + weights) + tokens, 2 * tokens + weights
    return Work(read * size, written * size, 3 * operations + again, unit)


def _case(
    kind: str, shape: Shape, dtype: str, direction: Direction, sweep: bool = False, recompute: bool = False
) -> BenchCase:
    """`recompute` is a row of its own: it buys memory with time, and competes with torch's way to do so."""
    backward = direction == "fb"
    kernel, bar = "mlp_bwd" if backward else "mlp_fwd", Bar() if sweep else Bar(1.0)
    ours = [Ours("", partial(_prepare, kind, direction, recompute), kernel, bar)]
    if not backward:
        ours.append(Ours("packed", partial(_prepare_packed, kind), "mlp_packed_fwd", bar, frozen=True))
    return BenchCase(
        family="mlp",
        name=f"{kind}_{direction}" + ("+recompute" if recompute else ""),
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=_work(kind, shape, dtype, direction, recompute),
        make=partial(_make, kind, shape, direction),
        torch_call=partial(_torch_recompute if recompute else _torch_call, kind),
        ours=tuple(ours),
        wanted=_NAMES[kind] if backward else (),
        constants=_NAMES[kind][1:],
        onnx=() if backward else _ONNX[kind],
        sweep=sweep,
    )


def _qkv_make(shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    m, features, heads, kv_heads = shape
    found = {"input": torch.randn(m, features, generator=generator).to(dtype)}
    for name, n in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
        weight = torch.randn(n * _HEAD, features, generator=generator) / features**0.5
        found[name] = weight.to(dtype)
    return found


def _qkv_apart(inputs: Inputs) -> Results:
    return tuple(F.linear(inputs["input"], inputs[name]) for name in ("query", "key", "value"))


def _qkv_together(frozen: bool, inputs: Inputs) -> Callable[[], Results]:
    weights = [inputs[name] for name in ("query", "key", "value")]
    heads, kv_heads = (weight.shape[0] // _HEAD for weight in weights[:2])
    features, dtype = weights[0].shape[1], weights[0].dtype
    layer = nn.QKVLinear(features, heads, kv_heads, _HEAD, False, "meta", dtype).eval()
    layer.weight = torch.nn.Parameter(torch.cat(weights), requires_grad=False)
    if frozen:
        layer.freeze()
    return lambda: tuple(t.flatten(-2) for t in layer(inputs["input"]))


def _qkv(shape: tuple[int, int, int, int], dtype: str) -> BenchCase:
    m, features, heads, kv_heads = shape
    size, unit, n = DTYPES[dtype].itemsize, "bf16" if dtype == "bf16" else "fp32", (heads + 2 * kv_heads) * _HEAD
    return BenchCase(
        family="mlp",
        name="qkv_fwd",
        direction="fwd",
        shape=shape,
        dtype=dtype,
        work=Work((m * features + n * features) * size, m * n * size, 2 * m * n * features, unit),
        make=partial(_qkv_make, shape),
        torch_call=_qkv_apart,
        ours=(
            Ours("", partial(_qkv_together, False), "linear_fwd", Bar(1.0)),
            Ours("packed", partial(_qkv_together, True), "linear_packed_fwd", Bar(1.0), frozen=True),
        ),
        constants=("query", "key", "value"),
    )


def _cases() -> Iterator[BenchCase]:
    for kind, shape in _PUBLIC:
        for dtype in ("fp32", "bf16"):
            yield _case(kind, shape, dtype, "fwd")
            if shape[0] > 1:
                yield _case(kind, shape, dtype, "fb")
                yield _case(kind, shape, dtype, "fb", recompute=True)
    for sizes in _QKV:
        for dtype in ("fp32", "bf16"):
            yield _qkv(sizes, dtype)
    for i, shape in enumerate(_SWEEP):
        for dtype in ("fp32", "bf16"):
            kind = ("mlp", "swiglu_mlp")[i % 2]
            yield _case(kind, shape, dtype, "fwd", sweep=True)
            yield _case(kind, shape, dtype, "fb", sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

GPU_CASES: tuple[BenchCase, ...] = ()
"""On GPUs the block is the ops that it is made of, which have rows of their own."""
