"""Rows of attention: full, causal and decoding, and a sweep of lengths and head sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.attention import scaled_dot_product_attention
from ..bench_cases import Bar, BenchCase, Direction, Node, Ours, Results, Work, forward_backward, on_gpu
from ..cases import DTYPES, Inputs

Shape = tuple[int, int, int, int, int]
"""(B, Hq, Hkv, S, D)."""

_SHORT, _LONG = (4, 12, 12, 128, 64), (1, 12, 12, 2048, 64)
_LONGEST = (1, 2, 2, 8192, 64)
"""For the memory: weights of S x S would take 512 MB in float32."""
_PUBLIC: tuple[tuple[str, Shape, dict[str, Bar]], ...] = (
    ("fwd", _SHORT, {"fp32": Bar(1.1, holder="openvino"), "bf16": Bar(1.5, holder="openvino")}),
    ("fb", _SHORT, {"fp32": Bar(1.4, holder="eager"), "bf16": Bar(3.1, holder="eager")}),
    ("fwd_causal", _SHORT, {"fp32": Bar(2.0, holder="openvino"), "bf16": Bar(3.0, holder="openvino")}),
    ("fb_causal", _SHORT, {"fp32": Bar(2.4, holder="eager"), "bf16": Bar(5.0, holder="eager")}),
    ("fwd", _LONG, {"fp32": Bar(1.1, holder="openvino"), "bf16": Bar(1.2, holder="openvino")}),
    ("fb", _LONG, {"fp32": Bar(1.4, holder="eager"), "bf16": Bar(2.2, holder="eager")}),
    ("fwd_causal", _LONG, {"fp32": Bar(1.5, holder="eager"), "bf16": Bar(2.4, holder="openvino")}),
    ("fb_causal", _LONG, {"fp32": Bar(1.4, holder="eager"), "bf16": Bar(2.2, holder="eager")}),
    ("fwd", _LONGEST, {"fp32": Bar(), "bf16": Bar()}),
    ("fb", _LONGEST, {"fp32": Bar(), "bf16": Bar()}),
    ("decode", (8, 16, 16, 2048, 64), {"fp32": Bar(1.7, holder="eager"), "bf16": Bar(11.2, holder="eager")}),
    ("decode", (8, 32, 8, 2048, 128), {"fp32": Bar(2.3, holder="by_hand"), "bf16": Bar(3.1, holder="by_hand")}),
    ("decode", (1, 32, 8, 2048, 128), {"fp32": Bar(5.0, holder="by_hand"), "bf16": Bar(2.8, holder="by_hand")}),
)
"""The rows of the performance page with their bars. Decoding is one query per head against S keys."""

_LENGTHS = (1, 7, 16, 33, 64, 127, 256, 509, 1024)
_FEATURES = (16, 40, 64, 80, 111, 128)
_SWEEP: tuple[tuple[str, Shape], ...] = tuple(
    [("fwd", (2, 4, 4, length, features)) for length in _LENGTHS for features in _FEATURES]
    + [("decode", (1, 8, 2, length, 128)) for length in (1, 100, 509, 1024, 4096, 8191)]
)
"""Lengths and head sizes between and beyond the public ones, primes among them; decoding with shared heads."""


def make(kind: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Query, key and value, and the gradient of the result where one is taken."""
    b, heads, shared, length, features = shape
    queries = 1 if kind == "decode" else length

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    found = {
        "query": tensor(b, heads, queries, features),
        "key": tensor(b, shared, length, features),
        "value": tensor(b, shared, length, features),
    }
    return {**found, "grad": tensor(b, heads, queries, features)} if kind.startswith("fb") else found


def torch_call(causal: bool, inputs: Inputs) -> Tensor:
    """Torch's own attention; query heads that share a key head by `enable_gqa`."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared)


def group_as_queries(inputs: Inputs) -> Tensor:
    """The query heads that share a key head, as queries of one head: torch is many times faster so than by itself."""
    query, key = inputs["query"], inputs["key"]
    b, _, _, features = query.shape
    grouped = query.view(b, key.shape[1], -1, features)
    return F.scaled_dot_product_attention(grouped, key, inputs["value"]).view(query.shape)


def _our_call(causal: bool, inputs: Inputs) -> Tensor:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=shared)


def _prepare(causal: bool, direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    call = partial(_our_call, causal)
    if direction == "fb":
        return lambda: forward_backward(call, _WANTED, inputs)
    return lambda: (call(inputs),)


_WANTED = ("query", "key", "value")


def decode_work(shape: Shape, dtype: str) -> Work:
    """Of one query for each head. There is nothing to build a dot product of pairs from, in any type."""
    b, heads, shared, length, features = shape
    size = DTYPES[dtype].itemsize
    q, kv = b * heads * features * size, b * shared * length * features * size
    return Work(q + 2 * kv, q, 4 * b * heads * length * features)


def _work(kind: str, shape: Shape, dtype: str) -> Work:
    if kind == "decode":
        return decode_work(shape, dtype)
    b, heads, shared, length, features = shape
    size = DTYPES[dtype].itemsize
    operations = 4 * b * heads * length * length * features  # two products; exponentials are below a tenth of that
    if kind.endswith("causal"):
        operations //= 2
    q, kv = b * heads * length * features * size, b * shared * length * features * size
    unit = "bf16" if dtype == "bf16" else "fp32"
    if kind.startswith("fb"):  # backward is five products and reads the result's gradient too
        return Work(3 * q + 4 * kv, 2 * q + 2 * kv, operations * 7 // 2, unit)
    return Work(q + 2 * kv, q, operations, unit)


def _hidden(length: int, dtype: str) -> Tensor:
    return torch.full((length, length), float("-inf")).triu(1).to(DTYPES[dtype])


def _onnx(kind: str, shape: Shape, dtype: str) -> tuple[Node, ...]:
    """Two products with a softmax between, as exporters write it: engines know the pattern."""
    _, heads, shared, length, features = shape
    if kind.startswith("fb") or heads != shared:
        return ()
    nodes = [
        Node("Constant", (), {"value": lambda: torch.tensor(features**-0.5).to(DTYPES[dtype])}, "scale"),
        Node("Transpose", ("key",), {"perm": (0, 1, 3, 2)}, "keys"),
        Node("MatMul", ("query", "keys")),
        Node("Mul", ("y", "scale")),
    ]
    if kind.endswith("causal"):
        nodes += [
            Node("Constant", (), {"value": partial(_hidden, length, dtype)}, "hidden"),
            Node("Add", ("y", "hidden")),
        ]
    return (*nodes, Node("Softmax", ("y",), {"axis": -1}), Node("MatMul", ("y", "value")))


def _case(kind: str, shape: Shape, dtype: str, bar: Bar, sweep: bool = False) -> BenchCase:
    b, heads, shared, length, features = shape
    causal = kind.endswith("causal")
    direction: Direction = "fb" if kind.startswith("fb") else "fwd"
    return BenchCase(
        family="attention",
        name=f"sdpa_{kind}",
        direction=direction,
        shape=shape if kind == "decode" else (b, heads, length, features),
        dtype=dtype,
        work=_work(kind, shape, dtype),
        make=partial(make, kind, shape),
        torch_call=partial(torch_call, causal),
        by_hand=group_as_queries if heads != shared else None,
        ours=(
            Ours(
                "",
                partial(_prepare, causal, direction),
                "attention_bwd" if direction == "fb" else "attention_fwd",
                bar,
            ),
        ),
        wanted=_WANTED if direction == "fb" else (),
        onnx=() if sweep else _onnx(kind, shape, dtype),
        sweep=sweep,
    )


def _cases() -> Iterator[BenchCase]:
    for kind, shape, bars in _PUBLIC:
        for dtype, bar in bars.items():
            yield _case(kind, shape, dtype, bar)
    for kind, shape in _SWEEP:
        for dtype in ("fp32", "bf16"):
            yield _case(kind, shape, dtype, Bar(), sweep=True)
            if kind == "fwd" and shape[3] > 1:
                for more in ("fwd_causal", "fb"):
                    yield _case(more, shape, dtype, Bar(), sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

_GPU: tuple[tuple[str, Shape, str], ...] = (
    ("fwd", (4, 16, 16, 2048, 64), "bf16"),
    ("fwd_causal", (4, 16, 16, 2048, 64), "bf16"),
    ("fwd", (1, 32, 32, 4096, 128), "bf16"),
    ("fwd_causal", (1, 32, 8, 4096, 128), "bf16"),
    ("fwd", (4, 16, 16, 2048, 64), "fp32"),
    ("fb", (4, 16, 16, 2048, 64), "bf16"),
    ("fb_causal", (1, 32, 32, 4096, 128), "bf16"),
    ("decode", (8, 32, 8, 8192, 128), "bf16"),
    ("decode", (1, 32, 8, 8192, 128), "bf16"),
)
"""Training and prompts of language models, with heads of 64 and 128, shared heads, and decoding."""


def _cudnn(causal: bool, inputs: Inputs) -> Tensor:
    """cuDNN's kernels, which torch has and does not always choose."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch_call(causal, inputs)


def _on_gpu(kind: str, shape: Shape, dtype: str) -> BenchCase:
    case = _case(kind, shape, dtype, Bar())
    if kind == "decode" or dtype == "fp32":
        return on_gpu(case, case.by_hand)
    return on_gpu(case, partial(_cudnn, kind.endswith("causal")))


GPU_CASES: tuple[BenchCase, ...] = tuple(_on_gpu(*row) for row in _GPU)
