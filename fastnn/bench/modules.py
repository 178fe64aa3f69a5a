"""What one call of a module must at least read, write and compute: for `fastnn.explain`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.modules import activation

from ..nn import GroupwiseLinear, QuantizedLinear
from ..testing.bench_cases import EXP_OPERATIONS, Work

_ELEMENTWISE = tuple(
    kind
    for kind in vars(activation).values()
    if isinstance(kind, type)
    and issubclass(kind, Module)
    and kind.__module__ == activation.__name__
    and kind not in (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
)
_SOFTMAX = (nn.Softmax, nn.LogSoftmax)


def work_of_call(module: Module, input: Tensor, output: Tensor) -> Work | None:
    """The work of a forward of a linear, softmax, norm or activation layer; None for any other, and for other types.

    Args:
        module: the layer.
        input: its input, of any shape.
        output: its result.
    """
    if output.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    unit = "bf16" if output.dtype == torch.bfloat16 else "fp32"
    parameters = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    read = input.numel() * input.element_size() + parameters
    written = output.numel() * output.element_size()
    if isinstance(module, nn.Linear):
        return Work(read, written, 2 * output.numel() * module.in_features, unit)
    if isinstance(module, QuantizedLinear):
        digits = 1  # of an input: each is a product of codes
        if isinstance(module, GroupwiseLinear) and not module.int8_input:
            digits = 3 if input.dtype == torch.float32 else 2
        operations = 2 * digits * output.numel() * module.in_features
        return Work(read + module.code_bytes, written, operations, "int8")
    if isinstance(module, _SOFTMAX):
        return Work(read, written, output.numel() * EXP_OPERATIONS)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, *_ELEMENTWISE)):
        return Work(read, written, output.numel())
    return None
