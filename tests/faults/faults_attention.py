"""Faults in cross-entropy and attention."""

from __future__ import annotations

from fault import AUTOGRAD, OPS, Fault, cell

CROSS_ENTROPY, ATTENTION = "csrc/cpu/kernels/cross_entropy.h", "csrc/cpu/kernels/attention.h"
ATTENTION_OPERANDS, ATTENTION_SCORES = "csrc/cpu/kernels/attention_operands.h", "csrc/cpu/kernels/attention_scores.h"
ATTENTION_BWD = "csrc/cpu/kernels/attention_bwd.h"

LOSS_FAULTS = [
    Fault(
        "cross_entropy: the running sum is not rescaled when the maximum rises",
        CROSS_ENTROPY,
        "      total = total * exp(m - top);\n",
        "",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[cross_entropy-wide_1000-{isa}]",),
    ),
    Fault(
        "cross_entropy: lanes past the last class count as logits of 0",
        CROSS_ENTROPY,
        "return fill_rest(value(i, count).logit, count, -__builtin_inff());",
        "return fill_rest(value(i, count).logit, count, 0.f);",
        cell("cross_entropy-fp32-{isa}-tail"),
    ),
    Fault(
        "cross_entropy: ignored rows get a gradient",
        CROSS_ENTROPY,
        "store_some(dx + (i - first), zero(),",
        "store_some(dx + (i - first), splat(1e-3f),",
        ("tests/test_ops_cross_entropy.py::test_ignored_rows_have_neither_loss_nor_gradient",),
    ),
    Fault(
        "cross_entropy: the mean's divisor counts ignored rows",
        "csrc/bindings/loss.cpp",
        "if (p.target[r] == p.ignore_index) return 0.0;",
        "if (p.target[r] == p.ignore_index) return 1.0;",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: the smoothed share forgets the class weights",
        CROSS_ENTROPY,
        "  if (p.weight != nullptr) {\n    share = share *",
        "  if (p.weight != nullptr && p.label_smoothing == 0.f) {\n    share = share *",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: the softcap's slope is left out of the gradient",
        CROSS_ENTROPY,
        "return kCap ? g * v.slope : g;",
        "return g;",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: the z-loss's gradient is halved",
        CROSS_ENTROPY,
        "2.f * p.z_loss * (max + log_sum)",
        "p.z_loss * (max + log_sum)",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: a padded row is read at the stride of a packed one",
        "csrc/bindings/cross_entropy.cpp",
        "  p.x_row_stride = rows.row_stride;",
        "  p.x_row_stride = p.classes;",
        cell("cross_entropy-fp32-{isa}-padded_rows"),
    ),
    Fault(
        "cross_entropy: gradients per row all take the first row's",
        "csrc/bindings/cross_entropy.cpp",
        "scales.z.data(), scales.stride,",
        "scales.z.data(), 0,",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: second derivatives detached",
        f"{OPS}cross_entropy.py",
        "        if torch.is_grad_enabled():\n            loss =",
        "        if False:\n            loss =",
        (f"{AUTOGRAD}::test_double_backward",),
    ),
]

ATTENTION_FAULTS = [
    Fault(
        "attention: the output is not rescaled when the maximum rises",
        ATTENTION,
        "    if (rescale) {",
        "    if (rescale && p.S_q == 0) {",
        cell("attention-fp32-{isa}-large_magnitude"),
    ),
    Fault(
        "attention: causal is one key too generous",
        f"{OPS}attention.py",
        "        right = 0\n",
        "        right = 1\n",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the left edge of a window is one key too far",
        ATTENTION_SCORES,
        "to = left ? key + p.window_left : kQueries;",
        "to = left ? key + p.window_left + 1 : kQueries;",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the scale is left out of the keys' gradient",
        ATTENTION_BWD,
        "store_head(m.dk, p.D, p.scale,",
        "store_head(m.dk, p.D, 1.f,",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the sum of dO times O is left out of the gradient",
        ATTENTION_BWD,
        "(dp - load(m.delta + r));",
        "dp;",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the gradients of one key head start from the one before",
        ATTENTION_BWD,
        "    std::memset(m.dv, 0, (size_t)(p.S_k * padded_features(p.D_v)) * 4);\n",
        "    if (item == begin) std::memset(m.dv, 0, (size_t)(p.S_k * padded_features(p.D_v)) * 4);\n",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: grouped query heads are dealt out in turns",
        ATTENTION_OPERANDS,
        "t.kv_head = head / (p.H / p.H_kv);",
        "t.kv_head = head % p.H_kv;",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[attention-wide_grouped-{isa}]",),
    ),
    Fault(
        "attention: backward drops other weights than forward",
        ATTENTION_BWD,
        "each_keep(p, t, j0, keys,",
        "each_keep(p, t, j0 + 4, keys,",
        ("tests/test_ops_attention.py::TestDropout::test_backward_drops_what_forward_dropped",),
    ),
    Fault(
        "attention: dropped weights stay in the output",
        ATTENTION_SCORES,
        "select((IVec)(random.x[i] < threshold), zero(), keep_scale)",
        "keep_scale",
        ("tests/test_ops_attention.py::TestDropout",),
    ),
    Fault(
        "attention: every block of keys draws the first one's dropout",
        ATTENTION_SCORES,
        "t.first + r + i) + (uint64_t)j0 / 4;",
        "t.first + r + i);",
        ("tests/test_ops_attention.py::TestDropout",),
    ),
    Fault(
        "attention: dropout's words are those of keys counted from the window's first",
        ATTENTION_SCORES,
        "for (int64_t j = -(j0 % 4); j < keys; j += 4) {",
        "for (int64_t j = 0; j < keys; j += 4) {",
        ("tests/test_ops_attention.py::TestDropout::test_windows_leave_the_mask_where_it_is[{isa}]",),
    ),
    Fault(
        "decoding: dropped weights stay in the output",
        ATTENTION_SCORES,
        "x[j] *= random.x[(j0 + j) % 4] < threshold ? 0.f : keep_scale;",
        "x[j] *= keep_scale;",
        ("tests/test_ops_attention.py::TestDropout",),
    ),
    Fault(
        "attention: a query that sees nothing gives NaN",
        ATTENTION,
        "select(after == splat(-__builtin_inff()), zero(), after);",
        "after;",
        ("tests/test_ops_attention.py::test_query_that_sees_nothing[60-{isa}]",),
    ),
    Fault(
        "attention: a mask of one row per batch entry is read at the first entry's",
        ATTENTION_SCORES,
        "mask += t.b * p.mask_strides[0] + t.head * p.mask_strides[1] +",
        "mask += t.head * p.mask_strides[1] +",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "decoding: the output is not rescaled when the maximum rises",
        "csrc/cpu/kernels/attention_decode.h",
        "if (correction != 1.f) {",
        "if (correction > 1.f) {",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "decoding: the parts of the keys are merged as if they had one maximum",
        "csrc/cpu/kernels/attention_decode.h",
        "sum = sum * mine + other[features + 1] * theirs;",
        "sum = sum + other[features + 1];",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: a window that begins at an odd key splits a pair",
        ATTENTION_OPERANDS,
        "t.key_begin / Dot::kPerUnit * Dot::kPerUnit : t.key_end;",
        "t.key_begin : t.key_end;",
        ("tests/test_ops_attention.py::test_windows_that_begin_at_any_key[avx512_bf16]",),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the last odd key meets the weights of a key that is not there",
        ATTENTION_OPERANDS,
        "j + 1 < keys ? load(x + (j + 1) * kQueries + r) : zero();",
        "load(x + (j + 1) * kQueries + r);",
        cell("attention-bf16-avx512_bf16-contiguous", "attention-bf16-avx512_bf16-tail"),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the scale is applied to pairs before and inside the exponential",
        ATTENTION_SCORES,
        "? ScoreScale{p.scale, 1.f} :",
        "? ScoreScale{p.scale, p.scale} :",
        cell("attention-bf16-avx512_bf16-contiguous"),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the gradient of the queries takes pairs of queries for pairs of keys",
        ATTENTION_BWD,
        "      round_to_pairs(m.ds, keys, width, ds_by_keys);\n      round_rows(m.ds, keys, width);\n",
        "      round_rows(m.ds, keys, width);\n      round_to_pairs(m.ds, keys, width, ds_by_keys);\n",
        cell("attention-bf16-avx512_bf16-contiguous"),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the seed is drawn again in backward",
        f"{OPS}attention.py",
        "            found = bwd(grad, query, key, value, mask, seed, out,",
        "            seed = None if seed is None else torch.randint(0, 2**62, ())\n"
        "            found = bwd(grad, query, key, value, mask, seed, out,",
        ("tests/test_ops_attention.py::TestDropout",),
    ),
]
