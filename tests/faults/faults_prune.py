"""Faults in pruning and distillation."""

from __future__ import annotations

from fault import Fault

PRUNE, DISTILL = "fastnn/prune/", "fastnn/distill.py"
TESTS, MODELS, LOSSES = "tests/test_prune.py", "tests/test_prune_models.py", "tests/test_distill.py"
RANDOM = f"{TESTS}::test_random_networks_lose_contributions_and_nothing_else"

PRUNE_FAULTS = [
    Fault(
        "prune: a concatenation's parts start at the wrong channel",
        f"{PRUNE}rules.py",
        "np.concatenate([one for one in labels if one is not None])",
        "np.concatenate([one for one in labels[::-1] if one is not None])",
        (RANDOM,),
    ),
    Fault(
        "prune: a residual sum ties nothing",
        f"{PRUNE}rules.py",
        "        for one in meeting[1:]:\n",
        "        for one in meeting[:0]:\n",
        (RANDOM,),
    ),
    Fault(
        "prune: groups of a convolution may lose different channels",
        f"{PRUNE}products.py",
        't.tie(np.broadcast_to(by_group[0], by_group.shape), by_group, "a grouped convolution")',
        "pass",
        (f"{TESTS}::test_groups_lose_the_same_number_each",),
    ),
    Fault(
        "prune: parts of a split may become of different sizes",
        f"{PRUNE}rules.py",
        '            t.tie(parts[0], part, "split")\n',
        "            pass\n",
        (f"{TESTS}::test_parts_of_a_split_keep_one_size",),
    ),
    Fault(
        "prune: the wrong query heads go with a shared key head",
        f"{PRUNE}products.py",
        "np.repeat(one[1], heads // len(one[1]))",
        "np.tile(one[1], heads // len(one[1]))",
        (f"{TESTS}::test_heads_that_share_keys_go_together",),
    ),
    Fault(
        "prune: an output of the model is pruned",
        f"{PRUNE}trace.py",
        'tracer.relation.freeze(atoms, "it is an output of the model")',
        "pass",
        (f"{TESTS}::test_what_cannot_be_pruned_is_told_with_its_reason",),
    ),
    Fault(
        "prune: the most important units go",
        f"{PRUNE}choose.py",
        'np.argsort(s, kind="stable")[:n]',
        'np.argsort(-s, kind="stable")[:n]',
        (f"{TESTS}::test_the_smallest_norms_go", f"{TESTS}::test_activation_ranks_by_what_a_unit_says"),
    ),
    Fault(
        "prune: the Taylor measure adds magnitudes of weights instead of a gate's slope",
        f"{PRUNE}importance.py",
        "(g * w.detach()).double()",
        "(g * w.detach()).double().abs()",
        (f"{TESTS}::test_taylor_is_the_derivative_of_a_gate",),
    ),
    Fault(
        "prune: a failed check leaves the smaller model behind",
        f"{PRUNE}shrink.py",
        "        if not done:\n            changes.undo()",
        "        if not done:\n            pass",
        (f"{TESTS}::test_a_shape_fixed_by_code_is_an_error_that_names_the_layer",),
    ),
    Fault(
        "prune: a graph that lives keeps the old shapes of gradients",
        f"{PRUNE}apply.py",
        "    tensor.data = values.new_empty(0, dtype=",
        "    values.new_empty(0, dtype=",
        (f"{TESTS}::test_training_goes_on_while_an_old_graph_lives",),
    ),
    Fault(
        "prune: results are not compared",
        f"{PRUNE}shrink.py",
        "difference, failure = _compare(_outputs(model, example_inputs), expected)",
        'difference, failure = _compare(_outputs(model, example_inputs), expected)[0], ""',
        (f"{TESTS}::test_results_that_silently_change_are_an_error_too",),
    ),
    Fault(
        "prune: the configuration is set where layers differ",
        f"{PRUNE}huggingface.py",
        "if len(mine) == 1 and mine",
        "if mine",
        (f"{MODELS}::test_configurations_stay_where_layers_differ",),
    ),
    Fault(
        "prune: multiply-adds of what is gone are counted",
        f"{PRUNE}shrink.py",
        "gone[group.roots[units]] = True",
        "gone[group.roots[units]] = False",
        (f"{TESTS}::test_amounts_and_multiples",),
    ),
    Fault(
        "distillation: the square of the temperature is forgotten",
        DISTILL,
        ".sum(-1)) * temperature**2\n",
        ".sum(-1)) * temperature\n",
        (f"{LOSSES}::test_value_and_gradient",),
    ),
    Fault(
        "distillation: padding counts in the mean",
        DISTILL,
        'return rows.mean() if reduction == "mean" else rows.sum()',
        'return rows.sum() / shape.numel() if reduction == "mean" else rows.sum()',
        (f"{LOSSES}::test_rows_that_do_not_count",),
    ),
    Fault(
        "distillation: the teacher drops out",
        DISTILL,
        "    model.eval()\n    try:",
        "    try:",
        (f"{LOSSES}::test_the_teacher_does_not_drop_out",),
    ),
    Fault(
        "distillation: the teacher's mode is not put back",
        DISTILL,
        "            module.training = training\n",
        "            pass\n",
        (f"{LOSSES}::test_a_step_in_a_loop_teaches",),
    ),
]
