"""Faults in layers with a block-sparse weight."""

from __future__ import annotations

from fault import Fault, cell

KERNEL, BACKWARD, DRIVER, BINDING = (
    "csrc/cpu/kernels/block_sparse.h",
    "csrc/cpu/kernels/block_sparse_bwd.h",
    "csrc/cpu/block_sparse.cpp",
    "csrc/bindings/block_sparse.cpp",
)
OP, TESTS = "fastnn/ops/block_sparse.py", "tests/test_block_sparse.py"


def swept(name: str) -> tuple[str, ...]:
    return (f"tests/test_ops_sweep.py::test_sweep_everywhere[linear-block_sparse_{name}-{{isa}}]",)


CODES_OP, INT8 = "fastnn/ops/block_sparse_int8.py", "tests/test_block_sparse_int8.py"
INT8_BITS = (f"{INT8}::test_same_bits_as_plain_pytorch[torch.float32-{{isa}}]",)
PLAIN, DEEP, LAYER = (cell(f"linear-fp32-{{isa}}-{name}") for name in ("contiguous", "large_magnitude", "one_row"))
PLACES = (f"{TESTS}::test_a_misplaced_block_is_refused",)
SPARSE_FAULTS = [
    Fault(
        "block sparse: a strip's sums start again where they are cut",
        KERNEL,
        "store(at, (accumulate ? sum + load(at) : sum) + bias);",
        "store(at, (accumulate && ldt < 0 ? sum + load(at) : sum) + bias);",
        swept("wide_long16"),
    ),
    Fault(
        "block sparse: the bias is added where a strip's sums are cut, too",
        KERNEL,
        "if (s.bias != nullptr && left == blocks)",
        "if (s.bias != nullptr)",
        swept("wide_long16"),
    ),
    Fault(
        "block sparse: a negative column is taken",
        BINDING,
        "outside |= (uint32_t)w.columns[b] | (last - (uint32_t)w.columns[b]);",
        "outside |= last - (uint32_t)w.columns[b];",
        PLACES,
    ),
    Fault(
        "block sparse: a column may stand twice in a strip",
        BINDING,
        "falls += w.columns[b - 1] >= w.columns[b];",
        "falls += w.columns[b - 1] > w.columns[b];",
        PLACES,
    ),
    Fault(
        "block sparse: every block reads the first columns of the input",
        KERNEL,
        "const char* x = g.panel + *column++ * block_bytes;\n        int64_t u = 0;",
        "const char* x = g.panel + *column++ * 0;\n        int64_t u = 0;",
        PLAIN,
    ),
    Fault(
        "block sparse: dx forgets the strips beyond the first 192",
        BACKWARD,
        "total += sum_each(sums);",
        "total = sum_each(sums);",
        swept("wide_tall"),
    ),
    Fault(
        "block sparse: the gradient of the values forgets rows before the last 64",
        BACKWARD,
        "store(at, load(at) + sums[i][v]);",
        "store(at, sums[i][v]);",
        swept("wide_m130"),
    ),
    Fault(
        "block sparse: the second half of a deep block takes the gradient of the first",
        BACKWARD,
        "(p.w.columns[block] * depth + piece * J) * kSparseDwRows",
        "(p.w.columns[block] * depth + piece * 0) * kSparseDwRows",
        DEEP,
    ),
    Fault(
        "block sparse: what lies beyond the outputs is not cleared before dx",
        DRIVER,
        "std::fill(row + l.N, row + shape.strips * kStrip, 0.f);",
        "std::fill(row + l.N, row + l.N, 0.f);",
        PLAIN,
    ),
    Fault(
        "block sparse: with threads, the last strip is nobody's",
        DRIVER,
        "return part <= 0 ? 0 : n;",
        "return part <= 0 ? 0 : n - 1;",
        PLAIN,
    ),
    Fault(
        "block sparse: columns out of range are read",
        BINDING,
        "w.columns[last - 1] < limit",
        "w.columns[last - 1] <= limit",
        ("tests/test_ops_invalid.py::test_invalid_call[linear-block_sparse_fwd_far]",),
    ),
    Fault(
        "block sparse: the slope is left out of backward",
        OP,
        "bwd(grad, input, values, columns, starts, slope, code, shape, mask, True)",
        "bwd(grad, input, values, columns, starts, slope, 0, shape, mask, True)",
        LAYER,
    ),
    Fault(
        "block sparse: a block's outputs and columns change places",
        OP,
        ".permute(0, 2, 3, 1)\n",
        ".permute(0, 2, 1, 3).reshape(strips, width, depth, OUTPUTS)\n",
        (f"{TESTS}::test_where_a_value_lies",),
    ),
    Fault(
        "block sparse int8: the shift of the inputs' codes is not taken back",
        KERNEL,
        "(IVec)((UVec)sum - (UVec)offset)",
        "(IVec)(UVec)sum",
        INT8_BITS,
    ),
    Fault(
        "block sparse int8: sums of a row's chains are left out but for the first",
        KERNEL,
        "sum = Dot::add(sum, sums[c][i][v]);",
        "sum = Dot::kExact ? sum : Dot::add(sum, sums[c][i][v]);",
        INT8_BITS,
    ),
    Fault(
        "block sparse int8: the last blocks of a strip are nobody's",
        KERNEL,
        "b < blocks; b += kChains",
        "b + kChains <= blocks; b += kChains",
        INT8_BITS,
    ),
    Fault(
        "block sparse int8: every strip has the scales of the first",
        KERNEL,
        "g.scales.column = p.int8.column + n;",
        "g.scales.column = p.int8.column;",
        INT8_BITS,
    ),
    Fault(
        "block sparse int8: scales are multiplied one after the other",
        KERNEL,
        "value * (splat(g.scales.row[i]) * scale) + bias",
        "value * splat(g.scales.row[i]) * scale + bias",
        INT8_BITS,
    ),
    Fault(
        "block sparse int8: a single row's codes past the first 1024 are the first ones again",
        KERNEL,
        "std::memcpy(to, data + from, bytes);",
        "std::memcpy(to, data, bytes);",
        INT8_BITS,
    ),
    Fault(
        "block sparse int8: what lies beyond a row is not made codes of zero",
        "csrc/cpu/int8_rows.h",
        "codes_ + m * stride_ + columns_, kShift)",
        "codes_ + m * stride_ + columns_, uint8_t{0})",
        (f"{INT8}::test_what_lies_beyond_the_weight_counts_as_zero[{{isa}}]",),
    ),
    Fault(
        "block sparse int8: rows beyond the first part are the first ones again",
        "csrc/cpu/int8_rows.h",
        "m0 * x_.row_stride * element_bytes",
        "0 * x_.row_stride * element_bytes",
        (f"{INT8}::test_rows_that_come_in_parts",),
    ),
    Fault(
        "block sparse int8: sums of codes are those of the strip before",
        DRIVER,
        "static_cast<const int8_t*>(w.values) + w.starts[s] * w.depth * kStrip",
        "static_cast<const int8_t*>(w.values) + w.starts[s > 0 ? s - 1 : 0] * w.depth * kStrip",
        INT8_BITS,
    ),
    Fault(
        "block sparse int8: columns out of range are read",
        BINDING,
        "set_places(p.w, columns, starts, codes.size(0), p.N, p.K, op);",
        "set_places(p.w, columns, starts, codes.size(0), p.N, p.K + 64, op);",
        ("tests/test_ops_invalid.py::test_invalid_call[linear-block_sparse_int8_fwd_far]",),
    ),
    Fault(
        "block sparse int8: codes lie as values do",
        CODES_OP,
        "values.reshape(blocks, depth // UNIT, UNIT, OUTPUTS).transpose(2, 3)",
        "values.reshape(blocks, depth // UNIT, OUTPUTS, UNIT)",
        (f"{INT8}::test_where_a_code_lies",),
    ),
    Fault(
        "block sparse int8: the scale is that of the whole weight, blocks that are gone too",
        "fastnn/sparse/form.py",
        "return codes_of_blocks(to_blocks(weight, mask, depth=depth), *weight.shape)",
        "found = codes_of_blocks(to_blocks(weight, mask, depth=depth), *weight.shape)\n"
        "    return found._replace(scale=quantize_rows(weight)[1])",
        (f"{INT8}::test_form_is_that_of_the_rounded_weight[4]",),
    ),
]
