"""Every op over its sweep of sizes, grad_output in every memory layout, thread counts, independence of rows."""

from __future__ import annotations

import pytest
import torch

from fastnn import testing
from fastnn.testing import best, cases, find_case, op_names, same_bits, targets
from fastnn.testing.inputs import ARRANGE

WIDE = [(op, case) for op in op_names() for case in cases(op) if case.wide]
DTYPES = list(best().dtypes)


def wide_id(value):
    return f"{value[0]}-{value[1].name}" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_case", WIDE, ids=wide_id)
def test_sweep(op_case, dtype):
    testing.check(op_case[1], dtype, best())


@pytest.mark.slow
@pytest.mark.parametrize("target", targets(), ids=str)
@pytest.mark.parametrize("op_case", WIDE, ids=wide_id)
def test_sweep_everywhere(op_case, target):
    for dtype in target.dtypes:
        for seed in (1, 2):
            testing.check(op_case[1], dtype, target, seed=seed)


# Which elements are read is one code for all vector widths: the sets between the narrowest and the best are slow tests.
AT_THE_ENDS = [
    pytest.param(target, id=str(target), marks=[] if target in (*targets()[:2], best()) else pytest.mark.slow)
    for target in targets()
]


@pytest.mark.parametrize("target", AT_THE_ENDS)
@pytest.mark.parametrize("layout", sorted(ARRANGE))
@pytest.mark.parametrize("op", op_names())
def test_grad_output_in_any_memory_layout(op, layout, target):
    for case in cases(op):
        if case.layout in ("contiguous", "leading_dims") and case.differentiable and not case.wide:
            for dtype in target.dtypes:
                testing.check(case, dtype, target, grad_layout=layout)


# Large enough that the kernels split the work; the shapes do not divide evenly among 2 or 3 threads.
THREADED = [
    ("activation", "gelu_bias_wide_many_rows"),
    ("activation", "gelu_tanh_packed_wide_long_row"),
    ("activation", "silu_pair_wide_streamed"),
    ("attention", "wide_causal"),
    ("attention", "wide_dropout"),
    ("attention", "wide_grouped"),
    ("cross_entropy", "wide_many_rows"),
    ("cross_entropy", "wide_many_rows_mean"),
    ("dropout_add", "wide_long_row"),
    ("dropout_add", "wide_many_rows"),
    ("linear", "wide_blocks"),
    ("linear", "wide_m513"),
    ("linear", "wide_columns"),
    ("linear", "packed_wide_blocks"),
    ("linear", "packed_wide_rows"),
    ("linear", "int8_wide_blocks"),
    ("linear_cross_entropy", "wide_many_rows"),
    ("linear_cross_entropy", "wide_blocks"),
    ("linear", "int8_wide_columns"),
    ("masked_softmax", "wide_heads"),
    ("masked_softmax", "wide_many_rows"),
    ("mlp", "plain_wide_parts_1100x1500_recomputed"),
    ("mlp", "gated_wide_parts_300x7001_recomputed"),
    ("mlp", "packed_gated_wide_parts_1100x1500"),
    ("norm", "layer_wide_many_rows"),
    ("norm", "add_rms_wide_chunks"),
    ("rope", "halves_wide_blocks"),
    ("rope", "neighbours_wide_blocks"),
    ("rope", "halves_wide_streamed"),
    ("softmax", "wide_many_rows"),
    ("softmax", "log_wide_inner_1000"),
    ("softmax", "wide_40000"),
]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("op", "name"), THREADED)
def test_thread_count(op, name, threads):
    """Within the policy, and bitwise repeatable (which `check` demands), for each number of threads."""
    torch.set_num_threads(threads)
    try:
        for dtype in DTYPES:
            testing.check(find_case(op, name), dtype, best())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("op", "name"), THREADED)
def test_thread_count_changes_no_bit(op, name):
    """No sum is divided among threads, so the kernels give the same bits for any number of them."""
    case = find_case(op, name)
    for dtype in best().dtypes:
        inputs = case.inputs(testing.REFERENCE_DTYPES[dtype])
        leaves = {key: t.requires_grad_(key in case.differentiable) for key, t in inputs.items()}
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            try:
                with torch.set_grad_enabled(bool(case.differentiable)):
                    output = case.call(leaves)
                wanted = [leaves[key] for key in case.differentiable]
                found = torch.autograd.grad(output, wanted, torch.ones_like(output)) if wanted else ()
            finally:
                torch.set_num_threads(1)
            results.append([output.detach(), *found])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True)), f"{op}/{name} {dtype}"


@pytest.mark.parametrize("target", targets(), ids=str)
@pytest.mark.parametrize(
    ("op", "name", "argument"),
    [("activation", "silu_pair_rows", "gate"), ("linear", "gelu_bias", "input"), ("softmax", "rows", "input")],
)
def test_rows_do_not_affect_each_other(op, name, argument, target):
    case = find_case(op, name)
    for dtype in target.dtypes:
        inputs = case.inputs(testing.REFERENCE_DTYPES[dtype])
        spoilt = {**inputs, argument: inputs[argument].clone()}
        spoilt[argument][1:] = float("nan")
        with target.forced(), testing.poisoned(), torch.no_grad():
            clean, alone = case.call(inputs), case.call(spoilt)
        assert same_bits(clean[0], alone[0]), f"{dtype} on {target}: the first row changed with the others"
        assert alone[1:].isnan().all()


@pytest.mark.parametrize("target", targets(), ids=str)
@pytest.mark.parametrize("op", op_names())
def test_result_is_contiguous(op, target):
    """That of attention maybe as (B, S, H, D): as its query."""
    for case in cases(op):
        if not case.wide:
            with target.forced(), torch.no_grad():
                result = case.call(case.inputs(torch.float32))
            laid_out_as_query = op == "attention" and result.dim() == 4 and result.transpose(1, 2).is_contiguous()
            assert result.is_contiguous() or laid_out_as_query, case.name
