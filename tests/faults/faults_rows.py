"""Faults in the row operations: norms, activations, masked softmax, dropout, rope."""

from __future__ import annotations

from fault import ACTIVATION, AUTOGRAD, MASKED, NORM, OPS, PARAMETERS, ROPE, SIMD, SOFTMAX, Fault, cell

NORM_FAULTS = [
    Fault(
        "norm: the variance takes in the lanes past the tail",
        NORM,
        "d = keep_first(d - p, count);",
        "d = d - p;",
        cell("norm-fp32-{isa}-tail"),
    ),
    Fault(
        "norm: moments about an outlier, or out of range, are not taken again",
        NORM,
        "if (__builtin_expect(!good || variance + eps < kLeastVariance, 0)) {",
        "if (n < 0 && !good) {",
        ("tests/test_ops_norm.py::test_squares_out_of_range",),
    ),
    Fault(
        "norm: the gradient keeps its mean",
        NORM,
        "kRms ? g : g - mean_g",
        "g",
        cell("norm-bf16-{isa}-contiguous"),
    ),
    Fault(
        "norm: the gradient of the residual sum itself is dropped",
        NORM,
        "return d_total == nullptr ? v : v + load_some(d_total + i, count);",
        "return v;",
        cell("norm-fp32-{isa}-contiguous"),
    ),
    Fault(
        "norm: the gradients of weight and bias lose a chunk of rows",
        "csrc/cpu/norm.cpp",
        "chunks = std::max<int64_t>(1, (p.rows + rows - 1) / rows);",
        "chunks = std::max<int64_t>(1, p.rows / rows);",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[norm-layer_wide_many_rows-{isa}]",),
    ),
    Fault(
        "norm: a weight 2 apart is read as neighbours",
        PARAMETERS,
        "(stride == 1 || n == 1)",
        "stride != 0",
        cell("norm-fp32-{isa}-strided"),
    ),
    Fault(
        "norm: the residual has a gradient only where the input has one",
        f"{OPS}norm.py",
        "needs = (of_input or of_residual, *of_parameters)",
        "needs = (of_input, *of_parameters)",
        (f"{AUTOGRAD}::test_some_gradients_only[norm-add_layer_rows]",),
    ),
]

ACTIVATION_FAULTS = [
    Fault(
        "activation: the tail is not computed",
        f"{SIMD}pair.h",
        "for (; i < end; i += kLanes) f(i,",
        "for (; i + kLanes <= end; i += kLanes) f(i,",
        cell("activation-fp32-{isa}-tail"),
    ),
    Fault(
        "activation: the slope is taken without the bias",
        ACTIVATION,
        "if constexpr (kBias) z[v] += b[v];",
        "",
        cell("activation-fp32-{isa}-contiguous"),
    ),
    Fault(
        "swiglu: the gradient of up lacks the activation",
        ACTIVATION,
        "g[v] = g[v] * a.value;",
        "g[v] = g[v] * z[v];",
        cell("activation-bf16-{isa}-contiguous"),
    ),
    Fault(
        "swiglu: the halves of a packed gradient overlap",
        "csrc/bindings/activation.cpp",
        "p.d_row_stride = packed ? 2 * p.columns : p.columns;",
        "p.d_row_stride = p.columns;",
        ("tests/test_ops_activation.py::test_packed_is_the_pair",),
    ),
    Fault(
        "relu: an infinite gradient times 0",
        f"{SIMD}activation.h",
        "return select(x <= zero(), zero(), g);",
        "return g * select(x <= zero(), zero(), splat(1.f));",
        cell("activation-fp32-{isa}-nonfinite"),
    ),
    Fault(
        "gelu_tanh: a large cube times 0",
        f"{SIMD}activation.h",
        "fma(x * (p * q), slope, p)",
        "fma(x * slope * p, q, p)",
        cell("activation-fp32-{isa}-large_magnitude"),
    ),
    Fault(
        "activation: rows apart count as one long row",
        "csrc/cpu/activation.cpp",
        "if (p.bias == nullptr && p.x_row_stride == p.columns &&",
        "if (p.bias == nullptr &&",
        cell("activation-fp32-{isa}-padded_rows"),
    ),
    Fault(
        "activation: the gradient of the bias loses a chunk of rows",
        "csrc/cpu/activation.cpp",
        "chunks = std::max<int64_t>(1, (p.rows + rows - 1) / rows);",
        "chunks = std::max<int64_t>(1, p.rows / rows);",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[activation-gelu_bias_wide_many_rows-{isa}]",),
    ),
    Fault(
        "swiglu: the odd elements of a bfloat16 pair are the even ones",
        f"{SIMD}pair.h",
        "v[1] = as_float(both & (int32_t)0xffff0000);",
        "v[1] = v[0];",
        cell("activation-bf16-{isa}-contiguous"),
    ),
    Fault(
        "swiglu: up is rounded to gate's type",
        f"{OPS}activation.py",
        "common = torch.promote_types(gate.dtype, up.dtype)",
        "common = gate.dtype",
        ("tests/test_ops_activation.py::test_gate_and_up_of_two_types",),
    ),
]

MASKED_FAULTS = [
    Fault(
        "masked_softmax: a row in which nothing takes part is NaN",
        MASKED,
        "top == -__builtin_inff() ? 0.f : top",
        "top",
        cell("masked_softmax-fp32-{isa}-contiguous"),
    ),
    Fault(
        "masked_softmax: a boolean mask lets NaN through",
        "csrc/cpu/kernels/mask.h",
        "if constexpr (__is_same(M, MaskByte)) return select(",
        "if constexpr (sizeof(M) == 0) return select(",
        cell("masked_softmax-fp32-{isa}-nonfinite"),
    ),
    Fault(
        "masked_softmax: a row is not cleared past the diagonal",
        MASKED,
        "    std::memset(kept + n, 0, (size_t)(p.columns - n) * sizeof(float));\n",
        "",
        cell("masked_softmax-fp32-{isa}-contiguous"),
    ),
    Fault(
        "masked_softmax: a mask of heads is that of the first",
        "csrc/bindings/masked_softmax.cpp",
        "at < 0 || holder.size(at) == 1 ? 0 : holder.stride(at)",
        "at < 0 || d + 2 < rank || holder.size(at) == 1 ? 0 : holder.stride(at)",
        cell("masked_softmax-fp32-{isa}-leading_dims"),
    ),
    Fault(
        "masked_softmax: the gradient lacks the scale",
        SOFTMAX,
        "sum, kLog) * factor;",
        "sum, kLog);",
        cell("masked_softmax-bf16-{isa}-contiguous"),
    ),
]

DROPOUT_FAULTS = [
    Fault(
        "dropout_add: another mask in backward",
        "csrc/bindings/dropout_add.cpp",
        "  call.y = dx.mutable_data_ptr();\n",
        "  call.y = dx.mutable_data_ptr();\n  call.seed += 1;\n",
        cell("dropout_add-fp32-{isa}-contiguous"),
    ),
    Fault(
        "dropout_add: rows share their mask",
        "csrc/cpu/kernels/dropout_add.h",
        "(uint64_t)r * groups + (uint64_t)i / 4",
        "(uint64_t)i / 4",
        cell("dropout_add-fp32-{isa}-contiguous"),
    ),
    Fault(
        "dropout_add: what is kept is not divided by 1 - p",
        "csrc/cpu/kernels/dropout_add.h",
        "const float scale = 1.f / (1.f - p.p);",
        "const float scale = 1.f;",
        cell("dropout_add-bf16-{isa}-contiguous"),
    ),
    Fault(
        "philox: odd counters are the even ones",
        f"{SIMD}philox.h",
        "odd = multiply_low((LanePairs)a >> 32, m);",
        "odd = even;",
        cell("dropout_add-fp32-{isa}-contiguous"),
    ),
]

LLAMA = "fastnn/accelerate/llama.py"
LLAMAS = "tests/test_accelerate_models.py::test_norms_and_rotation_of_llamas_kind"
ROPE_FAULTS = [
    Fault(
        "accelerate: a norm is judged by its name",
        LLAMA,
        "if _is_rms_norm(module, epsilon) else",
        "if module else",
        (f"{LLAMAS}[gemma]",),
    ),
    Fault(
        "accelerate: any function of the name is taken for the rotation of halves",
        LLAMA,
        "and _is_rotation(theirs)",
        "",
        (f"{LLAMAS}[cohere]",),
    ),
    Fault(
        "accelerate: every model of the class rotates by the kernel",
        LLAMA,
        "names = {**forward.__globals__, _ROTATE: _rotate(forward.__globals__[_ROTATE])}",
        "forward.__globals__[_ROTATE] = _rotate(forward.__globals__[_ROTATE])\n        names = forward.__globals__",
        (f"{LLAMAS}[llama]",),
    ),
    Fault(
        "accelerate: a norm's result has its input's type",
        LLAMA,
        "            and hidden_states.dtype == weight.dtype\n",
        "",
        ("tests/test_accelerate_models.py::test_a_norm_that_keeps_float32_is_left_to_transformers",),
    ),
    Fault(
        "accelerate: a layer goes on with the norm where it keeps the sum",
        "fastnn/accelerate/residual.py",
        '{value}, {kept} = {_NORM}(self.{norm}, {value})")',
        '{value} = {kept} = {_NORM}(self.{norm}, {value})[0]")',
        ("tests/test_accelerate_models.py::test_sums_before_norms_of_decoder_layers_are_in_them",),
    ),
    Fault(
        "accelerate: a branch finds a sum that is not taken",
        "fastnn/accelerate/residual.py",
        "                if any(_reads(statement, value) for statement in branch):\n",
        "                if False:\n",
        ("tests/test_accelerate_models.py::test_a_sum_that_a_branch_needs_is_taken_there",),
    ),
    Fault(
        "accelerate: gradient checkpointing ends",
        "fastnn/accelerate/standin.py",
        "        if checkpoints(",
        "        if not kind and checkpoints(",
        ("tests/test_accelerate_models.py::test_gradient_checkpointing_stays_in_force",),
    ),
    Fault(
        "rope: the rotation turns the wrong way",
        ROPE,
        "splat(p.inverse ? -1.f : 1.f)",
        "splat(p.inverse ? 1.f : -1.f)",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: backward of free tables takes its own entry of the sine",
        ROPE,
        "angles.sin + (p.inverse ? second : 0);",
        "angles.sin;",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: neighbours are exchanged before the sine in backward too",
        ROPE,
        "inverse ? swap_neighbours(turn * a[v]) : turn",
        "inverse ? -turn * swap_neighbours(a[v]) : turn",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: features that are not rotated are not written",
        ROPE,
        "if (p.rotary < p.D) keep_rest(",
        "if (p.rotary > p.D) keep_rest(",
        cell("rope-bf16-{isa}-contiguous"),
    ),
    Fault(
        "rope: positions of the first batch entry count for all",
        "csrc/bindings/rope.cpp",
        "p.positions_batch_stride = batch == 1 ? 0 : p.S;",
        "p.positions_batch_stride = 0;",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: a position past the tables is read",
        "csrc/bindings/rope.cpp",
        "p.positions[i] < rows,",
        "p.positions[i] <= rows,",
        ("tests/test_ops_invalid.py::test_invalid_call[rope-fwd_positions_high]",),
    ),
    Fault(
        "rope: heads side by side come back apart",
        "csrc/bindings/rope.cpp",
        "const bool swapped = inside == (call.heads_dim == 1);",
        "const bool swapped = false;",
        ("tests/test_ops_rope.py::test_memory_order_is_kept",),
    ),
    Fault(
        "rope: the gradient of one of both is dropped",
        f"{OPS}rope.py",
        "if grads[0] is None and grads[1] is None:",
        "if grads[0] is None or grads[1] is None:",
        ("tests/test_ops_rope.py::test_one_of_both_gradients",),
    ),
    Fault(
        "rope: the last block of each head is left out",
        ROPE,
        "p.by_heads ? blocks : part + 1",
        "p.by_heads ? blocks - 1 : part + 1",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[rope-halves_wide_blocks-{isa}]",),
    ),
    Fault(
        "rope: tables narrower than a head are taken for those of a part",
        f"{OPS}rope.py",
        "if rotary_dim is None and cos.shape[-1] != query.shape[-1]:",
        "if False:",
        ("tests/test_ops_invalid.py::test_invalid_call[rope-cos_narrow]",),
    ),
    Fault(
        "cache: memory in use is handed out again",
        "csrc/cpu/cache.cpp",
        "        waiting_.erase(best);\n",
        "",
        ("tests/test_memory_cache.py::test_not_handed_out_while_referenced",),
    ),
    Fault(
        "cache: what waits has no limit",
        "csrc/cpu/cache.cpp",
        "drop_above(limit.load(), dropped);",
        "drop_above(int64_t{1} << 40, dropped);",
        ("tests/test_memory_cache.py::test_limit_holds_and_the_longest_unused_go_first",),
    ),
]
