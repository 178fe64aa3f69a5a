"""Cases and invalid calls of dropout_add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.dropout_add import dropout_add as public_dropout_add
from ...ops.dropout_add import dropout_add_reference
from ..cases import Case, Inputs, InvalidCall
from ..inputs import Fill, arrange, expanded, fill

Arrange = Callable[[Tensor], Tensor]

dropout_add: Callable[..., Tensor] = public_dropout_add  # called wrongly too
_SEED = 5
"""Of torch's generator, before a call."""


@dataclass(frozen=True)
class _Drop:
    """What a case calls and what its tensors look like."""

    shape: tuple[int, ...] = (7, 67)
    p: float = 0.3
    kind: Fill = "normal"
    memory: str | Arrange = "contiguous"

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        found = {}
        for name in ("input", "residual"):
            values = fill(self.shape, dtype, generator, self.kind)
            found[name] = arrange(values, self.memory) if isinstance(self.memory, str) else self.memory(values)
        return found

    def call(self, inputs: Inputs) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return dropout_add(inputs["input"], inputs["residual"], self.p)

    def reference(self, inputs: Inputs) -> Tensor:
        """The same in plain PyTorch."""
        return dropout_add_reference(inputs["input"], inputs["residual"], drawn_seed(), self.p)


def drawn_seed() -> Tensor:
    """The seed that the call of a case draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return torch.randint(0, 2**62, ())


def _case(
    name: str,
    layout: str,
    call: _Drop,
    *,
    make: Callable[[torch.dtype, torch.Generator], Inputs] | None = None,
    wide: bool = False,
    bites: bool = True,
) -> Case:
    return Case(
        op="dropout_add",
        name=name,
        layout=layout,
        make=make or call.make,
        call=call.call,
        reference=call.reference,
        forward_kernel="dropout_add_fwd",
        backward_kernel="dropout_add_bwd",
        differentiable=("input", "residual"),
        wide=wide,
        bites=bites,
    )


def _spoilt(values: Sequence[float], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """With these values at the head, in the body and in the tail of both; the others must not notice."""
    found = _Drop((9, 37)).make(dtype, generator)
    for at, name in enumerate(("input", "residual")):
        for i, value in enumerate(values):
            for column in (at, 20 + at, 36 - at):
                found[name][(i + 4 * at) % 9, column] = value
    return found


def _large(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    sizes = (3e4, -3e4) if dtype == torch.float16 else (1e30, -1e30)
    return _spoilt(sizes, dtype, generator)


def _matrix_cases() -> Iterator[Case]:
    for p in (0.3, 0.5, 0.9, 1.0):
        yield _case(f"rows_{p}", "contiguous", _Drop(p=p))
    yield _case("outliers", "contiguous", _Drop((8, 100), kind="outliers"))
    yield _case("every_other", "strided", _Drop((5, 50), memory="strided"))
    yield _case("rows_stride_0", "expanded", _Drop((4, 33), memory="expanded"))
    yield _case("columns_stride_0", "expanded", _Drop((4, 34), memory=partial(expanded, dim=1)))
    yield _case("unaligned", "offset", _Drop((7, 33), memory="offset"))
    for shape in ((0, 5), (5, 0), (0,), (3, 0, 4)):
        yield _case("x".join(map(str, shape)), "empty", _Drop(shape))
    for length in (1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 65):
        yield _case(f"length_{length}", "tail", _Drop((5, length)))
    yield _case("rows_apart", "padded_rows", _Drop((6, 65), memory="padded_rows"))
    yield _case("transposed", "transposed", _Drop((23, 18), memory="transposed"))
    yield _case("three_dims", "leading_dims", _Drop((3, 4, 17)))
    yield _case("five_dims", "leading_dims", _Drop((2, 1, 3, 2, 5)))
    yield _case("vector", "one_row", _Drop((1000,)))
    yield _case("one_long_row", "one_row", _Drop((1, 4097)))
    yield _case("scalar", "one_row", _Drop(()))
    yield _case("large", "large_magnitude", _Drop((9, 37)), make=_large, bites=False)
    specials = partial(_spoilt, (float("nan"), float("inf"), float("-inf")))
    yield _case("specials", "nonfinite", _Drop((9, 37)), make=specials, bites=False)


def _wide_cases() -> Iterator[Case]:
    for length in (7, 8, 9, 64, 127, 129, 255, 768, 4096):
        yield _case(f"wide_{length}", "tail", _Drop((3, length)), wide=True)
    yield _case("wide_long_row", "one_row", _Drop((2, 40001)), wide=True)  # blocks of 16384 columns
    yield _case("wide_many_rows", "contiguous", _Drop((3001, 33), 0.1), wide=True)
    yield _case("wide_streamed", "contiguous", _Drop((1400, 1024), 0.1), wide=True)  # past the caches


CASES: tuple[Case, ...] = (*_matrix_cases(), *_wide_cases())


def _x(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape or (3, 4), **options)


def _public(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("dropout_add", name, call, error, ("fastnn.dropout_add", *words))


def _public_calls() -> Iterator[InvalidCall]:
    x, f = _x(), dropout_add
    yield _public("input_list", lambda: f([1.0], x), TypeError, "input", "list")
    yield _public("input_none", lambda: f(None, x), TypeError, "input", "NoneType")
    yield _public("input_integer", lambda: f(x.int(), x), TypeError, "input", "int32")
    yield _public("input_sparse", lambda: f(x.to_sparse(), x), TypeError, "input", "sparse")
    yield _public("residual_list", lambda: f(x, [1.0]), TypeError, "residual", "list")
    yield _public("residual_none", lambda: f(x, None), TypeError, "residual", "NoneType")
    yield _public("residual_integer", lambda: f(x, x.int()), TypeError, "residual", "int32")
    yield _public("residual_shape", lambda: f(x, _x(1, 4)), ValueError, "residual", "(3, 4)", "(1, 4)")
    yield _public("residual_device", lambda: f(x, x.to("meta")), ValueError, "residual", "meta", "cpu")
    yield _public("p_text", lambda: f(x, x, "0.5"), TypeError, "p must", "str")
    yield _public("p_bool", lambda: f(x, x, True), TypeError, "p must", "bool")
    yield _public("p_negative", lambda: f(x, x, -0.1), ValueError, "[0, 1]", "-0.1")
    yield _public("p_high", lambda: f(x, x, 1.5), ValueError, "[0, 1]", "1.5")
    yield _public("p_nan", lambda: f(x, x, float("nan")), ValueError, "[0, 1]", "nan")
    yield _public("training_int", lambda: f(x, x, 0.5, 1), TypeError, "training", "int")


def _raw(name: str, call: Callable[[], object], error: Any, *words: str) -> InvalidCall:
    return InvalidCall("dropout_add", name, call, error, ("dropout_add", *words), raw=True)


def _fwd(**given: Any) -> object:
    right = {"input": _x(), "residual": _x(), "seed": torch.tensor(7), "p": 0.5, "grad_handled": True}
    return torch.ops.fastnn.dropout_add_fwd(*{**right, **given}.values())


def _bwd(**given: Any) -> object:
    right = {"grad": _x(), "seed": torch.tensor(7), "p": 0.5, "grad_handled": True}
    return torch.ops.fastnn.dropout_add_bwd(*{**right, **given}.values())


_TYPES = (TypeError, NotImplementedError)


def _raw_calls() -> Iterator[InvalidCall]:
    shared: Sequence[tuple[str, dict[str, Any], Any, tuple[str, ...]]] = (
        ("no_seed", {"seed": None}, ValueError, ("seed",)),
        ("seed_float", {"seed": torch.ones(())}, ValueError, ("seed",)),
        ("seeds", {"seed": torch.arange(2)}, ValueError, ("seed",)),
        ("p_negative", {"p": -0.5}, ValueError, ("[0, 1]", "-0.5")),
        ("p_high", {"p": 2.0}, ValueError, ("[0, 1]", "2")),
        ("p_nan", {"p": float("nan")}, ValueError, ("[0, 1]", "nan")),
    )
    for side, call, first in (("fwd", _fwd, "input"), ("bwd", _bwd, "grad")):
        for name, given, error, words in shared:
            yield _raw(f"{side}_{name}", partial(call, **given), error, side, *words)
        for name in ("int32", "float64"):
            wrong = {first: _x(dtype=getattr(torch, name))}
            yield _raw(f"{side}_{name}", partial(call, **wrong), _TYPES, first, name)
    yield _raw("fwd_sparse", lambda: _fwd(input=_x().to_sparse()), Exception)
    yield _raw("fwd_residual_shape", lambda: _fwd(residual=_x(3, 3)), ValueError, "residual", "(3, 4)", "(3, 3)")
    yield _raw("fwd_residual_rank", lambda: _fwd(residual=_x(12)), ValueError, "residual", "(12,)")
    yield _raw("fwd_residual_half", lambda: _fwd(residual=_x().half()), _TYPES, "residual", "float16")
    yield _raw(
        "fwd_wants_gradient",
        lambda: _fwd(input=_x(requires_grad=True), grad_handled=False),
        RuntimeError,
        "dropout_add_fwd",
        "grad",
    )


INVALID: tuple[InvalidCall, ...] = (*_public_calls(), *_raw_calls())
