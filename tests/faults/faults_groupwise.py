"""Faults in layers on codes in groups, and in reading GGUF."""

from __future__ import annotations

from fault import Fault

GROUPS, DIGITS = "csrc/cpu/gemm/groups.h", "csrc/cpu/kernels/linear_groupwise.h"
TESTS, ROUNDING = "tests/test_groupwise.py", "fastnn/ops/groups.py"
INT8_BITS = (f"{TESTS}::test_int8_inputs_give_the_bits_of_plain_pytorch[torch.float32-{{isa}}]",)
LONGEST = (f"{TESTS}::test_sums_are_exact_at_their_longest[int4-{{isa}}]",)
ROWS = (f"{TESTS}::test_rows_of_every_kind[int8-{{isa}}]",)
GROUPWISE_FAULTS = [
    Fault(
        "groupwise: the inputs' middle digit counts as the lowest",
        GROUPS,
        "number = fma(number, splat(256.f), number_of(d));",
        "number = fma(number, splat(d == 0 ? 1.f : 256.f), number_of(d));",
        LONGEST,
    ),
    Fault(
        "groupwise: the second half of a byte keeps the first's bits",
        GROUPS,
        "(u == 0 ? bits : bits >> 4) & 0x0f0f0f0fu",
        "(u == 0 ? bits & 0x0f0f0f0fu : bits >> 4)",
        INT8_BITS,
    ),
    Fault(
        "groupwise: the code of zero is not taken off",
        DIGITS,
        "found.correction[d] = -zero_code * (int32_t)sum;",
        "found.correction[d] = 0;",
        INT8_BITS,
    ),
    Fault(
        "groupwise: offsets do not count",
        GROUPS,
        "splat(of.sum) * half_scales(at + GroupLayout::kLine / 2)",
        "splat(0.f) * half_scales(at + GroupLayout::kLine / 2)",
        INT8_BITS,
    ),
    Fault(
        "groupwise: the row's scale is left out",
        GROUPS,
        "const Vec scale = splat(product.of[m * blocks].scale);",
        "const Vec scale = splat(1.f);",
        INT8_BITS,
    ),
    Fault(
        "groupwise: a block starts from nothing, not from the sum before",
        GROUPS,
        "store(at, added(b == 0 ? zero() : load(at)));",
        "store(at, added(zero()));",
        INT8_BITS,
    ),
    Fault(
        "groupwise: every block takes the first group's scale",
        DIGITS,
        "const int64_t at = n * layout.groups + layout.group_of(b);",
        "const int64_t at = n * layout.groups;",
        INT8_BITS,
    ),
    Fault(
        "groupwise: a block with an infinity counts as zeros",
        DIGITS,
        'found = {{0, 0, 0}, __builtin_nanf(""), __builtin_nanf("")};',
        "found = {{0, 0, 0}, 1.f, 0.f};",
        ROWS,
    ),
    Fault(
        "groupwise: the largest number needs a fourth digit",
        DIGITS,
        "kMostOfThree = 8355710.f;",
        "kMostOfThree = 8388600.f;",
        LONGEST,
    ),
    Fault(
        "groupwise: a row's digits end with its first block",
        DIGITS,
        "uint8_t* const to = out + m * out_stride + b * block_bytes;",
        "uint8_t* const to = out + m * out_stride;",
        INT8_BITS,
    ),
    Fault(
        "groupwise: the scale's sign is lost",
        ROUNDING,
        "scale = (extreme / -8).half()",
        "scale = (extreme.abs() / 8).half()",
        (f"{TESTS}::test_formulas_of_the_codes",),
    ),
    Fault(
        "groupwise: a layer's packed copy does not follow its offsets",
        "fastnn/ops/packing.py",
        '(codes, scale, offset), "linear_groupwise_pack"',
        '(codes, scale, offset.clone()), "linear_groupwise_pack"',
        (f"{TESTS}::test_packs_once_and_follows_its_buffers[offset]",),
    ),
    Fault(
        "quantize_: a tied head has codes of its own",
        "fastnn/nn/quantized.py",
        "return all(mine.get(name) == theirs.get(name)",
        "return all(mine.get(name) != theirs.get(name)",
        ("tests/test_quantize.py::test_groups_take_embeddings_and_keep_ties[Int8WeightOnly(group_size=8)]",),
    ),
    Fault(
        "gguf: high halves of bytes come before low ones",
        "fastnn/quant/gguf.py",
        "torch.cat((low, high), -1)",
        "torch.cat((high, low), -1)",
        ("tests/test_gguf.py::test_codes_are_those_of_the_file[Q4_0]",),
    ),
    Fault(
        "gguf: a tensor may end behind the file",
        "fastnn/quant/gguf.py",
        " or begin + offset + nbytes > len(reader.data)",
        "",
        ("tests/test_gguf.py::test_damaged_files_give_one_clear_error",),
    ),
    Fault(
        "embedding: an index may lie behind the table",
        "csrc/bindings/linear_groupwise.cpp",
        "wanted[i] >= 0 && wanted[i] < N",
        "wanted[i] >= 0 && wanted[i] <= N",
        ("tests/test_quantize.py::test_embeddings_give_rows_of_their_type",),
    ),
]
