"""Invalid calls of scaled_dot_product_attention: of the public function and of the raw operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import scaled_dot_product_attention
from .cases import InvalidCall

attention: Callable[..., Tensor] = scaled_dot_product_attention  # called wrongly


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (2, 3, 5, 4), **options)


def _public(name: str, call: Callable[..., object], error: Any, *words: str) -> InvalidCall:
    q, k = _x(), _x(2, 3, 7, 4)
    label = ("fastnn.scaled_dot_product_attention", *words)
    return InvalidCall("attention", name, partial(call, attention, q, k), error, label)


def _public_calls() -> Iterator[InvalidCall]:
    both, half, nan = (TypeError, ValueError), torch.float16, float("nan")
    yield _public("query_list", lambda f, q, k: f([1.0], k, k), TypeError, "query", "list")
    yield _public("key_none", lambda f, q, k: f(q, None, k), TypeError, "key", "NoneType")
    yield _public("value_list", lambda f, q, k: f(q, k, [1.0]), TypeError, "value", "list")
    yield _public("mask_list", lambda f, q, k: f(q, k, k, [True]), TypeError, "attn_mask", "list")
    yield _public("query_vector", lambda f, q, k: f(q[0, 0, 0], k, k), ValueError, "query", "(4,)")
    yield _public("key_scalar", lambda f, q, k: f(q, torch.ones(()), k), ValueError, "key", "()")
    yield _public("integers", lambda f, q, k: f(q.int(), k.int(), k.int()), TypeError, "query", "int32")
    yield _public("complex", lambda f, q, k: f(*(t.to(torch.complex64) for t in (q, k, k))), TypeError, "complex64")
    yield _public("key_half", lambda f, q, k: f(q, k.to(half), k), TypeError, "key", "float16", "float32")
    yield _public("value_double", lambda f, q, k: f(q, k, k.double()), TypeError, "value", "float64", "float32")
    yield _public("features", lambda f, q, k: f(q, _x(2, 3, 7, 5), k), ValueError, "features", "(2, 3, 7, 5)")
    yield _public("lengths", lambda f, q, k: f(q, k, _x(2, 3, 6, 4)), ValueError, "length", "(2, 3, 6, 4)")
    yield _public("heads", lambda f, q, k: f(q, _x(2, 2, 7, 4), _x(2, 2, 7, 4)), ValueError, "heads", "3", "2")
    yield _public("heads_of_value", lambda f, q, k: f(q, k, _x(2, 2, 7, 4)), ValueError, "heads", "3", "2")
    yield _public("batch", lambda f, q, k: f(q, _x(4, 3, 7, 4), _x(4, 3, 7, 4)), ValueError, "batch", "(4, 3, 7, 4)")
    yield _public("grouped", lambda f, q, k: f(q, *[_x(2, 2, 7, 4)] * 2, enable_gqa=True), ValueError, "enable_gqa")
    yield _public("grouped_2d", lambda f, q, k: f(_x(5, 4), *[_x(7, 4)] * 2, enable_gqa=True), ValueError, "enable_gqa")
    yield _public(
        "grouped_value",
        lambda f, q, k: f(_x(2, 6, 5, 4), k, _x(2, 2, 7, 4), enable_gqa=True),
        ValueError,
        "enable_gqa",
    )
    yield _public("mask_integer", lambda f, q, k: f(q, k, k, _x(5, 7).int()), TypeError, "attn_mask", "int32")
    yield _public("mask_shape", lambda f, q, k: f(q, k, k, _x(5, 6)), ValueError, "attn_mask", "(5, 6)")
    yield _public("mask_batch", lambda f, q, k: f(q, k, k, _x(4, 1, 5, 7)), ValueError, "attn_mask", "(4, 1, 5, 7)")
    yield _public("mask_5d", lambda f, q, k: f(q, k, k, _x(2, 2, 3, 5, 7)), ValueError, "attn_mask")
    yield _public("mask_device", lambda f, q, k: f(q, k, k, _x(5, 7).to("meta")), both, "attn_mask", "meta")
    yield _public("key_device", lambda f, q, k: f(q, k.to("meta"), k), both, "key", "meta")
    for probability in (-0.1, 1.0, 1.5, nan):
        name = f"dropout_{probability}"
        yield _public(name, lambda f, q, k, p=probability: f(q, k, k, dropout_p=p), ValueError, "dropout_p")
    for cap in (-1.0, nan):
        yield _public(f"softcap_{cap}", lambda f, q, k, c=cap: f(q, k, k, softcap=c), ValueError, "softcap", str(cap))
    for window in ((-2, 0), (0, -2), (1,), (1, 2, 3), 4):
        name = f"window_{window}"
        yield _public(name, lambda f, q, k, w=window: f(q, k, k, window=w), both, "window", str(window))
    yield _public("sparse", lambda f, q, k: f(q.to_sparse(), k, k), TypeError, "query", "sparse")
    yield _public("sparse_mask", lambda f, q, k: f(q, k, k, _x(5, 7).to_sparse()), TypeError, "attn_mask", "sparse")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("attention", name, call, error, ("attention", *words), raw=True)


_ROOM = {"query": (2, 6, 5, 4), "key": (2, 3, 7, 4), "value": (2, 3, 7, 8), "grad": (2, 6, 5, 8), "out": (2, 6, 5, 8)}


def _raw_call(side: str, **given: Any) -> object:
    """torch.ops.fastnn.attention_fwd or attention_bwd, right but for what is given."""
    tensors = {name: _x(*shape) for name, shape in _ROOM.items()} | {"lse": _x(2, 6, 5), "mask": None, "seed": None}
    tensors |= {name: value for name, value in given.items() if name in tensors}
    defaults = {"dropout": 0.0, "scale": 0.5, "softcap": 0.0, "left": -1, "right": -1}
    options = [given.get(name, default) for name, default in defaults.items()]
    operands = [tensors[name] for name in ("query", "key", "value", "mask", "seed")]
    if side == "fwd":
        return torch.ops.fastnn.attention_fwd(*operands, *options, True)
    operands = [tensors["grad"], *operands, tensors["out"], tensors["lse"]]
    return torch.ops.fastnn.attention_bwd(*operands, *options, True)


_TYPES = (TypeError, NotImplementedError)


def _raw_shared_calls() -> Iterator[tuple[str, dict[str, Any], Any, tuple[str, ...]]]:
    """What forward and backward refuse alike."""
    nan, seed = float("nan"), torch.tensor(1)
    for name in ("query", "key", "value"):
        right = _x(*_ROOM[name])
        yield f"{name}_3d", {name: right[0]}, ValueError, (name,)
        yield f"{name}_5d", {name: right[None]}, ValueError, (name,)
        yield f"{name}_scalar", {name: torch.ones(())}, ValueError, (name,)
        yield f"{name}_int32", {name: right.int()}, _TYPES, ("int32",)
        yield f"{name}_float64", {name: right.double()}, _TYPES, ("float64",)
        yield f"{name}_sparse", {name: right.to_sparse()}, _TYPES, ()
    yield "key_half", {"key": _x(2, 3, 7, 4).half()}, _TYPES, ("key", "float16")
    yield "key_batch", {"key": _x(1, 3, 7, 4)}, ValueError, ("key", "(1, 3, 7, 4)")
    yield "key_features", {"key": _x(2, 3, 7, 400)}, ValueError, ("key", "(2, 3, 7, 400)")
    yield "value_length", {"value": _x(2, 3, 6, 8)}, ValueError, ("value", "(2, 3, 6, 8)")
    yield "value_heads", {"value": _x(2, 6, 7, 8)}, ValueError, ("value", "(2, 6, 7, 8)")
    yield "group", {"key": _x(2, 4, 7, 4), "value": _x(2, 4, 7, 8)}, ValueError, ("heads", "6", "4")
    yield "no_key_heads", {"key": _x(2, 0, 7, 4), "value": _x(2, 0, 7, 8)}, ValueError, ("heads", "6", "0")
    for shape in ((6, 7), (5, 8), (3, 5, 7), (3, 1, 5, 7), (1, 2, 6, 5, 7), (0,), (5, 0)):
        yield f"mask_{'x'.join(map(str, shape))}", {"mask": _x(*shape)}, ValueError, ("attn_mask", str(shape))
    yield "mask_int64", {"mask": _x(5, 7).long()}, _TYPES, ("attn_mask", "int64")
    yield "mask_uint8", {"mask": _x(5, 7).byte()}, _TYPES, ("attn_mask", "uint8")
    yield "mask_float64", {"mask": _x(5, 7).double()}, _TYPES, ("attn_mask", "float64")
    yield "mask_sparse", {"mask": _x(5, 7).to_sparse()}, _TYPES, ()
    yield "mask_sparse_bool", {"mask": _x(5, 7).bool().to_sparse()}, _TYPES, ()
    for dropout in (-0.1, 1.0, 1.5, nan):
        yield f"dropout_{dropout}", {"dropout": dropout, "seed": seed}, ValueError, ("dropout",)
    yield "no_seed", {"dropout": 0.5}, ValueError, ("seed",)
    yield "seed_int32", {"dropout": 0.5, "seed": seed.int()}, ValueError, ("seed",)
    yield "seed_float", {"dropout": 0.5, "seed": seed.float()}, ValueError, ("seed",)
    yield "seed_two", {"dropout": 0.5, "seed": torch.tensor([1, 2])}, ValueError, ("seed",)
    yield "seed_none", {"dropout": 0.5, "seed": torch.tensor([], dtype=torch.long)}, ValueError, ("seed",)
    for cap in (-1.0, nan):
        yield f"softcap_{cap}", {"softcap": cap}, ValueError, ("softcap",)
    for window in ((-2, 0), (0, -2), (-(2**40), -1)):
        given = {"left": window[0], "right": window[1]}
        yield f"window_{window[0]}_{window[1]}", given, ValueError, ("window", str(window[0]))


def _raw_calls() -> Iterator[InvalidCall]:
    for side in ("fwd", "bwd"):
        for name, given, error, words in _raw_shared_calls():
            yield _raw(f"{side}_{name}", partial(_raw_call, side, **given), error, *words)
    for name in ("grad", "out"):
        for shape in ((2, 6, 5, 4), (2, 6, 4, 8), (2, 3, 5, 8), (1, 6, 5, 8), (6, 5, 8), ()):
            wrong = torch.ones(shape)
            label = f"bwd_{name}_{'x'.join(map(str, shape)) or 'scalar'}"
            yield _raw(label, partial(_raw_call, "bwd", **{name: wrong}), ValueError, name, str(shape))
        wrong = _x(2, 6, 5, 8)
        yield _raw(f"bwd_{name}_half", partial(_raw_call, "bwd", **{name: wrong.half()}), _TYPES, name, "float16")
    for label, lse in (
        ("short", _x(2, 6, 4)),
        ("long", _x(2, 6, 5, 2)),
        ("half", _x(2, 6, 5).half()),
        ("strided", _x(2, 6, 10)[:, :, ::2]),
        ("int64", _x(2, 6, 5).long()),
    ):
        yield _raw(f"bwd_lse_{label}", partial(_raw_call, "bwd", lse=lse), (ValueError, *_TYPES), "lse")
    operands = (_x(2, 3, 5, 4, requires_grad=True), _x(), _x())
    yield _raw(
        "fwd_wants_gradient",
        lambda: torch.ops.fastnn.attention_fwd(*operands, None, None, 0.0, 1.0, 0.0, -1, -1),
        RuntimeError,
        "attention_fwd",
        "grad",
    )


INVALID_ATTENTION: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
