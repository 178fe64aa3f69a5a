"""Faults in feed-forward blocks."""

from __future__ import annotations

from fault import EPILOGUE, OPS, Fault, cell

BLOCK, MIDDLE = "csrc/cpu/mlp.cpp", "csrc/cpu/kernels/mlp.h"

MLP_FAULTS = [
    Fault(
        "mlp: each part of the columns adds the last bias again",
        BLOCK,
        "if (c == 0 && p.b_out != nullptr) g.epilogue.bias",
        "if (p.b_out != nullptr) g.epilogue.bias",
        cell("mlp-fp32-{isa}-tail"),
    ),
    Fault(
        "mlp: a later part takes the first one's bias",
        BLOCK,
        "g.epilogue.bias = b_in == nullptr ? nullptr : b_in + i;",
        "g.epilogue.bias = b_in;",
        cell("mlp-fp32-{isa}-tail"),
    ),
    Fault(
        "mlp: parts are summed in half precision",
        BLOCK,
        "      g.c_dtype = DType::kFloat32;\n",
        "",
        cell("mlp-bf16-{isa}-tail"),
    ),
    Fault(
        "mlp: saved columns are read as rows next to each other",
        BLOCK,
        "middle.z_stride = p.z == nullptr ? width : p.hidden;",
        "middle.z_stride = width;",
        cell("mlp-fp32-{isa}-tail"),
    ),
    Fault(
        "mlp: a packed block's later rows are those of the first part",
        BLOCK,
        "const Matrix x = part_of(p.x, m, 0);",
        "const Matrix x = part_of(p.x, 0, 0);",
        cell("mlp-fp32-{isa}-tail"),
    ),
    Fault(
        "mlp: the gate's gradient lacks what it multiplies",
        MIDDLE,
        "through<A>(kGated ? h_grad * factor[v] : h_grad,",
        "through<A>(h_grad,",
        cell("mlp-bf16-{isa}-contiguous"),
    ),
    Fault(
        "mlp: the bias's gradient is that of the hidden values",
        MIDDLE,
        "total[v] += g[v];",
        "total[v] += h_grad;",
        cell("mlp-fp32-{isa}-contiguous"),
    ),
    Fault(
        "product: the gate is multiplied without its activation",
        EPILOGUE,
        "Vec y = activate<A, kRough>(gate != nullptr ? read(gate + n) : v);",
        "Vec y = gate != nullptr ? read(gate + n) : activate<A, kRough>(v);",
        cell("mlp-fp32-{isa}-contiguous"),
    ),
    Fault(
        "product: sums of earlier parts are not added in the tail",
        EPILOGUE,
        "if (addend != nullptr) y += read(addend + n);",
        "if (addend != nullptr && n + kLanes <= columns) y += read(addend + n);",
        cell("mlp-fp32-{isa}-tail"),
    ),
    Fault(
        "mlp: recompute keeps the middle all the same",
        OPS + "mlp.py",
        "save = not recompute and any(ctx.needs_input_grad[:5])",
        "save = any(ctx.needs_input_grad[:5])",
        ("tests/test_ops_mlp.py::test_keeps_its_middle_once_or_not_at_all",),
    ),
    Fault(
        "mlp: a hook on the first layer is passed over",
        "fastnn/nn/mlp.py",
        "if not (is_unchanged(fc1, Linear) and is_unchanged(fc2, Linear)):",
        "if not is_unchanged(fc2, Linear):",
        ("tests/test_ops_mlp.py::TestLayers",),
    ),
]
