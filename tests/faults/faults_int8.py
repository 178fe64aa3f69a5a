"""Faults in int8 layers."""

from __future__ import annotations

from fault import OPS, PACKING, SIMD, Fault

INT8, INT8_KERNEL = "tests/test_int8.py", "csrc/cpu/kernels/linear_int8.h"
INT8_BITS = (f"{INT8}::test_same_bits_as_plain_pytorch[torch.float32-{{isa}}]",)
INT8_ROWS = (f"{INT8}::test_rows_of_every_kind[torch.float32-{{isa}}]",)
INT8_FAULTS = [
    Fault(
        "int8: the largest magnitude of a row misses its tail",
        f"{SIMD}codes.h",
        "for (; i < n; i += kLanes) {",
        "for (; i + kLanes <= n; i += kLanes) {",
        INT8_ROWS,
    ),
    Fault(
        "int8: a row with an infinity counts as finite",
        INT8_KERNEL,
        "if (bits >= kInfinityBits) {",
        "if (bits > kInfinityBits) {",
        INT8_ROWS,
    ),
    Fault(
        "int8: a row of zeros has the scale 0",
        f"{SIMD}codes.h",
        "return one > kLeastScale ? one : kLeastScale;",
        "return one;",
        INT8_ROWS,
    ),
    Fault(
        "int8: values are cut down to codes, not rounded",
        f"{SIMD}codes.h",
        "_mm256_cvtps_epi32((__m256)x)",
        "_mm256_cvttps_epi32((__m256)x)",
        INT8_BITS,
        isa="avx2",
    ),
    Fault(
        "int8: products of bytes saturate at 16 bits",
        f"{SIMD}codes.h",
        "return (Vec)_mm256_add_epi32(_mm256_add_epi32((__m256i)c, even), odd);",
        "return (Vec)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), "
        "_mm256_set1_epi16(1)));",
        (f"{INT8}::test_sums_are_exact_at_their_longest[avx2]",),
        isa="avx2",
    ),
    Fault(
        "int8: the shift of the inputs' codes is not taken back",
        "csrc/cpu/gemm/tile.h",
        "(Vec)(UVec{} - (UVec)load_ints(scales->offset + v * kLanes))",
        "zero()",
        INT8_BITS,
    ),
    Fault(
        "int8: sums of two blocks of K are added as floats",
        "csrc/cpu/gemm/units.h",
        "return (Vec)((UVec)a + (UVec)b);",
        "return a + b;",
        INT8_BITS,
    ),
    Fault(
        "a floating weight without versions is packed for good",
        f"{OPS}packing.py",
        "self.drop()\n            return None\n        key",
        "states = []\n        key",
        (f"{PACKING}::test_weight_that_counts_no_changes_is_never_packed",),
    ),
    Fault(
        "codes that count no changes",
        "fastnn/nn/quantized.py",
        "        return tensor.clone()",
        "        return tensor",
        (f"{PACKING}::test_codes_count_changes_wherever_the_layer_is_made",),
    ),
    Fault(
        "int8: a layer's packed copy does not follow its scales",
        f"{OPS}packing.py",
        "state_of(t) for t in sources]",
        "state_of(t) for t in sources[:1]]",
        (f"{INT8}::test_packs_once_and_follows_its_buffers",),
    ),
    Fault(
        "int8: the scale is rounded with the model",
        "fastnn/nn/quantized.py",
        "and after.dtype != before.dtype:",
        "and after.dtype == torch.float64:",
        (f"{INT8}::test_scale_stays_float32",),
    ),
    Fault(
        "int8: floating weights are loaded as whole numbers",
        "fastnn/nn/quantized.py",
        "weight.dtype != self.code_dtype:",
        "weight.dtype == torch.float64:",
        (f"{INT8}::test_floating_weights_are_not_loaded_into_codes",),
    ),
    Fault(
        "quantize_: a slower layer is quantised all the same",
        "fastnn/quant/quantize.py",
        "if slowdown > max_slowdown:",
        "if slowdown > 10 * max_slowdown:",
        ("tests/test_quantize.py::test_slower_layers_are_left_alone_and_said_so",),
    ),
    Fault(
        "quantize_: tied layers have codes of their own",
        "fastnn/quant/quantize.py",
        "setattr(made, name, buffer)",
        "setattr(made, name, buffer.clone())",
        ("tests/test_quantize.py::test_tied_layers_share_their_codes",),
    ),
    Fault(
        "quantize_: a layer gets codes of a type to which the model converts its input",
        "fastnn/quant/quantize.py",
        "    _mind_readers(model, chosen)\n",
        "",
        ("tests/test_quantize_casts.py::test_inputs_that_take_the_weights_type",),
    ),
    Fault(
        "quantize_: int8 codes count as spared wherever a type is read",
        "fastnn/quant/casts.py",
        'made.code_dtype == torch.int8 and "int8" in names',
        "made.code_dtype == torch.int8",
        ("tests/test_quantize_casts.py::test_inputs_that_take_the_weights_type",),
    ),
]
