"""Cases and invalid calls of cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.cross_entropy import LossOptions, cross_entropy_reference
from ...ops.cross_entropy import cross_entropy as typed_cross_entropy
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]

cross_entropy: Callable[..., Tensor] = typed_cross_entropy  # called wrongly too

IGNORED = -100


@dataclass(frozen=True)
class _Shape:
    """What the tensors of a case look like: logits (N, C, ...) or (C,), a target, a weight per class or none."""

    shape: tuple[int, ...]
    probabilities: bool = False
    weight: bool = False
    ignored: int = IGNORED
    """Value of ignore_index; every third row has it."""
    kind: Fill = "normal"
    input_memory: str | Arrange = "contiguous"
    target_memory: str | Arrange = "contiguous"
    weight_memory: str | Arrange = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        class_dim = 1 if len(self.shape) > 1 else 0
        classes = self.shape[class_dim]
        values = fill(self.shape, torch.float32, generator, self.kind) * 2
        found = {"input": _arranged(values.to(dtype), self.input_memory)}
        if self.probabilities:
            shares = torch.softmax(fill(self.shape, torch.float32, generator), class_dim)
            found["target"] = _arranged(shares.to(dtype), self.target_memory)
        else:
            per_row = self.shape[:1] + self.shape[2:] if len(self.shape) > 1 else ()
            target = torch.randint(max(classes, 1), per_row, generator=generator)
            target.view(-1)[2::3] = self.ignored
            found["target"] = _arranged(target, self.target_memory)
        if self.weight:
            weight = torch.rand(classes, generator=generator) + 0.1
            found["weight"] = _arranged(weight.to(dtype), self.weight_memory)
        return found


def _arranged(t: Tensor, memory: str | Arrange) -> Tensor:
    return arrange(t, memory) if isinstance(memory, str) else memory(t)


def _options(**given: Any) -> LossOptions:
    return LossOptions(**{**LossOptions("mean", IGNORED, 0.0, 0.0, 0.0)._asdict(), **given})


def _call(options: LossOptions, inputs: Inputs) -> Tensor:
    return cross_entropy(inputs["input"], inputs["target"], inputs.get("weight"), **options._asdict())


def _reference(options: LossOptions, inputs: Inputs) -> Tensor:
    return cross_entropy_reference(inputs["input"], inputs["target"], inputs.get("weight"), options)


def _case(
    name: str,
    layout: str,
    shape: _Shape,
    *,
    wide: bool = False,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    bites: bool = True,
    **options: Any,
) -> Case:
    asked = _options(ignore_index=shape.ignored, **options)
    return Case(
        op="cross_entropy",
        name=name,
        layout=layout,
        make=make or shape.make,
        call=partial(_call, asked),
        reference=partial(_reference, asked),
        forward_kernel="cross_entropy_fwd",
        backward_kernel="cross_entropy_bwd",
        differentiable=("input",),
        wide=wide,
        bites=bites,
    )


EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}


def _every(t: Tensor) -> Tensor:
    """Rows two apart with what must not be read between them."""
    base = torch.cat([t.unsqueeze(1)] * 2, 1)
    base[:, 1] = float("nan") if t.is_floating_point() else -7
    return base[:, 0]


def _permuted(t: Tensor) -> Tensor:
    """The class dimension (1) is the last in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _large(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A big common offset with small differences; two rows where another class than the target has all the weight."""
    top = {torch.float16: 2048.0, torch.bfloat16: 256.0}.get(dtype, 2.0**23)
    values = top + torch.randint(0, 6, (7, 40), generator=generator)
    values[2] -= 2 * top
    values[3:5] = torch.randn(2, 40, generator=generator)
    values[3, 7] = values[4, 39] = 3e4
    target = torch.randint(8, 39, (7,), generator=generator)
    return {"input": values.to(dtype), "target": target}


def _nonfinite(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """NaN, infinities and the lowest finite value at the head, in the body and in the tail, at the target and not."""
    values = torch.randn(13, 37, generator=generator).double()
    target = torch.randint(1, 36, (13,), generator=generator)
    inf, low = float("inf"), torch.finfo(dtype).min
    values[0, 0] = values[1, 20] = values[2, 36] = float("nan")
    values[3, 0] = values[4, 36] = inf
    values[5, :18], values[6, 30:] = -inf, -inf
    target[5], target[6] = 20, 3
    values[7], values[8] = -inf, inf
    values[9, :30], target[9] = low, 35
    values[10] = low
    values[11, 1], values[11, 2] = inf, -inf
    values[12, 5], target[12] = -inf, 5
    return {"input": values.to(dtype), "target": target}


def _option_cases() -> Iterator[Case]:
    """Every option by itself and all of them together, for class indices and for probabilities."""
    for reduction in ("mean", "sum", "none"):
        yield _case(reduction, "contiguous", _Shape((7, 50)), reduction=reduction)
        yield _case(f"weight_{reduction}", "contiguous", _Shape((7, 50), weight=True), reduction=reduction)
        yield _case(f"probabilities_{reduction}", "contiguous", _Shape((7, 50), True), reduction=reduction)
        shape = _Shape((7, 50), weight=True)
        yield _case(f"everything_{reduction}", "contiguous", shape, reduction=reduction, **EVERYTHING)
        shape = _Shape((7, 50), True, weight=True)
        yield _case(f"probabilities_everything_{reduction}", "contiguous", shape, reduction=reduction, **EVERYTHING)
        yield _case(f"z_loss_{reduction}", "contiguous", _Shape((7, 50), weight=True), reduction=reduction, z_loss=0.05)
    for smoothing in (0.1, 1.0):
        shape = _Shape((7, 33), weight=True)
        yield _case(f"smoothing_{smoothing}", "contiguous", shape, label_smoothing=smoothing, reduction="none")
    yield _case("softcap", "contiguous", _Shape((7, 33)), softcap=3.0, reduction="none")
    yield _case("ignore_index_0", "contiguous", _Shape((9, 7), ignored=0), reduction="mean")
    yield _case("ignore_index_last", "contiguous", _Shape((9, 7), weight=True, ignored=6), reduction="none")
    yield _case("outliers", "contiguous", _Shape((8, 100), kind="outliers"), reduction="none")


def _matrix_cases() -> Iterator[Case]:
    yield from _option_cases()
    yield _case("columns_2_apart", "strided", _Shape((6, 37), weight=True, input_memory="strided"), reduction="none")
    both: Any = {"input_memory": "strided", "target_memory": "strided", "weight_memory": "strided"}
    yield _case("all_2_apart", "strided", _Shape((6, 37), weight=True, **both), **EVERYTHING)
    yield _case("probabilities_2_apart", "strided", _Shape((6, 37), True, weight=True, **both), reduction="none")
    rows: Any = {"input_memory": _every, "target_memory": _every}
    yield _case("rows_2_apart", "strided", _Shape((6, 37), **rows), reduction="none")
    yield _case("rows_2_apart_probabilities", "strided", _Shape((6, 37), True, **rows), reduction="none")
    stretched: Any = {"input_memory": "expanded", "target_memory": "expanded", "weight_memory": "expanded"}
    yield _case("rows_stride_0", "expanded", _Shape((6, 33), weight=True, **stretched), reduction="none")
    yield _case("probabilities_stride_0", "expanded", _Shape((6, 33), True, **stretched), **EVERYTHING)
    along = _Shape((6, 33), input_memory=partial(expanded, dim=1), target_memory="offset")
    yield _case("along_stride_0", "expanded", along, reduction="none")
    apart: Any = {"input_memory": "offset", "target_memory": "offset", "weight_memory": "offset"}
    yield _case("unaligned", "offset", _Shape((7, 33), weight=True, **apart), reduction="none")
    yield _case("probabilities_unaligned", "offset", _Shape((7, 33), True, weight=True, **apart), **EVERYTHING)
    for reduction in ("mean", "sum", "none"):
        for size in ((0, 5), (0, 5, 3), (2, 5, 0)):
            name = "x".join(map(str, size))
            yield _case(f"{name}_{reduction}", "empty", _Shape(size), bites=False, reduction=reduction)
            shape = _Shape(size, True, weight=True)
            yield _case(f"{name}_probabilities_{reduction}", "empty", shape, bites=False, reduction=reduction)
    for classes in (2, 3, 5, 15, 16, 17, 31, 33, 63, 65):
        yield _case(f"classes_{classes}", "tail", _Shape((5, classes)), reduction="none")
        shape = _Shape((5, classes), weight=True)
        yield _case(f"classes_{classes}_everything", "tail", shape, reduction="none", **EVERYTHING)
        shape = _Shape((5, classes), True, weight=True)
        yield _case(f"classes_{classes}_probabilities", "tail", shape, label_smoothing=0.2)
    rows = {"input_memory": "padded_rows", "target_memory": "padded_rows"}
    yield _case("rows_apart", "padded_rows", _Shape((6, 65), weight=True, **rows), reduction="none")
    yield _case("whole_vectors_rows_apart", "padded_rows", _Shape((6, 64), **rows), reduction="none")
    yield _case("probabilities_rows_apart", "padded_rows", _Shape((6, 65), True, **rows), **EVERYTHING)
    turned: Any = {"input_memory": "transposed", "target_memory": "transposed"}
    yield _case("classes_first", "transposed", _Shape((23, 18), **turned), reduction="none")
    yield _case("probabilities_classes_first", "transposed", _Shape((23, 18), True, **turned), **EVERYTHING)
    yield _case("classes_last", "transposed", _Shape((4, 18, 9), input_memory=_permuted), reduction="none")
    deep: Sequence[tuple[int, ...]] = ((3, 17, 5), (2, 17, 3, 4), (2, 6, 3, 2, 2))
    for dims in deep:
        name = "x".join(map(str, dims))
        yield _case(name, "leading_dims", _Shape(dims, weight=True), reduction="none")
        yield _case(f"{name}_probabilities", "leading_dims", _Shape(dims, True), **EVERYTHING)
    yield _case("vector", "one_row", _Shape((1000,)), bites=False)
    yield _case("vector_probabilities", "one_row", _Shape((1000,), True, weight=True), **EVERYTHING)
    yield _case("vector_everything", "one_row", _Shape((65,), weight=True), reduction="sum", **EVERYTHING)
    yield _case("one_long_row", "one_row", _Shape((1, 4097)), reduction="none")
    for smoothing in (0.0, 0.1):
        large, specials = ("large", "specials") if not smoothing else ("large_smoothed", "specials_smoothed")
        options: Any = {"reduction": "none", "label_smoothing": smoothing, "bites": False}
        yield _case(large, "large_magnitude", _Shape((7, 40)), make=_large, **options)
        yield _case(specials, "nonfinite", _Shape((13, 37)), make=_nonfinite, **options)
    yield _case("specials_capped", "nonfinite", _Shape((13, 37)), make=_nonfinite, reduction="none", softcap=5.0)
    yield _case("specials_mean", "nonfinite", _Shape((13, 37)), make=_nonfinite, bites=False)


def _wide_cases() -> Iterator[Case]:
    for classes in (4, 7, 8, 9, 64, 100, 255, 1000, 4096, 4099):
        yield _case(f"wide_{classes}", "tail", _Shape((5, classes), weight=True), wide=True, reduction="none")
        shape = _Shape((5, classes), weight=True)
        yield _case(f"wide_{classes}_everything", "tail", shape, wide=True, reduction="none", **EVERYTHING)
        shape = _Shape((5, classes), True)
        yield _case(f"wide_{classes}_probabilities", "tail", shape, wide=True, reduction="none", label_smoothing=0.1)
    yield _case("wide_50257", "one_row", _Shape((4, 50257)), wide=True, reduction="none")
    yield _case("wide_many_rows", "contiguous", _Shape((3001, 33), weight=True), wide=True, reduction="none")
    yield _case("wide_many_rows_mean", "contiguous", _Shape((3001, 33), weight=True), wide=True, **EVERYTHING)
    yield _case("wide_images", "leading_dims", _Shape((3, 20, 13, 11)), wide=True, reduction="none")


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (5, 4), **options)


def _t(*values: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.tensor(values or (0, 1, 2, 3, 0), dtype=dtype)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("cross_entropy", name, call, error, ("cross_entropy", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, t, f = _x(), _t(), cross_entropy
    both = (TypeError, ValueError)
    yield _public("input_list", lambda: f([1.0], t), TypeError, "input", "list")
    yield _public("target_list", lambda: f(x, [1]), TypeError, "target", "list")
    yield _public("target_none", lambda: f(x, None), TypeError, "target", "NoneType")
    yield _public("weight_list", lambda: f(x, t, [1.0] * 4), TypeError, "weight", "list")
    yield _public("reduction", lambda: f(x, t, reduction="avg"), ValueError, "reduction", "'avg'")
    yield _public("reduction_code", lambda: f(x, t, reduction=1), both, "reduction", "1")
    yield _public("smoothing_high", lambda: f(x, t, label_smoothing=1.1), ValueError, "label_smoothing", "1.1")
    yield _public("smoothing_low", lambda: f(x, t, label_smoothing=-0.1), ValueError, "label_smoothing", "-0.1")
    yield _public("smoothing_nan", lambda: f(x, t, label_smoothing=float("nan")), ValueError, "label_smoothing", "nan")
    yield _public("softcap_negative", lambda: f(x, t, softcap=-1.0), ValueError, "softcap", "-1")
    yield _public("softcap_nan", lambda: f(x, t, softcap=float("nan")), ValueError, "softcap", "nan")
    yield _public("input_integer", lambda: f(x.int(), t), TypeError, "input", "int32")
    yield _public("input_complex", lambda: f(x.to(torch.complex64), t), TypeError, "input", "complex64")
    yield _public("input_scalar", lambda: f(torch.ones(()), t), ValueError, "input")
    yield _public("target_length", lambda: f(x, t[:4]), ValueError, "target", "(5,)", "(4,)")
    yield _public("target_2d", lambda: f(x, t[:, None]), ValueError, "target", "(5,)", "(5, 1)")
    yield _public("target_of_vector", lambda: f(_x(4), t[:1]), ValueError, "target", "()", "(1,)")
    yield _public("target_int32", lambda: f(x, t.int()), TypeError, "target", "int32")
    yield _public("target_bool", lambda: f(x, t.bool()), TypeError, "target", "bool")
    yield _public("probabilities_shape", lambda: f(x, _x(5, 3)), ValueError, "target", "(5, 4)", "(5, 3)")
    yield _public("probabilities_ignore", lambda: f(x, _x(5, 4), ignore_index=1), ValueError, "ignore_index")
    yield _public("weight_length", lambda: f(x, t, _x(5)), ValueError, "weight", "(4,)", "(5,)")
    yield _public("weight_2d", lambda: f(x, t, _x(5, 4)), ValueError, "weight", "(4,)", "(5, 4)")
    yield _public("weight_dtype", lambda: f(x, t, _x(4).double()), both, "weight", "float64")
    yield _public("target_device", lambda: f(x, t.to("meta")), both, "target", "meta")
    yield _public("weight_device", lambda: f(x, t, _x(4).to("meta")), both, "weight", "meta")
    yield _public("sparse", lambda: f(x.to_sparse(), t), (TypeError, NotImplementedError), "sparse")
    # Torch's own words where the reference runs it: "Target 4 is out of bounds."
    for index in (4, -1, -101, 2**62):
        yield InvalidCall(
            "cross_entropy",
            f"target_is_{index}".replace("-", "m"),
            lambda index=index: f(x, _t(0, 1, 2, 3, index)),  # type: ignore[misc]
            IndexError,
            (str(index),),
        )


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("cross_entropy", name, call, error, ("cross_entropy", *words), raw=True)


def _fwd(
    input: Tensor | None = None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    *options: float,
) -> object:
    defaults = (1, IGNORED, 0.0, 0.0, 0.0)
    given = (*options, *defaults[len(options) :])
    x, t = _x() if input is None else input, _t() if target is None else target
    return torch.ops.fastnn.cross_entropy_fwd(x, t, weight, *given, True)


def _bwd(*options: float, **tensors: Tensor) -> object:
    given = (*options, *(1, IGNORED, 0.0, 0.0, 0.0)[len(options) :])
    names = ("grad", "input", "target", "weight", "stats", "divisors")
    right = {"grad": _x(1).view(()), "input": _x(), "target": _t(), "stats": _x(5, 2), "divisors": _x(2)}
    return torch.ops.fastnn.cross_entropy_bwd(*({**right, **tensors}.get(name) for name in names), *given, True)


_TYPES = (TypeError, NotImplementedError)


def _raw_shared_calls() -> Iterator[InvalidCall]:
    """What forward and backward refuse alike."""
    nan = float("nan")

    def forward(*options: float, **tensors: Tensor) -> object:
        return _fwd(tensors.get("input"), tensors.get("target"), tensors.get("weight"), *options)

    wrong: Sequence[tuple[str, dict[str, Tensor], Any, tuple[str, ...]]] = (
        ("rank_1", {"input": _x(4)}, ValueError, ("input", "(4,)")),
        ("rank_3", {"input": _x(5, 4, 1)}, ValueError, ("input", "(5, 4, 1)")),
        ("scalar", {"input": torch.ones(())}, ValueError, ("input", "()")),
        ("input_int32", {"input": _x(dtype=torch.int32)}, _TYPES, ("input", "int32")),
        ("input_float64", {"input": _x(dtype=torch.float64)}, _TYPES, ("input", "float64")),
        ("no_classes", {"input": _x(5, 0)}, IndexError, ("target",)),
        ("target_short", {"target": _t(0, 1)}, ValueError, ("(5,)", "(2,)")),
        ("target_long", {"target": torch.zeros(10**6, dtype=torch.long)}, ValueError, ("(5,)", "(1000000,)")),
        ("target_2d", {"target": _t()[:, None]}, ValueError, ("(5,)", "(5, 1)")),
        ("target_scalar", {"target": torch.tensor(0)}, ValueError, ("(5,)", "()")),
        ("target_int32", {"target": _t(dtype=torch.int32)}, _TYPES, ("target", "int32")),
        ("target_uint8", {"target": _t(dtype=torch.uint8)}, _TYPES, ("target", "uint8")),
        ("probabilities_shape", {"target": _x(5, 3)}, ValueError, ("probabilities", "(5, 4)", "(5, 3)")),
        ("probabilities_rank", {"target": _x(5)}, ValueError, ("probabilities", "(5, 4)", "(5,)")),
        ("probabilities_half", {"target": _x(5, 4).half()}, _TYPES, ("target", "float16")),
        ("weight_long", {"weight": _x(5)}, ValueError, ("weight", "(4,)", "(5,)")),
        ("weight_2d", {"weight": _x(4, 1)}, ValueError, ("weight", "(4,)")),
        ("weight_scalar", {"weight": torch.ones(())}, ValueError, ("weight", "(4,)")),
        ("weight_half", {"weight": _x(4).half()}, (ValueError, *_TYPES), ("weight", "float16")),
        ("index_high", {"target": _t(0, 1, 2, 3, 4)}, IndexError, ("target", "4")),
        ("index_low", {"target": _t(0, 1, 2, 3, -1)}, IndexError, ("target", "-1")),
        ("index_huge", {"target": _t(0, 1, 2, 3, 2**62)}, IndexError, ("target",)),
    )
    calls: tuple[tuple[str, Callable[..., object]], ...] = (("fwd", forward), ("bwd", _bwd))
    for side, call in calls:
        for name, tensors, error, words in wrong:
            yield _raw(f"{side}_{name}", partial(call, **tensors), error, side, *words)
        for code in (-1, 3, 2**40):
            yield _raw(f"{side}_reduction_{code}", partial(call, code), ValueError, side, "reduction", str(code))
        for smoothing in (-0.5, 1.5, nan):
            name, message = f"{side}_smoothing_{smoothing}", "label_smoothing"
            yield _raw(name, partial(call, 1, IGNORED, smoothing), ValueError, side, message)
        for cap in (-1.0, nan):
            yield _raw(f"{side}_softcap_{cap}", partial(call, 1, IGNORED, 0.0, 0.0, cap), ValueError, side, "softcap")


def _raw_calls() -> Iterator[InvalidCall]:
    yield from _raw_shared_calls()
    yield _raw("fwd_sparse", lambda: _fwd(_x().to_sparse()), _TYPES)
    yield _raw("bwd_stats_short", lambda: _bwd(stats=_x(4, 2)), ValueError, "stats", "(4, 2)")
    yield _raw("bwd_stats_wide", lambda: _bwd(stats=_x(5, 3)), ValueError, "stats", "(5, 3)")
    yield _raw("bwd_stats_half", lambda: _bwd(stats=_x(5, 2).half()), (ValueError, *_TYPES), "stats")
    yield _raw("bwd_stats_strided", lambda: _bwd(stats=_x(5, 4)[:, ::2]), ValueError, "stats")
    yield _raw("bwd_divisors", lambda: _bwd(divisors=_x(1)), ValueError, "divisors", "(1,)")
    yield _raw("bwd_divisors_half", lambda: _bwd(divisors=_x(2).half()), (ValueError, *_TYPES), "divisors")
    yield _raw("bwd_grad_rows", lambda: _bwd(grad=_x(5)), ValueError, "grad", "(5,)")
    yield _raw("bwd_grad_of_none", lambda: _bwd(0, grad=_x(4)), ValueError, "grad", "(4,)")
    yield _raw("bwd_grad_of_none_scalar", lambda: _bwd(0, grad=torch.ones(())), ValueError, "grad", "()")
    yield _raw("bwd_grad_half", lambda: _bwd(grad=torch.ones(()).half()), _TYPES, "grad", "float16")
    yield _raw(
        "fwd_wants_gradient",
        lambda: torch.ops.fastnn.cross_entropy_fwd(_x(requires_grad=True), _t(), None, 1, IGNORED, 0.0, 0.0, 0.0),
        RuntimeError,
        "cross_entropy_fwd",
        "grad",
    )


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
