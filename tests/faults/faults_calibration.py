"""Faults in choosing codes by a calibration, and in layers on codes that run with their activation."""

from __future__ import annotations

from fault import Fault

GPTQ, WALK, TESTS = "fastnn/quant/gptq.py", "fastnn/quant/calibration.py", "tests/test_calibration.py"
BLOCKS = (f"{TESTS}::test_what_a_layer_is_decided_on",)
SMOOTHED = (f"{TESTS}::test_smoothing_leaves_the_function_and_betters_the_rounding",)
CALIBRATION_FAULTS = [
    Fault(
        "gptq: columns beyond a block do not make up for its errors",
        GPTQ,
        "left[stop:].addmm_(upper[start:stop, stop:].t(), lost, alpha=-1)",
        "left[stop:].addmm_(upper[start:stop, stop:].t(), lost, alpha=-0.5)",
        (f"{TESTS}::test_blocks_of_columns_do_not_change_the_result",),
    ),
    Fault(
        "gptq: a column's error is not set against its own share of the inverse",
        GPTQ,
        "(codes[i] * steps[i] + base[i])) / upper[i, i]",
        "(codes[i] * steps[i] + base[i]))",
        (f"{TESTS}::test_the_last_column_takes_what_is_best_for_it",),
    ),
    Fault(
        "gptq: codes stay in the order in which they were found",
        GPTQ,
        "found[order] = codes",
        "found[:] = codes",
        (f"{TESTS}::test_gptq_beats_rounding_to_nearest",),
    ),
    Fault(
        "gptq: codes that are worse than the nearest are kept",
        GPTQ,
        "if not error < nearest:",
        "if error != error:",
        (f"{TESTS}::test_never_worse_than_nearest",),
    ),
    Fault(
        "gptq: the group of a column is that of its place in the order",
        GPTQ,
        "group = order // size",
        "group = order.sort().values // size",
        (f"{TESTS}::test_gptq_beats_rounding_to_nearest",),
    ),
    Fault(
        "calibration: later blocks see what floating blocks give",
        WALK,
        "        _swap(self.model, made)\n",
        "",
        BLOCKS,
    ),
    Fault(
        "calibration: all layers that run have the first one's inputs",
        "fastnn/quant/observe.py",
        "if self._last is None or self._last[0] is not args[0]:",
        "if self._last is None:",
        BLOCKS,
    ),
    Fault(
        "calibration: weights are not in the digest of a part",
        "fastnn/quant/checkpoint.py",
        "self._digest = digest(self._digest, held)",
        "self._digest = digest(self._digest)",
        (f"{TESTS}::test_another_runs_folder_is_refused",),
    ),
    Fault(
        "calibration: blocks whose outputs others take count as a chain",
        "fastnn/quant/chain.py",
        "if agree(result, run(model, inputs)) else",
        "if result is not None else",
        (f"{TESTS}::test_a_model_without_a_chain_is_seen_at_once",),
    ),
    Fault(
        "smoothing: a norm whose output others use is changed",
        WALK,
        "if agree(before, part.run(0)):",
        "if before is not None:",
        (f"{TESTS}::test_a_norm_that_others_use_is_left_alone",),
    ),
    Fault(
        "smoothing: the model's norm keeps its bias",
        "fastnn/quant/fold.py",
        "                if held is not None:",
        '                if held is not None and name == "weight":',
        SMOOTHED,
    ),
    Fault(
        "smoothing: the scale is the inputs' alone",
        "fastnn/quant/smooth.py",
        "inputs.float() ** alpha / most ** (1 - alpha)",
        "inputs.float() ** alpha",
        (f"{TESTS}::test_scales_are_the_papers",),
    ),
    Fault(
        "accelerate: a layer on codes loses the activation after it",
        "fastnn/accelerate/fuse.py",
        "        return linear.run(input, activation)\n    if",
        "        return linear(input)\n    if",
        ("tests/test_quantize.py::test_activations_stay_fused_in_either_order",),
    ),
]
