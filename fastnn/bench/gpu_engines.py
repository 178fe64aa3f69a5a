"""Contenders on GPUs beside torch: Liger's Triton kernels, flash-attention. Imported only where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..testing.bench_cases import BenchCase, Results
from ..testing.cases import Inputs
from .contenders import Contender, Runner, register

_EPS = 1e-5

_LIGER: dict[str, Callable[[Any, Inputs], Tensor]] = {
    "softmax": lambda f, x: f.liger_softmax(x["input"]),
    "cross_entropy": lambda f, x: f.liger_cross_entropy(x["input"], x["target"]),
    "layernorm": lambda f, x: f.liger_layer_norm(x["input"], x["weight"], x["bias"], _EPS),
    "rmsnorm": lambda f, x: f.liger_rms_norm(x["input"], x["weight"], _EPS, in_place=False),
    "swiglu": lambda f, x: f.liger_swiglu(x["gate"], x["up"]),
}
"""Name of a row without its direction -> the call of `liger_kernel.transformers.functional`."""


def _stem(case: BenchCase) -> str:
    return case.name.rpartition("_")[0]


def _own(inputs: Inputs) -> Inputs:
    """Copies: some of Liger's kernels write their gradient over their input."""
    return {name: t.clone() for name, t in inputs.items()}


@register
class Liger(Contender):
    """Liger's Triton kernels, for the rows whose ops it has."""

    name, packages, install, devices = "liger", ("liger_kernel",), "pip install liger-kernel", ("cuda",)

    def why_not(self, case: BenchCase) -> str:
        """It has softmax, cross-entropy, the norms without a residual and SwiGLU of two tensors."""
        if _stem(case) not in _LIGER or case.direction == "bwd":
            return "Liger has no function for it"
        return ""

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """Its function, timed on copies of the inputs, judged on fresh ones."""
        functional = importlib.import_module("liger_kernel.transformers.functional")
        call, timed = _LIGER[_stem(case)], _own(inputs)

        def run(given: Inputs) -> Results:
            return case.run(lambda x: call(functional, x), given)

        return Runner(lambda: run(timed), lambda: run(_own(inputs)))


@register
class FlashAttention(Contender):
    """flash-attention's kernels in half precision."""

    name, packages, devices = "flash_attn", ("flash_attn",), ("cuda",)
    install = "pip install flash-attn --no-build-isolation (compiles for an hour)"

    def why_not(self, case: BenchCase) -> str:
        """Attention in half precision."""
        if case.family != "attention":
            return "attention alone"
        return "" if case.dtype in ("bf16", "fp16") else "has no kernels for float32"

    def prepare(self, case: BenchCase, inputs: Inputs, threads: int, setting: str) -> Runner:
        """Heads inside, as it wants them: views of the same memory."""
        function = importlib.import_module("flash_attn").flash_attn_func
        causal = case.name.endswith("causal")

        def call(given: Inputs) -> Tensor:
            query, key, value = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
            found: Tensor = function(query, key, value, causal=causal).transpose(1, 2)
            return found

        def run() -> Results:
            return case.run(call, inputs)

        return Runner(run, run)
