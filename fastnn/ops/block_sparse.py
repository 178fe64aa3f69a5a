"""Dense layer on a block-sparse weight: only blocks of 16 outputs times a few columns are kept, and cost time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .autocast import cast
from .linear import (
    _GRAD_FROM_INPUT,
    _GRAD_FROM_OUTPUT,
    ACTIVATION_CODE,
    ACTIVATIONS,
    Activation,
    check_activation,
    linear_bwd_reference,
)

OUTPUTS = 16
"""Outputs of a block: the width of a strip of the matrix kernels (csrc/cpu/gemm/params.h)."""
DEPTHS = (2, 4, 8, 16)
"""Columns that a block may have."""
OP = "linear_block_sparse"


def linear_block_sparse_fwd_fake(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: int,
    save_pre: bool,
    grad_handled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `linear_block_sparse_fwd` gives, without its values."""
    shape = (*input.shape[:-1], out_features)
    return input.new_empty(shape), input.new_empty(shape) if save_pre else None


def linear_block_sparse_bwd_fake(
    grad: Tensor,
    input: Tensor | None,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    slope: Tensor | None,
    activation: int,
    input_shape: list[int],
    mask: list[bool],
    grad_handled: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `linear_block_sparse_bwd` gives, without its values."""
    dx = grad.new_empty(input_shape) if mask[0] else None
    dvalues = values.new_empty(values.shape) if mask[1] else None
    db = values.new_empty((grad.shape[-1],)) if mask[2] else None
    return dx, dvalues, db


if _extension._C is not None:
    _dispatch.register_raw(OP)
    torch.library.register_fake("fastnn::linear_block_sparse_fwd", linear_block_sparse_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::linear_block_sparse_bwd", linear_block_sparse_bwd_fake, lib=_extension.library)
    _fwd = torch.ops.fastnn.linear_block_sparse_fwd.default


def strips_of(out_features: int) -> int:
    """How many rows of blocks so many outputs have; the last may be partly empty."""
    return (out_features + OUTPUTS - 1) // OUTPUTS


def values_empty(shape: tuple[int, ...], dtype: torch.dtype | None, device: Any) -> Tensor:
    """Memory for values: on huge pages on the CPU, which few rows are read 1.5 times as fast from."""
    found = torch.empty(shape, dtype=dtype, device=device)
    if _extension._C is None or found.device.type != "cpu" or found.numel() == 0 or _dispatch.transformed():
        return found
    if torch.compiler.is_compiling() or type(found) is not Tensor:
        return found
    kept = torch.from_numpy(_extension._C.keep_memory(found.numel() * found.element_size()))
    return kept.view(found.dtype).view(shape)


def _places(columns: Tensor, starts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Each block's strip and column of blocks."""
    # Not of `blocks` repeats at once: torch.compile cannot trace an output whose size is in the data.
    index = torch.arange(blocks, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts, index, right=True) - 1, columns.long()


def dense_of_blocks(values: Tensor, columns: Tensor, starts: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight (out_features, in_features) that blocks stand for, zero where there is none; differentiable."""
    blocks, depth, _ = values.shape
    strips, width = strips_of(out_features), (in_features + depth - 1) // depth
    grid = values.new_zeros((strips, width, depth, OUTPUTS)).index_put(_places(columns, starts, blocks), values)
    return grid.permute(0, 3, 1, 2).reshape(strips * OUTPUTS, width * depth)[:out_features, :in_features]


def blocks_of_dense(dense: Tensor, columns: Tensor, starts: Tensor, depth: int) -> Tensor:
    """The values (blocks, depth, 16) of a weight where blocks are; what lies beyond it is zero. Differentiable."""
    n, k = dense.shape
    strips, width = strips_of(n), (k + depth - 1) // depth
    padded = F.pad(dense, (0, width * depth - k, 0, strips * OUTPUTS - n))
    grid = padded.reshape(strips, OUTPUTS, width, depth).permute(0, 2, 3, 1)
    return grid[_places(columns, starts, columns.shape[0])]


def block_sparse_linear_reference(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    """activation(x W^T + b) with the W that the blocks stand for."""
    weight = dense_of_blocks(values, columns, starts, out_features, input.shape[-1])
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


class BlockSparseLinearFunction(torch.autograd.Function):
    """As `LinearFunction`: the pre-activation, where the slope needs it, is a second output that the wrapper hides."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        values: Tensor,
        bias: Tensor | None,
        columns: Tensor,
        starts: Tensor,
        out_features: int,
        activation: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the forward kernel; returns (output, pre-activation or None)."""
        save_pre = activation in _GRAD_FROM_INPUT
        output, pre = _run(input, values, columns, starts, bias, out_features, activation, save_pre)
        slope = output if activation in _GRAD_FROM_OUTPUT else pre
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, values, columns, starts, slope)
        ctx.activation, ctx.input_shape = activation, input.shape
        ctx.set_materialize_grads(False)
        return output, pre

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs the backward kernel, or the differentiable formula for higher derivatives."""
        input, values, columns, starts, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling():
            grad_pre = None  # as in LinearFunction
        if grad is None and grad_pre is None:
            return (None,) * 7
        if torch.is_grad_enabled() or grad is None or grad_pre is not None:
            features = (grad_pre if grad is None else grad).shape[-1]  # type: ignore[union-attr]
            weight = dense_of_blocks(values, columns, starts, features, ctx.input_shape[-1])
            dx, dw, db = linear_bwd_reference(grad, grad_pre, input, weight, slope, ctx.activation, needs)
            dvalues = None if dw is None else blocks_of_dense(dw, columns, starts, values.shape[1])
        else:
            code = ACTIVATION_CODE[ctx.activation]
            shape, mask = list(ctx.input_shape), list(needs)
            bwd = torch.ops.fastnn.linear_block_sparse_bwd.default
            dx, dvalues, db = bwd(grad, input, values, columns, starts, slope, code, shape, mask, True)
        return dx, dvalues, db, None, None, None, None


def _run(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str | None,
    save_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    code = ACTIVATION_CODE[activation]
    found: tuple[Tensor, Tensor | None] = _fwd(
        input, values.contiguous(), columns, starts, bias, out_features, code, save_pre, True
    )
    return found


def check_blocks(op: str, values: Tensor, columns: Tensor, starts: Tensor, out_features: int, in_features: int) -> None:
    """TypeError, ValueError or IndexError, in the name of `op`, unless these are the blocks of such a weight."""
    if values.dim() != 3 or values.shape[1] not in DEPTHS or values.shape[2] != OUTPUTS:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(
            f"{op}: values must have shape (blocks, depth, {OUTPUTS}), depth one of {known}; got {tuple(values.shape)}"
        )
    check_places(op, values.shape[0], columns, starts, out_features)


def check_places(op: str, blocks: int, columns: Tensor, starts: Tensor, out_features: int) -> None:
    """TypeError or ValueError, in the name of `op`, unless these are the places of so many blocks."""
    if type(out_features) is not int or out_features < 0:
        raise ValueError(f"{op}: out_features must be an int that is not negative, got {out_features!r}")
    wanted = {"columns": blocks, "starts": strips_of(out_features) + 1}
    for name, tensor in (("columns", columns), ("starts", starts)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32, got {tensor.dtype}")
        if tuple(tensor.shape) != (wanted[name],):
            raise ValueError(
                f"{op}: {name} of {blocks} blocks and out_features = {out_features} must have shape "
                f"({wanted[name]},), got {tuple(tensor.shape)}"
            )


def check_order(op: str, columns: Tensor, starts: Tensor, limit: int) -> None:
    """What the kernel checks of the indices, for where it does not run."""
    if torch.compiler.is_compiling() or columns.device.type == "meta" or _dispatch.transformed():
        return
    blocks = columns.shape[0]
    if int(starts[0]) != 0 or int(starts[-1]) != blocks or bool((starts.diff() < 0).any()):
        raise ValueError(f"{op}: starts must rise from 0 to the number of blocks, {blocks}")
    if blocks and not (0 <= int(columns.min()) and int(columns.max()) < limit):
        raise IndexError(f"{op}: columns must be in [0, {limit}), got {int(columns.min())} to {int(columns.max())}")
    strip, column = _places(columns, starts, blocks)
    if bool(((strip * limit + column).diff() <= 0).any()):
        raise ValueError(f"{op}: columns must rise within a strip of outputs")


def check_tensors(op: str, input: Tensor, **others: Tensor | None) -> None:
    """TypeError, in the name of `op`, unless all are dense tensors on the input's device; the bias may be None."""
    for name, tensor in {"input": input, **others}.items():
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.device != input.device:
            raise TypeError(f"{op}: {name} must be on the input's device {input.device}, got {tensor.device}")


def _check(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str | None,
) -> None:
    op = "fastnn.block_sparse_linear"
    check_tensors(op, input, values=values, columns=columns, starts=starts, bias=bias)
    check_activation(op, activation)
    if not input.dtype.is_floating_point:
        raise TypeError(f"{op}: input must be floating point, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have at least one dimension, got shape ()")
    check_blocks(op, values, columns, starts, out_features, input.shape[-1])
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"{op}: bias must have shape ({out_features},), got {tuple(bias.shape)}")
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{op}: {name} must have the input's dtype {input.dtype}, got {tensor.dtype}")


def block_sparse_linear(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: Activation | None = None,
) -> Tensor:
    """`activation(input @ weight.T + bias)` with a weight of which only blocks are kept; time goes with their number.

    A block is 16 neighbouring outputs times `depth` neighbouring columns. `fastnn.sparse.to_blocks` makes this form of
    a dense weight, `fastnn.sparse.to_dense` goes back. It is block compressed sparse rows (BSR), each block stored by
    columns, which is the order in which the kernel reads it: there is no other, packed copy.

    Args:
        input: (*, in_features), any strides; float32, bfloat16 and float16 run on the kernels (float32
            accumulation), other floating types on the reference.
        values: (blocks, depth, 16) of the input's type, depth 2, 4, 8 or 16: `values[b, j, i]` is the weight of output
            `16 * strip + i` and column `depth * columns[b] + j`. Entries beyond out_features or in_features count as
            zero and must be finite.
        columns: int32 (blocks,), rising within a strip: in [0, ceil(in_features / depth)).
        starts: int32 (ceil(out_features / 16) + 1,), rising: blocks [starts[s], starts[s + 1]) are those of strip s.
        bias: (out_features,) of the input's type, or None.
        out_features: how many outputs there are; the last strip may be partly used.
        activation: as `fastnn.linear`.

    Returns:
        A contiguous tensor (*, out_features) of the input's type. Input, values and bias have gradients, of any order;
        that of the values costs what the blocks cost. A column that no block of a strip holds takes no part in its
        outputs on the kernels, even where the input is not finite there; on the reference it counts as zero times it.

    Raises:
        TypeError: types or devices that do not fit.
        ValueError: shapes that do not fit, indices out of order, an unknown activation.
        IndexError: a column out of range.
        NotImplementedError: a forced backend cannot run the call.
    """
    if isinstance(input, Tensor) and autocast.active(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, values, bias = cast(input, dtype), cast(values, dtype), cast(bias, dtype)
    _check(input, values, columns, starts, bias, out_features, activation)
    if _dispatch.pick(OP, input) == "reference":
        note_reference("linear_block_sparse_fwd")
        check_order("fastnn.block_sparse_linear", columns, starts, -(-input.shape[-1] // values.shape[1]))
        return block_sparse_linear_reference(input, values, columns, starts, bias, out_features, activation)
    columns, starts = columns.contiguous(), starts.contiguous()
    if torch.is_grad_enabled() and (
        input.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        values = values.contiguous()
        found = BlockSparseLinearFunction.apply(input, values, bias, columns, starts, out_features, activation)  # type: ignore[no-untyped-call]
        return found[0]
    return _run(input, values, columns, starts, bias, out_features, activation, False)[0]


def block_sparse_linear_of_layer(
    input: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: Activation | None,
) -> Tensor:
    """`block_sparse_linear` of tensors that a layer keeps together.

    Without gradients nothing runs but the kernel, which looks at types, shapes and indices itself: of a row of 768 by
    3072 at a density of 0.1, 26 us, that saves 6.
    """
    if _dispatch.is_plain(OP, input, bias) and input.dtype == values.dtype and values.is_cpu:
        return _run(input, values, columns, starts, bias, out_features, activation, False)[0]
    return block_sparse_linear(input, values, columns, starts, bias, out_features=out_features, activation=activation)
