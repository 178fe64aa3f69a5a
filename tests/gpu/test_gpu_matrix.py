"""The matrix on GPUs: op x dtype x backend x layout x {forward, each gradient}, by the policy of all targets."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from gpu_lanes import LANES, need

from fastnn import testing
from fastnn.testing import LAYOUTS, cases, op_names
from fastnn.testing.devices import on_device
from fastnn.testing.targets import Target

REFERENCE = Target("reference", device="cuda")
ROWS = [
    pytest.param(op, dtype, target, layout, id=f"{op}-{dtype}-{target}-{layout}")
    for op in op_names()
    for target in (REFERENCE, *LANES)
    for dtype in target.dtypes
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("op", "dtype", "target", "layout"), ROWS)
def test_gpu_cell(op, dtype, target, layout, record_property):
    need(target, op)
    found = [case for case in cases(op) if case.layout == layout and not case.wide and target.takes(case)]
    assert found, f"{op} has no case of layout {layout}"
    cells, parts, failures = set(), defaultdict(lambda: [0.0, 0.0, 0.0]), []
    for case in found:
        try:
            verdict = testing.check(case, dtype, target)
        except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # nothing runs in this process any more
            failures.append(f"{case.name}: {type(error).__name__}: {error}")
            continue
        cells |= verdict.cells
        if layout in ("large_magnitude", "nonfinite"):
            continue  # errors of huge values would hide all others
        for part, measured in verdict.measured.items():
            worst = parts["forward" if part == "forward" else "gradients"]
            worst[0] = max(worst[0], measured.error)
            worst[1] = max(worst[1], measured.rival_error)
            worst[2] = max(worst[2], measured.error / measured.allowed if measured.allowed else 0.0)
    for part, worst in parts.items():
        record_property(part, worst)
    record_property("cells", len(cells))
    assert not failures, f"{len(failures)} of {len(found)} cases:\n" + "\n".join(failures)
    wanted = {part for case in found for part in case.parts}
    assert {cell.part for cell in cells} == wanted


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("op", op_names())
def test_wide_shapes(op, lane, dtype):
    """The sweeps' sizes; every third, for time."""
    need(lane, op)
    for case in [case for case in cases(op) if case.wide and lane.takes(case)][::3]:
        testing.check(case, dtype, lane)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("op", op_names())
def test_numbers_are_those_of_the_cpu_kernels(op, lane, dtype, record_property, extension):
    """The same inputs: the GPU's result is as close to the truth as twice what our CPU kernel's is."""
    need(lane, op)
    largest = 0.0
    for case in [case for case in cases(op) if case.layout == "contiguous" and not case.wide and lane.takes(case)]:
        inputs = case.inputs(testing.DTYPES[dtype])
        with torch.no_grad():
            with lane.forced():
                ours = case.call(on_device(inputs, "cuda")).cpu()
            cpu = case.call(inputs)
            truth = case.reference({n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
            torchs = (case.rival or case.reference)(inputs)
        worse = max((cpu, torchs), key=lambda t: (t.double() - truth).abs().nan_to_num(0).max().item())
        testing.assert_within_budget(ours, truth, worse, ours.dtype, 2.0, where=f"{case.op}/{case.name} {dtype} {lane}")
        difference = (ours.double() - cpu.double()).abs().nan_to_num(0).max().item() if ours.numel() else 0.0
        largest = max(largest, difference)
    record_property("largest_difference_to_cpu", largest)
