"""Who takes part: our own ways to run a case, and everybody else's. One class each, registered by name.

A contender says whether it is installed, which cases it can run, and prepares a case: the call that is timed, and the
results that must agree with the truth before a time counts.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from .._dispatch import use_backend, why_no_kernel
from ..testing.bench_cases import BenchCase, Results
from ..testing.cases import Inputs
from .allocators import PLAIN, TUNED

OURS = "fastnn"
"""Our name; a labelled way is `fastnn <label>`."""

_EVERYWHERE = ("cpu", "cuda")


@dataclass(frozen=True)
class Runner:
    """A prepared case."""

    call: Callable[[], object]
    """What is timed."""
    results: Callable[[], Results]
    """Runs once and gives what it computed, in the case's dtype."""
    output: Literal["fresh", "reused"] = "fresh"
    """Whether each call allocates its result, as in a model, or writes to the same memory."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """What surrounds the calls, and is not timed."""


class Contender(ABC):
    """Somebody who can run cases."""

    name: str
    packages: tuple[str, ...] = ()
    """Modules it needs, as imported."""
    install: str = ""
    """What to type to get them."""
    settings: tuple[str, ...] = (PLAIN, TUNED)
    """Allocator settings under which it is measured; on a GPU it is the plain one for all."""
    devices: tuple[str, ...] = ("cpu",)
    """Where it runs."""
    frozen = False
    """Whether it treats a case's constants as such (packs weights, say)."""
    native = False
    """Whether it runs on torch's own threads, and so can share a single-threaded process with others that do."""

    def missing(self) -> str:
        """What is not installed, and how to get it; empty where nothing is."""
        lacking = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {self.install}" if lacking else ""

    def why_not(self, case: BenchCase) -> str:
        """Why it cannot run the case, in words; empty where it can."""
        return ""

    @abstractmethod
    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """Makes the case ready to run; whatever it raises is the reason why it does not take part."""


CONTENDERS: dict[str, Contender] = {}
"""Everybody else, by name, in the order of the tables."""


def register(contender: type[Contender]) -> type[Contender]:
    """Adds a contender."""
    CONTENDERS[contender.name] = contender()
    return contender


class Ours(Contender):
    """One of our ways to run a case."""

    native, devices = True, _EVERYWHERE

    def __init__(self, label: str) -> None:
        self.label = label
        self.name = f"{OURS} {label}".strip()

    def why_not(self, case: BenchCase) -> str:
        """Whether the case has a way of that label, and its op a kernel of the backend that is forced."""
        ways = [way for way in case.ours if way.label == self.label]
        if not ways:
            return "no such way to run this row"
        op, backend = ways[0].kernel.rpartition("_")[0], ways[0].backend
        return why_no_kernel(op, backend) if backend else ""

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """As the case's family says."""
        way = next(way for way in case.ours if way.label == self.label)
        if not way.backend:
            call = way.prepare(inputs)
            return Runner(call, call)
        with use_backend(way.backend):
            call = way.prepare(inputs)
        return Runner(call, call, around=partial(use_backend, way.backend))


@register
class Eager(Contender):
    """Torch as people call it."""

    name, native, devices = "eager", True, _EVERYWHERE

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """The plain call."""

        def call() -> Results:
            return case.run(case.torch_call, inputs)

        return Runner(call, call)


@register
class ByHand(Contender):
    """Torch as an expert writes it."""

    name, native, devices = "by_hand", True, _EVERYWHERE

    def why_not(self, case: BenchCase) -> str:
        """Most plain calls are the best one."""
        return "" if case.by_hand is not None else "the plain call is the way to write it"

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """The family's rewriting."""
        by_hand = case.by_hand
        if by_hand is None:
            raise ValueError(self.why_not(case))

        def call() -> Results:
            return case.run(by_hand, inputs)

        return Runner(call, call)


@register
class EagerOut(Contender):
    """Torch writing into a result that is there already."""

    name, native, devices = "eager_out", True, _EVERYWHERE

    def why_not(self, case: BenchCase) -> str:
        """Only some functions have `out=`."""
        return "" if case.out_call is not None else "torch has no out= for it"

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """The call with `out=`."""
        into = case.out_call
        if into is None:
            raise ValueError(self.why_not(case))
        (out,) = (torch.empty_like(t) for t in case.run(case.torch_call, inputs))

        def results() -> Results:
            into(inputs, out)
            return (out,)

        return Runner(lambda: into(inputs, out), results, "reused")


@register
class Compile(Contender):
    """`torch.compile` of the eager call."""

    name, native, devices = "compile", True, _EVERYWHERE

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """Compiles for exactly these shapes."""
        torch.compiler.reset()
        compiled: Any = torch.compile(case.torch_call, dynamic=False, fullgraph=True)

        def call() -> Results:
            return case.run(compiled, inputs)

        call()
        return Runner(call, call)


class Special(Contender):
    """Runs the cases whose family says how (quantised formats of its own)."""

    def why_not(self, case: BenchCase) -> str:
        """Most families have nothing for it."""
        return "" if self.name in case.special else f"has nothing like it outside torch's own ops ({case.family})"

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """As the case's family says."""
        call = case.special[self.name](inputs, threads)
        return Runner(call, call)


def onnx_why_not(case: BenchCase) -> str:
    """Why a case has no ONNX graph; empty where it has one."""
    has = case.onnx_file is not None or (case.onnx and case.direction == "fwd")
    return "" if has else "no ONNX graph (forward rows have one)"


def contender(name: str) -> Contender:
    """The contender of that name, ours or registered.

    Raises:
        ValueError: an unknown name.
    """
    first, _, label = name.partition(" ")
    if first == OURS:
        return Ours(label)
    if name not in CONTENDERS:
        raise ValueError(f"fastnn.bench: unknown contender {name!r}; known: {', '.join(CONTENDERS)}")
    return CONTENDERS[name]


from . import engines as engines  # noqa: E402  (registers the engines beside torch)
from . import gpu_engines as gpu_engines  # noqa: E402  (registers those for GPUs)
