"""Cases and invalid calls of masked_softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.masked_softmax import masked_softmax as public_masked_softmax
from ...ops.masked_softmax import masked_softmax_reference
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]

masked_softmax: Callable[..., Tensor] = public_masked_softmax  # called wrongly too


@dataclass(frozen=True)
class _Masked:
    """What a case calls and what its tensors look like."""

    shape: tuple[int, ...] = (2, 3, 5, 34)
    mask: str = "bool"
    """bool, own (additive, of the input's type), float32 or none."""
    mask_shape: tuple[int, ...] | None = None
    """The input's unless given."""
    scale: float = 0.4
    causal: bool = False
    kind: Fill = "normal"
    memory: str | Arrange = "contiguous"
    mask_memory: str = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """Of a boolean mask two of three take part, and nothing in the second row."""
        values = fill(self.shape, dtype, generator, self.kind)
        found = {"input": arrange(values, self.memory) if isinstance(self.memory, str) else self.memory(values)}
        if self.mask == "none":
            return found
        shape = self.shape if self.mask_shape is None else self.mask_shape
        drawn = torch.randn(shape, generator=generator)
        if self.mask == "bool":
            mask = drawn > -0.4
        else:
            half = dtype in (torch.bfloat16, torch.float16)
            own = torch.float32 if half and self.mask == "float32" else dtype
            mask = drawn.masked_fill(drawn < -1, -torch.inf).to(own)
        if mask.numel() == 1:
            mask = torch.ones_like(mask)
        elif mask.dim() > 1 and mask.shape[-2] > 1:
            mask[..., 1, :] = False if self.mask == "bool" else -torch.inf
        found["mask"] = arrange(mask, self.mask_memory)
        return found

    def call(self, inputs: Inputs) -> Tensor:
        return masked_softmax(inputs["input"], inputs.get("mask"), self.scale, self.causal)

    def reference(self, inputs: Inputs) -> Tensor:
        """The same in plain PyTorch."""
        return masked_softmax_reference(inputs["input"], inputs.get("mask"), self.scale, self.causal)


def _case(
    name: str,
    layout: str,
    call: _Masked,
    *,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    return Case(
        op="masked_softmax",
        name=name,
        layout=layout,
        make=make or call.make,
        call=call.call,
        reference=call.reference,
        forward_kernel="masked_softmax_fwd",
        backward_kernel="masked_softmax_bwd",
        differentiable=("input",),
        wide=wide,
        bites=bites,
    )


def _hidden(value: float, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """This value wherever the mask hides it, and in the tail of the last row, where nothing is hidden."""
    found = _Masked((7, 37)).make(dtype, generator)
    found["mask"][-1] = True
    found["input"] = found["input"].masked_fill(~found["mask"], value)
    found["input"][-1, -1] = value
    return found


def _large(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Magnitudes up to 3e4 and rows shifted by them: exp overflows unless the maximum is subtracted."""
    found = _Masked((6, 40), mask="own").make(dtype, generator)
    values = torch.randn(6, 40, generator=generator)
    values[:2] *= 1e4
    values[2:4] -= 3e4
    values[4:] += 3e4
    return {**found, "input": values.clamp(-6e4, 6e4).to(dtype)}


def _matrix_cases() -> Iterator[Case]:
    for mask in ("bool", "own", "float32", "none"):
        yield _case(f"rows_{mask}", "contiguous", _Masked((7, 67), mask))
    for mask in ("bool", "own"):
        yield _case(f"causal_{mask}", "contiguous", _Masked((2, 9, 9), mask, causal=True))
    yield _case("outliers", "contiguous", _Masked((8, 100), "own", kind="outliers"), bites=False)
    for shape in ((5, 34), (3, 1, 34), (2, 1, 1, 34), (2, 3, 5, 1), (34,), (1,), ()):
        name = "x".join(map(str, shape)) or "scalar"
        yield _case(f"mask_{name}", "leading_dims", _Masked(mask_shape=shape))
    for shape in ((3, 1, 34), (2, 3, 5, 1)):
        yield _case(f"mask_{'x'.join(map(str, shape))}_own", "leading_dims", _Masked(mask="own", mask_shape=shape))
    yield _case("negative_scale", "contiguous", _Masked((5, 33), scale=-1.7))
    yield _case("zero_scale", "contiguous", _Masked((5, 33), scale=0.0), bites=False)
    for layout, name in (("strided", "every_other"), ("padded_rows", "rows_apart"), ("transposed", "turned")):
        for mask in ("bool", "own"):
            yield _case(f"{name}_{mask}", layout, _Masked((5, 50), mask, memory=layout, mask_memory=layout))
    yield _case("rows_stride_0", "expanded", _Masked((4, 33), mask_memory="expanded", memory="expanded"))
    yield _case("columns_stride_0", "expanded", _Masked((4, 34), memory=partial(expanded, dim=1)))
    yield _case("unaligned", "offset", _Masked((7, 33), "own", memory="offset", mask_memory="offset"))
    for shape in ((0, 5), (5, 0), (0,), (3, 0, 4)):
        yield _case("x".join(map(str, shape)), "empty", _Masked(shape))
        yield _case("x".join(map(str, shape)) + "_alone", "empty", _Masked(shape, "none", causal=len(shape) > 1))
    for length in (1, 2, 3, 5, 15, 16, 17, 31, 33):
        yield _case(f"length_{length}", "tail", _Masked((5, length)), bites=length > 1)
        yield _case(f"causal_{length}", "tail", _Masked((35, length), "own", causal=True), bites=length > 1)
        yield _case(f"causal_wide_{length}", "tail", _Masked((length, 50), "none", causal=True), bites=False)
    yield _case("five_dims", "leading_dims", _Masked((2, 1, 3, 2, 5), mask_shape=(1, 3, 1, 5)))
    yield _case("vector", "one_row", _Masked((1000,)))
    yield _case("one_long_row", "one_row", _Masked((1, 4097), "own"))
    yield _case("wide_range", "large_magnitude", _Masked((6, 40), "own"), make=_large, bites=False)
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("minus_inf", float("-inf"))):
        yield _case(f"hidden_{name}", "nonfinite", _Masked((7, 37)), make=partial(_hidden, value), bites=False)


def _wide_cases() -> Iterator[Case]:
    for length in (4, 7, 8, 9, 64, 100, 255, 1000, 4096):
        yield _case(f"wide_{length}", "tail", _Masked((3, length)), wide=True)
        yield _case(f"wide_causal_{length}", "tail", _Masked((64, length), "own", causal=True), wide=True, bites=False)
    yield _case("wide_70000", "one_row", _Masked((2, 70000), "own"), wide=True)
    yield _case("wide_many_rows", "contiguous", _Masked((3001, 33), mask_shape=(33,)), wide=True)
    yield _case("wide_heads", "contiguous", _Masked((2, 5, 67, 67), mask_shape=(2, 1, 1, 67), causal=True), wide=True)
    # Past the caches: 8 MB and more.
    for mask in ("bool", "own"):
        yield _case(f"wide_streamed_{mask}", "contiguous", _Masked((2, 1100, 1024), mask, (1100, 1024)), wide=True)


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (3, 4), **options)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("masked_softmax", name, call, error, ("fastnn.masked_softmax", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, m = _x(), _x(4).bool()
    f = masked_softmax
    yield _public("input_list", lambda: f([1.0]), TypeError, "input", "list")
    yield _public("input_none", lambda: f(None), TypeError, "input", "NoneType")
    yield _public("input_integer", lambda: f(x.int()), TypeError, "input", "int32")
    yield _public("input_bool", lambda: f(x.bool()), TypeError, "input", "bool")
    yield _public("input_sparse", lambda: f(x.to_sparse()), TypeError, "input", "sparse")
    yield _public("input_scalar", lambda: f(torch.ones(())), ValueError, "input", "()")
    yield _public("causal_vector", lambda: f(_x(4), causal=True), ValueError, "two dimensions", "(4,)")
    yield _public("causal_int", lambda: f(x, m, 1.0, 1), TypeError, "causal", "int")
    yield _public("scale_text", lambda: f(x, m, "1"), TypeError, "scale", "str")
    yield _public("scale_bool", lambda: f(x, m, True), TypeError, "scale", "bool")
    yield _public("scale_tensor", lambda: f(x, m, torch.ones(())), TypeError, "scale", "Tensor")
    yield _public("mask_list", lambda: f(x, [True] * 4), TypeError, "mask", "list")
    yield _public("mask_integer", lambda: f(x, m.int()), TypeError, "mask", "int32")
    yield _public("mask_sparse", lambda: f(x, m.to_sparse()), TypeError, "mask", "sparse")
    yield _public("mask_length", lambda: f(x, m[:3]), ValueError, "mask", "(3, 4)", "(3,)")
    yield _public("mask_rows", lambda: f(x, _x(2, 4)), ValueError, "mask", "(3, 4)", "(2, 4)")
    yield _public("mask_rank", lambda: f(x, _x(1, 3, 4)), ValueError, "mask", "(1, 3, 4)")
    yield _public("mask_device", lambda: f(x, m.to("meta")), ValueError, "mask", "meta", "cpu")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("masked_softmax", name, call, error, ("masked_softmax", *words), raw=True)


def _fwd(**given: Any) -> object:
    right = {"input": _x(), "mask": None, "scale": 1.0, "causal": False, "grad_handled": True}
    return torch.ops.fastnn.masked_softmax_fwd(*{**right, **given}.values())


def _bwd(**given: Any) -> object:
    right = {"grad": _x(), "output": _x(), "scale": 1.0, "grad_handled": True}
    return torch.ops.fastnn.masked_softmax_bwd(*{**right, **given}.values())


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    half, double = torch.float16, torch.float64
    calls: Sequence[tuple[str, Callable[..., object], dict[str, Any], Any, tuple[str, ...]]] = (
        ("fwd_integer", _fwd, {"input": _x(dtype=torch.int32)}, _TYPES, ("input", "int32")),
        ("fwd_float64", _fwd, {"input": _x(dtype=double)}, _TYPES, ("input", "float64")),
        ("fwd_scalar", _fwd, {"input": torch.ones(())}, ValueError, ("input", "()")),
        ("fwd_causal_vector", _fwd, {"input": _x(4), "causal": True}, ValueError, ("two dimensions", "(4,)")),
        ("fwd_mask_integer", _fwd, {"mask": _x(4).int()}, _TYPES, ("mask", "int32")),
        ("fwd_mask_float64", _fwd, {"mask": _x(4, dtype=double)}, _TYPES, ("mask", "float64")),
        ("fwd_mask_length", _fwd, {"mask": _x(10**6)}, ValueError, ("mask", "(3, 4)")),
        ("fwd_mask_rank", _fwd, {"mask": _x(1, 3, 4)}, ValueError, ("mask", "(1, 3, 4)")),
        ("fwd_sparse", _fwd, {"input": _x().to_sparse()}, Exception, ()),
        ("bwd_float64", _bwd, {"output": _x(dtype=double)}, _TYPES, ("output", "float64")),
        ("bwd_scalar", _bwd, {"output": torch.ones(())}, ValueError, ("output",)),
        ("bwd_grad_half", _bwd, {"grad": _x(dtype=half)}, _TYPES, ("grad", "float16")),
        ("bwd_grad_shape", _bwd, {"grad": _x(3, 3)}, ValueError, ("grad", "(3, 4)", "(3, 3)")),
        ("bwd_grad_rank", _bwd, {"grad": _x(12)}, ValueError, ("grad", "(12,)")),
    )
    for name, call, given, error, words in calls:
        yield _raw(name, partial(call, **given), error, *words)
    yield _raw(
        "fwd_wants_gradient",
        lambda: _fwd(input=_x(requires_grad=True), grad_handled=False),
        RuntimeError,
        "masked_softmax_fwd",
        "grad",
    )


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
