"""Faults in compression within a budget."""

from __future__ import annotations

from fault import Fault

PART, TESTS = "fastnn/compression/", "tests/test_compression.py"
WITHIN = f"{TESTS}::test_the_metric_stays_within_the_budget_and_the_report_says_what_is_true"
FAILS = (f"{TESTS}::test_a_failure_leaves_the_model_as_it_was[error-2]",)
RESUME = (f"{TESTS}::test_a_search_goes_on_after_a_stop",)

COMPRESSION_FAULTS = [
    Fault(
        "compress: a layer that was tried keeps its class after a failure",
        f"{PART}state.py",
        "            module.__class__ = kind\n",
        "",
        FAILS,
    ),
    Fault(
        "compress: a model is put back after errors alone, not after interrupts",
        f"{PART}verb.py",
        "    finally:\n        if not done:\n            original.put()",
        "    except Exception:\n        original.put()\n        raise",
        (f"{TESTS}::test_a_failure_leaves_the_model_as_it_was[interrupt-2]",),
    ),
    Fault(
        "compress: what evaluate writes goes into the caller's memory",
        f"{PART}search.py",
        "        copy_tensors(model)\n        _evaluating(model)\n",
        "        _evaluating(model)\n",
        FAILS,
    ),
    Fault(
        "compress: plans may cost twice the budget",
        f"{PART}search.py",
        'found["metrics"]) <= self.options.allowed',
        'found["metrics"]) <= 2 * self.options.allowed',
        (f"{TESTS}::test_a_layer_that_costs_too_much_is_rolled_back_and_no_other",),
    ),
    Fault(
        "compress: plans may use the reserve up",
        f"{PART}options.py",
        "return self.max_drop * (1 - self.reserve)",
        "return self.max_drop",
        (f"{TESTS}::test_no_plan_uses_the_reserve_up",),
    ),
    Fault(
        "compress: a metric that is NaN is within any budget",
        f"{PART}judge.py",
        "return math.inf if math.isnan(lost) else lost",
        "return 0.0 if math.isnan(lost) else lost",
        (f"{TESTS}::test_nan_counts_as_beyond_any_budget",),
    ),
    Fault(
        "compress: steps are tried worst ratio first",
        f"{PART}moves.py",
        "key=lambda move: -move.ratio",
        "key=lambda move: move.ratio",
        (f"{TESTS}::test_steps_are_those_of_the_best_plan_for_any_price",),
    ),
    Fault(
        "compress: of a layer's options the one that costs least is taken, not the best step",
        f"{PART}moves.py",
        "ratio, best = max(",
        "ratio, best = min(",
        (f"{TESTS}::test_steps_are_those_of_the_best_plan_for_any_price",),
    ),
    Fault(
        "compress: what is slower is tried for latency",
        f"{PART}moves.py",
        "            if saved <= 0:\n",
        "            if saved <= -1e9:\n",
        (f"{TESTS}::test_what_is_slower_is_not_taken_for_latency",),
    ),
    Fault(
        "compress: a model that is not faster is left in place",
        f"{PART}search.py",
        "report.speedup[0] <= 1:",
        "report.speedup[0] <= 0:",
        (f"{TESTS}::test_a_model_that_is_not_faster_in_the_end_is_put_back",),
    ),
    Fault(
        "compress: the last evaluation counts for nothing",
        f"{PART}search.py",
        "        if not lost <= options.max_drop:\n",
        "        if lost < 0:\n",
        (f"{TESTS}::test_a_failure_at_the_end_leaves_the_model_as_it_was",),
    ),
    Fault(
        "compress: a state file of another model is taken",
        f"{PART}memo.py",
        "mark != fingerprint",
        "mark is None",
        RESUME,
    ),
    Fault(
        "compress: what was measured is written at no time",
        f"{PART}memo.py",
        "            self._write()\n",
        "",
        RESUME,
    ),
    Fault(
        "compress: layers that share a weight may be taken one by one",
        f"{PART}units.py",
        "        if left and len(left) < len(tied):\n",
        "        if False:\n",
        (f"{TESTS}::test_layers_that_share_a_weight_are_treated_alike",),
    ),
    Fault(
        "compress: a training model comes back in evaluation mode",
        f"{PART}search.py",
        'vars(module)["training"] = self.training.get(module, False)',
        "pass",
        (WITHIN,),
    ),
    Fault(
        "load: a model keeps the sizes of a file that does not fit",
        "fastnn/quant/files.py",
        "        if not done:\n            changes.undo()",
        "        if not done:\n            pass",
        (f"{TESTS}::test_the_file_gives_the_model_back",),
    ),
]
