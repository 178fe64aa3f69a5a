"""Cases and invalid calls of the feed-forward blocks, plain and gated, and of their frozen layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import nn
from ...ops.activation import ACTIVATIONS
from ...ops.mlp import mlp as typed_mlp
from ...ops.mlp import mlp_reference
from ...ops.mlp import swiglu_mlp as typed_swiglu_mlp
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, fill

mlp: Callable[..., Tensor] = typed_mlp  # called with activations from a list, and wrongly
swiglu_mlp: Callable[..., Tensor] = typed_swiglu_mlp

_PLAIN = ("input", "w1", "b1", "w2", "b2")
_GATED = ("input", "w_gate", "w_up", "w_down")


@dataclass(frozen=True)
class _Block:
    """What a case calls and what its tensors look like."""

    gated: bool = False
    lead: tuple[int, ...] = (5,)
    features: int = 24
    hidden: int = 35
    out: int = 20
    activation: str = "gelu"
    biased: bool = True
    recompute: bool = False
    kind: Fill = "normal"
    memory: str = "contiguous"

    @property
    def names(self) -> tuple[str, ...]:
        if self.gated:
            return _GATED
        return _PLAIN if self.biased else ("input", "w1", "w2")

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        first, last = (self.hidden, self.features), (self.out, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {
            "input": (*self.lead, self.features),
            **dict.fromkeys(("w1", "w_gate", "w_up"), first),
            **dict.fromkeys(("w2", "w_down"), last),
            "b1": (self.hidden,),
            "b2": (self.out,),
        }
        found = {}
        for name in self.names:
            shape = shapes[name]
            # Sums stay around 2: wider, and the activations saturate nearly everywhere.
            scale = min(1.0, 2 / max(shape[1], 1) ** 0.5) if name[0] == "w" else 1.0
            found[name] = arrange(fill(shape, dtype, generator, self.kind) * scale, self.memory)
        return found

    def call(self, inputs: Inputs) -> Tensor:
        options: dict[str, Any] = {"activation": self.activation, "recompute": self.recompute}
        return (swiglu_mlp if self.gated else mlp)(*self._operands(inputs), **options)

    def _operands(self, inputs: Inputs) -> Sequence[Tensor | None]:
        return [inputs.get(name) for name in (_GATED if self.gated else _PLAIN)]

    def reference(self, inputs: Inputs) -> Tensor:
        """The same in plain PyTorch."""
        if self.gated:
            x, gate, up, down = (inputs[name] for name in _GATED)
            return mlp_reference(x, gate, None, up, down, None, self.activation)
        b1, b2 = inputs.get("b1"), inputs.get("b2")
        return mlp_reference(inputs["input"], inputs["w1"], b1, None, inputs["w2"], b2, self.activation)

    def call_packed(self, inputs: Inputs) -> Tensor:
        """Through a frozen layer, which reads its weights from packed copies; twice, so that those are reused."""
        sizes = (self.features, self.hidden, self.out, self.activation)
        options: dict[str, Any] = {"device": "meta", "dtype": inputs["input"].dtype}
        layer: Any
        if self.gated:
            layer = nn.SwiGLU(*sizes, **options)  # type: ignore[arg-type]
            names = {"gate_proj.weight": "w_gate", "up_proj.weight": "w_up", "down_proj.weight": "w_down"}
        else:
            layer = nn.MLP(*sizes, self.biased, **options)  # type: ignore[arg-type]
            names = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
        for path, name in names.items():
            if name in inputs:
                owner, key = path.split(".")
                parameter = torch.nn.Parameter(inputs[name], requires_grad=False)
                setattr(layer.get_submodule(owner), key, parameter)
        layer.freeze().eval()
        layer(inputs["input"])
        result: Tensor = layer(inputs["input"])
        return result


def _case(
    name: str,
    layout: str,
    block: _Block,
    *,
    packed: bool = False,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    parts = [*(["packed"] if packed else []), "gated" if block.gated else "plain", name]
    return Case(
        op="mlp",
        name="_".join([*parts, *(["recomputed"] if block.recompute else [])]),
        layout=layout,
        make=make or block.make,
        call=block.call_packed if packed else block.call,
        reference=block.reference,
        forward_kernel="mlp_packed_fwd" if packed else "mlp_fwd",
        backward_kernel="mlp_bwd",
        differentiable=() if packed else block.names,
        wide=wide,
        bites=bites,
    )


def _each(name: str, layout: str, *, wide: bool = False, packed: bool = False, **sizes: Any) -> Iterator[Case]:
    """One plain and one gated block, of which one computes its middle again."""
    sizes = {"memory": layout, **sizes}
    bites = layout != "empty"  # a gated block without features is all zeros
    yield _case(name, layout, _Block(activation="gelu", recompute=len(name) % 2 == 0, **sizes), wide=wide, bites=bites)
    yield _case(
        name, layout, _Block(True, activation="silu", recompute=len(name) % 2 == 1, **sizes), wide=wide, bites=bites
    )
    if packed:
        yield _case(name, layout, _Block(activation="gelu_tanh", **sizes), wide=wide, packed=True, bites=bites)
        yield _case(name, layout, _Block(True, activation="silu", **sizes), wide=wide, packed=True, bites=bites)


def _large(block: _Block, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Three rows of sums around 1e3 and beyond, three ordinary ones, as in the cases of linear."""
    inputs = block.make(dtype, generator)
    values = inputs["input"].float()
    values[:3] *= 20.0 if dtype == torch.float16 else 1e3
    return {**inputs, "input": values.to(dtype)}


def _nonfinite(block: _Block, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN and infinities in a few rows of the input, among them the last column, and in an element of a bias."""
    inputs = block.make(dtype, generator)
    nan, inf = float("nan"), float("inf")
    x = inputs["input"]
    x[0, 0], x[2, -1], x[4, 3], x[6, -1] = nan, nan, inf, -inf
    if "b2" in inputs:
        inputs["b2"][3], inputs["b2"][-1] = nan, inf
    return inputs


_PARTS: dict[str, Any] = {"lead": (530,), "features": 8, "hidden": 2100, "out": 9}
"""Parts of columns: 2 of 1056 and 1044; of a packed block's rows: 272 and 258."""


def _matrix_cases() -> Iterator[Case]:
    for activation in filter(None, ACTIVATIONS):
        yield _case(activation, "contiguous", _Block(lead=(7,), activation=activation))
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        yield _case(activation, "contiguous", _Block(True, lead=(7,), activation=activation))
    for recompute in (False, True):
        yield _case("no_bias", "contiguous", _Block(biased=False, activation="relu", recompute=recompute))
        yield _case("parts", "tail", _Block(True, activation="gelu_tanh", recompute=recompute, **_PARTS))
    yield _case("parts", "tail", _Block(activation="silu", recompute=True, **_PARTS))
    yield _case("parts", "tail", _Block(**_PARTS), packed=True)
    yield _case("parts", "tail", _Block(True, activation="silu", **_PARTS), packed=True)
    yield from _each("outliers", "contiguous", kind="outliers", packed=True)
    yield from _each("every_other", "strided", packed=True)
    yield from _each("stride_0", "expanded", packed=True)
    yield from _each("unaligned", "offset", lead=(9,), features=17, hidden=19, packed=True)
    for size in ("features", "hidden", "out"):
        sizes: dict[str, Any] = {size: 0}
        yield from _each(f"no_{size}", "empty", packed=True, **sizes)
    yield from _each("no_rows", "empty", lead=(3, 0), packed=True)
    for m, k, hidden, n in ((1, 1, 1, 1), (3, 17, 33, 3), (7, 47, 17, 65), (9, 49, 50, 35)):
        yield from _each(f"{m}x{k}x{hidden}x{n}", "tail", lead=(m,), features=k, hidden=hidden, out=n, packed=True)
    yield from _each("rows_apart", "padded_rows", lead=(7,))
    yield from _each("transposed", "transposed", lead=(33,), features=30, hidden=50, out=40, packed=True)
    yield from _each("three_dims", "leading_dims", lead=(2, 5), packed=True)
    yield from _each("four_dims", "leading_dims", lead=(2, 3, 4))
    yield from _each("vector", "one_row", lead=(), features=65, packed=True)
    yield from _each("one_row", "one_row", lead=(1,), features=129, hidden=65)
    for gated in (False, True):
        for activation in ("relu", "gelu", "silu", "tanh"):
            block = _Block(gated, lead=(6,), activation=activation, recompute=activation in ("relu", "tanh"))
            make = partial(_large, block)
            yield _case(f"{activation}_saturated", "large_magnitude", block, make=make, bites=False)
            block = _Block(gated, lead=(9,), activation=activation, recompute=activation in ("gelu", "tanh"))
            make = partial(_nonfinite, block)
            yield _case(f"{activation}_specials", "nonfinite", block, make=make, bites=False)


def _wide_cases() -> Iterator[Case]:
    for m in (1, 2, 4, 5, 8, 16, 33, 128, 129, 300):
        yield from _each(f"wide_m{m}", "tail", lead=(m,), features=30, hidden=70, out=50, packed=True, wide=True)
    for hidden in (1, 15, 16, 17, 48, 97, 1024, 1025, 4100):
        yield from _each(f"wide_h{hidden}", "tail", lead=(10,), hidden=hidden, packed=True, wide=True)
    for m, hidden in ((1100, 1500), (300, 7001), (2049, 3000)):
        sizes: dict[str, Any] = {"lead": (m,), "features": 70, "hidden": hidden, "out": 33}
        yield from _each(f"wide_parts_{m}x{hidden}", "tail", packed=True, wide=True, **sizes)
    yield from _each("wide_slices", "padded_rows", lead=(65,), features=100, hidden=97, kind="outliers", wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _t(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def _given(gated: bool, **changed: Any) -> list[Any]:
    """The arguments of a right call with 5 rows of 4 features, a middle of 6 and 3 results, some of them changed."""
    shapes = {"input": (5, 4), "w1": (6, 4), "b1": (6,), "w2": (3, 6), "b2": (3,)}
    if gated:
        shapes = {"input": (5, 4), "w_gate": (6, 4), "w_up": (6, 4), "w_down": (3, 6)}
    return [changed.get(name, _t(*shape)) for name, shape in shapes.items()]


def _public(gated: bool, name: str, changed: dict[str, Any], error: Any, *words: str, **options: Any) -> InvalidCall:
    function, label = (swiglu_mlp, "swiglu_mlp") if gated else (mlp, "mlp")
    call = partial(function, *_given(gated, **changed), **options)
    return InvalidCall("mlp", f"{label}-{name}", call, error, (f"fastnn.{label}", *words))


def _public_calls() -> Iterator[InvalidCall]:
    half = torch.float16
    for gated, first, last in ((False, "w1", "w2"), (True, "w_gate", "w_down")):
        public = partial(_public, gated)
        yield public("input_list", {"input": [1.0]}, TypeError, "input", "list")
        yield public("input_scalar", {"input": _t()}, ValueError, "input", "()")
        yield public("input_features", {"input": _t(5, 3)}, ValueError, "input", "4", "(5, 3)")
        yield public("input_integer", {"input": _t(5, 4).int()}, TypeError, "input", "int32")
        for key in (first, last):
            yield public(f"{key}_none", {key: None}, TypeError, key, "NoneType")
            yield public(f"{key}_vector", {key: _t(6)}, ValueError, key, "(6,)")
            yield public(f"{key}_half", {key: _t(6, 4, dtype=half)}, TypeError, key, "float16", "float32")
            yield public(f"{key}_device", {key: _t(6, 4, device="meta")}, TypeError, key, "meta", "cpu")
            yield public(f"{key}_sparse", {key: _t(6, 4).to_sparse()}, TypeError, key, "sparse")
        yield public("last_hidden", {last: _t(3, 5)}, ValueError, last, "(3, 6)", "(3, 5)")
        yield public("activation", {}, ValueError, "activation", "'swish'", activation="swish")
        yield public("activation_none", {}, ValueError, "activation", "None", activation=None)
        yield public("recompute", {}, TypeError, "recompute", "int", recompute=1)
    for key, length in (("b1", 6), ("b2", 3)):
        yield _public(False, f"{key}_number", {key: 1.0}, TypeError, key, "float")
        yield _public(False, f"{key}_length", {key: _t(4)}, ValueError, key, f"({length},)", "(4,)")
        yield _public(False, f"{key}_double", {key: _t(length).double()}, TypeError, key, "float64")
    yield _public(True, "up_none", {"w_up": None}, TypeError, "w_up", "NoneType")
    yield _public(True, "up_shape", {"w_up": _t(5, 4)}, ValueError, "w_up", "(6, 4)", "(5, 4)")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("mlp", name, call, error, ("mlp", *words), raw=True)


def _operands() -> dict[str, Any]:
    return {"input": _t(5, 4), "w_in": _t(6, 4), "b_in": _t(6), "w_factor": None, "w_out": _t(3, 6)}


def _fwd(**given: Any) -> object:
    right = {**_operands(), "b_out": _t(3), "activation": 1, "save": True, "grad_handled": True}
    return torch.ops.fastnn.mlp_fwd(*{**right, **given}.values())


def _bwd(**given: Any) -> object:
    right = {"grad": _t(5, 3), **_operands(), "z": _t(5, 6), "factor": None, "activation": 1}
    more = {"mask": (True, True, True, False, True, True), "grad_handled": True}
    return torch.ops.fastnn.mlp_bwd(*{**right, **more, **given}.values())


def _packed(**given: Any) -> object:
    with torch.no_grad():
        first, last = torch.ops.fastnn.linear_pack(_t(6, 4)), torch.ops.fastnn.linear_pack(_t(3, 6))
    right = {"input": _t(5, 4), "in": first, "b_in": _t(6), "factor": None, "out": last, "b_out": _t(3)}
    more = {"hidden": 6, "out_features": 3, "activation": 1, "grad_handled": True}
    return torch.ops.fastnn.mlp_packed_fwd(*{**right, **more, **given}.values())


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    half = torch.float16
    shared: Sequence[tuple[str, dict[str, Any], Any, tuple[str, ...]]] = (
        ("integer", {"input": _t(5, 4).int()}, _TYPES, ("input", "int32")),
        ("scalar", {"input": _t()}, ValueError, ("input",)),
        ("features", {"input": _t(5, 3)}, ValueError, ("input", "(5, 3)")),
        ("w_in_vector", {"w_in": _t(6)}, ValueError, ("w_in", "(6,)")),
        ("w_in_half", {"w_in": _t(6, 4, dtype=half)}, _TYPES, ("w_in", "float16")),
        ("w_out_vector", {"w_out": _t(6)}, ValueError, ("w_out", "(6,)")),
        ("w_out_hidden", {"w_out": _t(3, 7)}, ValueError, ("w_out", "(3, 7)")),
        ("b_in_long", {"b_in": _t(60)}, ValueError, ("b_in", "(60,)")),
        ("b_in_2d", {"b_in": _t(1, 6)}, ValueError, ("b_in", "(1, 6)")),
        ("factor_short", {"b_in": None, "w_factor": _t(5, 4)}, ValueError, ("w_factor", "(5, 4)")),
        ("factor_and_b_in", {"w_factor": _t(6, 4)}, ValueError, ("b_in",)),
        ("code_0", {"activation": 0}, ValueError, ("activation", "0")),
        ("code_high", {"activation": len(ACTIVATIONS)}, ValueError, ("activation", str(len(ACTIVATIONS)))),
        ("code_huge", {"activation": 2**40}, ValueError, ("activation",)),
    )
    for side, call in (("fwd", _fwd), ("bwd", _bwd)):
        for name, given, error, words in shared:
            yield _raw(f"{side}_{name}", partial(call, **given), error, *words)
    yield _raw("fwd_b_out", lambda: _fwd(b_out=_t(4)), ValueError, "b_out", "(4,)")
    yield _raw("fwd_sparse", lambda: _fwd(input=_t(5, 4).to_sparse()), Exception)
    wants = {"input": _t(5, 4, requires_grad=True), "grad_handled": False}
    yield _raw("fwd_wants_gradient", lambda: _fwd(**wants), RuntimeError, "mlp_fwd", "grad")
    yield _raw("bwd_grad_shape", lambda: _bwd(grad=_t(5, 4)), ValueError, "grad", "(5, 3)", "(5, 4)")
    yield _raw("bwd_grad_half", lambda: _bwd(grad=_t(5, 3, dtype=half)), _TYPES, "grad", "float16")
    yield _raw("bwd_z_shape", lambda: _bwd(z=_t(5, 5)), ValueError, "z", "(5, 6)", "(5, 5)")
    yield _raw("bwd_z_half", lambda: _bwd(z=_t(5, 6, dtype=half)), _TYPES, "z", "float16")
    gate = {"b_in": None, "w_factor": _t(6, 4)}
    yield _raw("bwd_no_factor", lambda: _bwd(**gate), ValueError, "factor")
    yield _raw("bwd_factor_shape", lambda: _bwd(factor=_t(6, 5), **gate), ValueError, "factor", "(6, 5)")
    every = (True,) * 6
    yield _raw("bwd_no_w_factor", lambda: _bwd(mask=every), ValueError, "w_factor")
    yield _raw("bwd_mask", lambda: _bwd(mask=(True, True)), Exception)
    yield _raw("packed_in_short", lambda: _packed(**{"in": _t(4)}), ValueError, "packed_in", "(4,)")
    yield _raw("packed_out_short", lambda: _packed(out=_t(4)), ValueError, "packed_out", "(4,)")
    yield _raw("packed_factor_short", lambda: _packed(b_in=None, factor=_t(4)), ValueError, "packed_factor")
    yield _raw("packed_hidden", lambda: _packed(hidden=60, b_in=None), ValueError, "packed_in")
    yield _raw("packed_negative", lambda: _packed(hidden=-6), ValueError, "hidden")
    yield _raw("packed_code", lambda: _packed(activation=0), ValueError, "activation")


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
