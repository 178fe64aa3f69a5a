"""What the tests on GPUs share: the lanes (backends, and why one is missing), and calls that stand for every op."""

from __future__ import annotations

import pytest
import torch

from fastnn import testing
from fastnn._dispatch import why_no_kernel
from fastnn.testing.devices import on_device
from fastnn.testing.matrix import _grad_output, _run
from fastnn.testing.targets import GPU_BACKENDS, Target

LANES = [Target(backend, device="cuda") for backend in GPU_BACKENDS]

STAND_FOR = {
    "activation": ("gelu_plain_rows", "silu_float32_bias_rows", "gelu_tanh_pair_rows", "silu_packed_rows"),
    "attention": ("causal", "grouped", "blocked_full", "dropout", "everything", "few"),
    "cross_entropy": ("mean", "everything_mean", "probabilities_mean", "none"),
    "linear": ("None_bias", "gelu_tanh_bias", "relu_bias", "9x49x35"),
    "linear_cross_entropy": ("everything_mean", "none"),
    "dropout_add": ("rows_0.3",),
    "masked_softmax": ("rows_bool", "causal_own"),
    "mlp": ("plain_gelu", "gated_silu"),
    "norm": ("layer_rows", "rms_rows", "add_layer_rows", "add_rms_rows"),
    "rope": ("halves_rows", "neighbours_partial"),
    "softmax": ("rows", "log_rows", "columns"),
}
"""Op -> cases that stand for its kernels where the whole matrix would take too long."""

CASES = [testing.find_case(op, name) for op, names in STAND_FOR.items() for name in names]


def lanes_and_cases():
    """(target, case) for every backend and every case of `STAND_FOR`."""
    return [pytest.param(lane, case, id=f"{lane.backend}-{case.op}-{case.name}") for lane in LANES for case in CASES]


def need(lane: Target, op: str) -> None:
    """Skips, with the reason, where the op has no kernel of that backend in this installation."""
    if lane.backend != "reference" and (reason := why_no_kernel(op, lane.backend)):
        pytest.skip(reason)


def inputs_of(case, dtype, seed=0):
    """A case's inputs on the GPU."""
    return on_device(case.inputs(testing.REFERENCE_DTYPES[dtype], seed), "cuda")


def grad_for(case, dtype, seed=0):
    """A gradient of the case's result, or None where it has none."""
    if not case.differentiable:
        return None
    with torch.no_grad():
        like = (case.rival or case.reference)(case.inputs(testing.REFERENCE_DTYPES[dtype], seed))
    return _grad_output(like, seed, "contiguous").to("cuda")


def results_of(case, inputs, grad):
    """The case's result and gradients."""
    return _run(case, case.call, inputs, grad)
