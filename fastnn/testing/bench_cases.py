"""The one list of benchmark rows: what is called, how it is called, and what it must at least read, write and compute.

Each family of rows is one module of `fastnn.testing.rows`; adding a family is adding that file: the modules are found,
not listed. How rows are measured and judged is `fastnn.bench`; how wrong a contender may be is `fastnn.testing.policy`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from . import rows
from .cases import DTYPES, Inputs
from .targets import GPU_BACKENDS

Direction = Literal["fwd", "bwd", "fb"]
"""Forward, backward alone, or both."""
_Shape = TypeVar("_Shape")

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Work:
    """What cannot be avoided: each input read once, each output written once, the operations of the definition.

    Forward and backward together are two passes: what both need is read in both.
    """

    read: int
    """Bytes."""
    written: int
    """Bytes."""
    operations: int
    """A multiply-add counts as two, an exp as `EXP_OPERATIONS`."""
    unit: str = "fp32"
    """Whose peak rate the operations are held to: fp32, bf16 or int8; on GPUs fp32, bf16 or fp16."""

    @property
    def bytes(self) -> int:
        """Read and written together."""
        return self.read + self.written


EXP_OPERATIONS = 32
"""What one exponential counts as: range reduction, a polynomial of degree six, scaling, sum and product."""


@dataclass(frozen=True)
class Bar:
    """How many times faster than the best contender a row should be; None where nothing is asked."""

    plain: float | None = None
    tuned: float | None = None
    """The same against contenders with the tuned allocator, ours running on it as well."""
    holder: str = ""
    """The contender that was best when the bar was set: without it the bar says little."""
    against: tuple[str, ...] = ()
    """The contenders that it counts against (alternatives of the same kind); empty means all of them. No row may be
    behind any contender, whatever this says."""


@dataclass(frozen=True)
class Ours:
    """One of our ways to run a case."""

    label: str
    """What distinguishes it in the row's name; empty for the plain call."""
    prepare: Callable[[Inputs], Callable[[], Results]]
    """Builds what is timed."""
    kernel: str
    """The kernel that must be recorded."""
    bar: Bar = field(default_factory=Bar)
    frozen: bool = False
    """Whether the weights count as constants; contenders that treat them so are compared with frozen ways alone."""
    backend: str = ""
    """The backend that is forced; empty where the call chooses."""


@dataclass(frozen=True)
class Node:
    """One operator of a case's ONNX graph, from which the engines that read ONNX are built."""

    operator: str
    inputs: tuple[str, ...]
    """Names of the case's inputs or of earlier outputs."""
    attributes: Mapping[str, int | float | str | Sequence[int] | Callable[[], Tensor]] = field(default_factory=dict)
    """A function stands for the tensor it makes."""
    output: str = "y"
    """The last node's output is the graph's; a name that is given again stands for the later value from then on."""


@dataclass(frozen=True)
class BenchCase:
    """One measurement: an op on a shape in a dtype and a direction."""

    family: str
    name: str
    """As the performance page calls the row, without its dtype: `softmax_fwd`, `linear+gelu_tanh`."""
    direction: Direction
    shape: tuple[int, ...]
    dtype: str
    """A name in `fastnn.testing.DTYPES`."""
    work: Work
    make: Callable[[torch.dtype, torch.Generator], Inputs]
    """Builds the tensors."""
    torch_call: Callable[[Inputs], Tensor | Results]
    """Eager torch: the forward result, or for `bwd` the gradients; the truth when given float64 tensors."""
    ours: tuple[Ours, ...]
    wanted: tuple[str, ...] = ()
    """Inputs whose gradients are taken in direction `fb`; `grad` is then the gradient of the result."""
    measured_by: Callable[[Inputs], Tensor | Results] | None = None
    """Whose error bounds that of contenders, where it is not the plain call's: rows that round their inputs."""
    by_hand: Callable[[Inputs], Tensor | Results] | None = None
    """Torch as somebody writes it who knows which of its ways is fast, where that is not the plain call."""
    out_call: Callable[[Inputs, Tensor], object] | None = None
    """Eager torch into a given result, where it can."""
    constants: tuple[str, ...] = ()
    """Inputs that are constants of a frozen model."""
    onnx: tuple[Node, ...] = ()
    """The graph; empty where there is none."""
    onnx_file: Callable[[Inputs], bytes] | None = None
    """Makes the graph where its operators are no plain ones, as `fastnn.export` writes it."""
    special: Mapping[str, Callable[[Inputs, int], Callable[[], Results]]] = field(default_factory=dict)
    """Contender -> how it runs this case with so many threads, where only the family can know (quantised formats)."""
    sweep: bool = False
    """A shape beside the public rows, measured against eager torch alone."""
    device: str = "cpu"
    """Where its tensors are, as torch names it: `cpu` or `cuda`."""

    @property
    def row(self) -> str:
        """The row's name with its dtype."""
        return f"{self.name}/{self.dtype}"

    @property
    def id(self) -> str:
        """Unique among all cases."""
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.row} ({', '.join(map(str, self.shape))}){where}"

    def inputs(self, seed: int = 0) -> Inputs:
        """Fresh tensors; the same seed gives the same values."""
        with torch.device(self.device):
            return self.make(DTYPES[self.dtype], torch.Generator(self.device).manual_seed(seed))

    def rival(self, inputs: Inputs) -> Results:
        """The results whose errors bound a contender's."""
        return self.run(self.measured_by or self.torch_call, inputs)

    def run(self, call: Callable[[Inputs], Tensor | Results], inputs: Inputs) -> Results:
        """All results of `call`, one of the forms of `torch_call`, in the case's direction."""
        if self.direction == "fb":
            return forward_backward(call, self.wanted, inputs)
        return as_results(call(inputs))


def public_and_sweep(
    case: Callable[[Direction, str, _Shape, Bar, bool], BenchCase],
    public: Mapping[tuple[Direction, str, _Shape], Bar],
    sweep: Iterable[_Shape],
) -> tuple[BenchCase, ...]:
    """The cases of a family whose rows are (direction, dtype, shape): public ones with their bars, and a sweep."""
    directions: tuple[Direction, ...] = ("fwd", "fb")
    found = [case(direction, dtype, shape, bar, False) for (direction, dtype, shape), bar in public.items()]
    every = [(shape, dtype, direction) for shape in sweep for dtype in ("fp32", "bf16") for direction in directions]
    found += [case(direction, dtype, shape, Bar(), True) for shape, dtype, direction in every]
    return tuple(found)


def on_gpu(
    case: BenchCase, by_hand: Callable[[Inputs], Tensor | Results] | None = None, out_call: bool = True
) -> BenchCase:
    """The row on a GPU: one way for each backend there, called as the plain way on the CPU is; without bars.

    Args:
        case: the row as on the CPU.
        by_hand: torch as an expert writes it there.
        out_call: whether the call into a given result takes part too.
    """
    plain = case.ours[0]
    return replace(
        case,
        device="cuda",
        ours=tuple(Ours(backend, plain.prepare, plain.kernel, backend=backend) for backend in GPU_BACKENDS),
        by_hand=by_hand,
        out_call=case.out_call if out_call else None,
        constants=(),
        onnx=(),
        special={},
        sweep=False,
    )


@cache
def families() -> tuple[str, ...]:
    """The families that have rows, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(rows.__path__)))


@cache
def bench_cases(family: str, device: str = "cpu") -> tuple[BenchCase, ...]:
    """All cases of one family on one device, public rows first: a module's `CASES`, or its `GPU_CASES`.

    Raises:
        ValueError: no such family.
    """
    if family not in families():
        raise ValueError(f"fastnn.testing: no family of rows {family!r}; there are {', '.join(families())}")
    module = importlib.import_module(f"{rows.__name__}.{family}")
    found: tuple[BenchCase, ...] = module.CASES if device == "cpu" else module.GPU_CASES
    ids = [case.id for case in found]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    if twice or {case.family for case in found} - {family}:
        raise ValueError(f"fastnn.testing: rows of {family}: ids that occur twice: {twice}, or of another family")
    return found


def find_bench_case(id: str) -> BenchCase:
    """The case of that id."""
    device = "cuda" if id.endswith(" on cuda") else "cpu"
    for family in families():
        for case in bench_cases(family, device):
            if case.id == id:
                return case
    raise KeyError(f"fastnn.testing: no row {id!r}")


def as_results(found: Tensor | Results) -> Results:
    """A tuple of tensors, also of one."""
    return (found,) if isinstance(found, Tensor) else found


def forward_backward(call: Callable[[Inputs], Tensor | Results], wanted: Sequence[str], inputs: Inputs) -> Results:
    """The result of `call` and the gradient of each input in `wanted`, the result's gradient being `inputs["grad"]`."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items() if name != "grad"}
    with torch.enable_grad():
        output = as_results(call(leaves))[0]
    return (output.detach(), *torch.autograd.grad(output, [leaves[name] for name in wanted], inputs["grad"]))
