"""Faults in attention over sequences: end to end, on a cache of keys and values, in models that generate."""

from __future__ import annotations

from fault import OPS, Fault, cell

OPERANDS, SCORES = "csrc/cpu/kernels/attention_operands.h", "csrc/cpu/kernels/attention_scores.h"
DECODE, FORWARD = "csrc/cpu/kernels/attention_decode.h", "csrc/cpu/kernels/attention.h"
DRIVER, CACHE = "csrc/cpu/attention.cpp", f"{OPS}kv_cache.py"
METHODS = ("tests/test_kv_cache.py::test_methods_do_what_they_say",)

SEQUENCE_FAULTS = [
    Fault(
        "attention: tiles look for their keys where queries would stand if aligned at the top left",
        OPERANDS,
        "const int64_t first = p.position + t.first, last",
        "const int64_t first = t.first, last",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: windows of tiles ignore where the queries stand",
        SCORES,
        "const int64_t first = p.position + t.first + r - j0;",
        "const int64_t first = t.first + r - j0;",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "decoding: windows ignore where the queries stand",
        DECODE,
        "const int64_t stands = p.position + row.query - j0;",
        "const int64_t stands = row.query - j0;",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "decoding: the keys that are read are those of queries at the top left",
        DECODE,
        "const int64_t stands = p.position + rows[g].query;",
        "const int64_t stands = rows[g].query;",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "decoding: the last odd key is paired with the row behind it",
        DECODE,
        "last ? zero() : of(at + row_stride);",
        "of(at + row_stride);",
        cell("attention-bf16-avx512_bf16-contiguous"),
        isa="avx512_bf16",
    ),
    Fault(
        "decoding: features stay in the order in which pairs of keys are interleaved",
        DECODE,
        "        store(o, separate_halves<false>(low, high));\n",
        "        store(o, low);\n",
        cell("attention-bf16-avx512_bf16-contiguous"),
        isa="avx512_bf16",
    ),
    Fault(
        "decoding: backward adds up every score as that of a row that shares no load",
        DECODE,
        "return row < rows / kDecodeShared * kDecodeShared;",
        "return row < 0 * rows;",
        ("tests/test_ops_attention.py::test_few_queries_weigh_in_backward_as_in_forward[bf16-avx512_bf16]",),
        isa="avx512_bf16",
    ),
    Fault(
        "decoding: the logsumexp of a head lies where it would with one sequence",
        DECODE,
        "* p.lse_head_stride + r.query]",
        "* p.S_q + r.query]",
        ("tests/test_kv_cache.py::test_logsumexp_and_queries_that_see_nothing[{isa}]",),
    ),
    Fault(
        "attention: the logsumexp of a tile lies where it would with one sequence",
        FORWARD,
        "(t.b * p.H + t.head) * p.lse_head_stride + t.first",
        "(t.b * p.H + t.head) * p.S_q + t.first",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention_varlen: every sequence draws the first one's dropout",
        SCORES,
        "return p.first_draw + (uint64_t)(",
        "return (uint64_t)(",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention_varlen: the gradient of a tile of queries ignores the heads between its rows",
        "csrc/cpu/kernels/attention_bwd.h",
        "t.first * b.dq_strides.row,",
        "t.first * p.D,",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention_varlen: widened keys of all sequences lie on those of the first",
        DRIVER,
        "keys(s) + head * k, values(s)",
        "keys(0) + head * k, values(s)",
        cell("attention-fp16-{isa}-contiguous"),
    ),
    Fault(
        "decoding: the parts of the keys begin at the first key, not at the window's",
        DRIVER,
        "range.begin + range.size() * part / n,",
        "range.size() * part / n,",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention_with_kv_cache: new rows go behind the first sequence's",
        DRIVER,
        "p.first[b] * by.row",
        "p.first[0] * by.row",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention_with_kv_cache: longer sequences are taken for ones as long as the one before",
        "csrc/cpu/attention.cpp",
        "filled[end] == filled[b]",
        "filled[end] >= filled[b]",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention_with_kv_cache: a step beyond the capacity is let through",
        "csrc/bindings/attention_cache.cpp",
        "lengths[b] <= capacity - more,",
        "lengths[b] <= capacity,",
        ("tests/test_kv_cache.py::test_a_refused_step_changes_nothing[{isa}]",),
    ),
    Fault(
        "attention_varlen: cu_seqlens may end anywhere",
        "csrc/bindings/attention_varlen.cpp",
        "FASTNN_CHECK(bounds.back() == total,",
        "FASTNN_CHECK(bounds.back() <= total,",
        ("tests/test_ops_invalid.py::test_invalid_call[attention-varlen_cu_seqlens_q_short]",),
    ),
    Fault(
        "KVCache: reordered sequences keep the lengths of those before",
        CACHE,
        "        self.lengths = self.lengths[index]\n",
        "",
        METHODS,
    ),
    Fault(
        "KVCache: growth leaves the values behind",
        CACHE,
        "        self.values[:, :, :filled] = values[:, :, :filled].index_select(0, index)\n",
        "",
        METHODS,
    ),
    Fault(
        "KVCache: truncating lengthens the sequences that are shorter",
        CACHE,
        "self.lengths = torch.minimum(self.lengths, lengths)",
        "self.lengths = torch.maximum(self.lengths, lengths)",
        METHODS,
    ),
    Fault(
        "accelerate: rows that were cropped from a cache come back",
        "fastnn/accelerate/cache.py",
        "            kept.lengths.fill_(self.keys.shape[2])  # fewer than before where it was cropped\n",
        "            pass\n",
        ("tests/test_accelerate_models.py::test_a_kept_layer_is_transformers_own_but_for_the_copies",),
    ),
]
