"""Dense layer on blocks of int8 codes: the blocks of `block_sparse`, with the rounding of `linear_int8`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .autocast import cast
from .block_sparse import OUTPUTS, check_order, check_places, check_tensors, dense_of_blocks, strips_of
from .linear import ACTIVATION_CODE, ACTIVATIONS, Activation, check_activation
from .linear_int8 import MAX_FEATURES, check_vectors, dequantize_weight, linear_int8_reference

OP = "linear_block_sparse_int8"
UNIT = 4
"""Columns whose codes lie next to each other."""
CODE_DEPTHS = (4, 8, 16)
"""Columns that a block of codes may have: whole units."""


def linear_block_sparse_int8_pack_fake(
    codes: Tensor, starts: Tensor, scale: Tensor, grad_handled: bool = False
) -> Tensor:
    """What `linear_block_sparse_int8_pack` gives, without its values."""
    return scale.new_empty((2 * strips_of(scale.shape[0]) * OUTPUTS,))


def linear_block_sparse_int8_fwd_fake(
    input: Tensor,
    codes: Tensor,
    columns: Tensor,
    starts: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: int,
    grad_handled: bool = False,
) -> Tensor:
    """What `linear_block_sparse_int8_fwd` gives, without its values."""
    return input.new_empty((*input.shape[:-1], out_features))


if _extension._C is not None:
    _fwd = torch.ops.fastnn.linear_block_sparse_int8_fwd.default
    _dispatch.register(OP, "cpu", _dispatch.Kernels(_fwd, _fwd))  # backward is plain PyTorch
    torch.library.register_fake(
        "fastnn::linear_block_sparse_int8_pack", linear_block_sparse_int8_pack_fake, lib=_extension.library
    )
    torch.library.register_fake(
        "fastnn::linear_block_sparse_int8_fwd", linear_block_sparse_int8_fwd_fake, lib=_extension.library
    )


def codes_of_values(values: Tensor) -> Tensor:
    """Values (blocks, depth, 16) in the order of codes, (blocks, depth / 4, 16, 4)."""
    blocks, depth, _ = values.shape
    return values.reshape(blocks, depth // UNIT, UNIT, OUTPUTS).transpose(2, 3)


def values_of_codes(codes: Tensor) -> Tensor:
    """Codes (blocks, depth / 4, 16, 4) in the order of values, (blocks, depth, 16)."""
    return codes.transpose(2, 3).reshape(codes.shape[0], codes.shape[1] * UNIT, OUTPUTS)


def dense_codes(codes: Tensor, columns: Tensor, starts: Tensor, out_features: int, in_features: int) -> Tensor:
    """The int8 codes (out_features, in_features) that blocks of codes stand for, zero where there is none."""
    return dense_of_blocks(values_of_codes(codes), columns, starts, out_features, in_features)


def block_sparse_linear_int8_reference(
    input: Tensor,
    codes: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """`linear_int8_reference` with the codes that the blocks stand for."""
    dense = dense_codes(codes, columns, starts, scale.shape[0], input.shape[-1])
    return linear_int8_reference(input, dense, scale, bias, activation)


class BlockSparseLinearInt8Function(torch.autograd.Function):
    """As `LinearInt8Function`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        columns: Tensor,
        starts: Tensor,
        scale: Tensor,
        packed: Tensor,
    ) -> Tensor:
        """Runs the forward kernel."""
        ctx.save_for_backward(codes, columns, starts, scale)
        ctx.in_features, ctx.bias_dtype = input.shape[-1], None if bias is None else bias.dtype
        result: Tensor = _fwd(input, codes, columns, starts, packed, bias, scale.shape[0], 0, True)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable PyTorch, to any order."""
        codes, columns, starts, scale = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            dense = dense_codes(codes, columns, starts, scale.shape[0], ctx.in_features)
            dx = grad @ dequantize_weight(dense, scale, grad.dtype)
        if ctx.needs_input_grad[1]:
            db = grad.reshape(-1, scale.shape[0]).sum(0).to(ctx.bias_dtype)
        return dx, db, None, None, None, None, None


def check_codes(op: str, codes: Tensor, columns: Tensor, starts: Tensor, out_features: int) -> None:
    """TypeError or ValueError, in the name of `op`, unless these are the blocks of codes of such a weight."""
    if codes.dtype != torch.int8:
        raise TypeError(f"{op}: codes must be int8, got {codes.dtype}")
    shape = tuple(codes.shape)
    if len(shape) != 4 or shape[1] * UNIT not in CODE_DEPTHS or shape[2:] != (OUTPUTS, UNIT):
        known = ", ".join(map(str, CODE_DEPTHS))
        raise ValueError(
            f"{op}: codes must have shape (blocks, depth / {UNIT}, {OUTPUTS}, {UNIT}), depth one of {known}; "
            f"got {shape}"
        )
    check_places(op, shape[0], columns, starts, out_features)


def _check(
    input: Tensor,
    codes: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    op = "fastnn.block_sparse_linear_int8"
    check_tensors(op, input, codes=codes, columns=columns, starts=starts, scale=scale, bias=bias)
    check_activation(op, activation)
    if not input.dtype.is_floating_point:
        raise TypeError(f"{op}: input must be floating point, got {input.dtype}")
    if input.dim() == 0 or input.shape[-1] > MAX_FEATURES:
        raise ValueError(
            f"{op}: input must have at least one dimension, its last of at most {MAX_FEATURES}, got shape "
            f"{tuple(input.shape)}"
        )
    if scale.dim() != 1:
        raise ValueError(f"{op}: scale must have shape (out_features,), got {tuple(scale.shape)}")
    check_codes(op, codes, columns, starts, scale.shape[0])
    check_vectors(op, input, scale.shape[0], scale, bias)


def block_sparse_linear_int8(
    input: Tensor,
    codes: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """`activation(input @ weight.T + bias)` with int8 weights of which only blocks are kept.

    `fastnn.block_sparse_linear` with the arithmetic of `fastnn.linear_int8`: each row of the input is rounded by
    `quantize_rows`, the products of codes are summed in int32, exactly; sum x row's scale x output's scale, bias and
    activation follow in float32. Up to an activation that is not relu the result is the same bit for bit on every
    instruction set and for any number of threads, and that of `fastnn.linear_int8` with zeros where no block is. A row
    with NaN or an infinity anywhere gives a row of NaN and touches no other. `fastnn.sparse.to_int8_blocks` makes the
    form of a dense weight. `fastnn.nn.Int8BlockSparseLinear` keeps what the kernel needs of the sums of the codes; here
    each call adds them up.

    Args:
        input: (*, in_features), any strides; float32, bfloat16 and float16 run on the kernel, other floating types on
            the reference. in_features is at most 131072.
        codes: int8 (blocks, depth / 4, 16, 4), depth 4, 8 or 16, in [-127, 127]: `codes[b, q, i, j]` is that of output
            `16 * strip + i` and column `depth * columns[b] + 4 * q + j`. Entries beyond out_features or in_features
            count as zero.
        columns: int32 (blocks,), rising within a strip: in [0, ceil(in_features / depth)).
        starts: int32 (ceil(out_features / 16) + 1,), rising: blocks [starts[s], starts[s + 1]) are those of strip s.
        scale: float32 (out_features,): an output's weights are its codes times it.
        bias: (out_features,), float32 or of the input's type, or None.
        activation: as `fastnn.linear`.

    Returns:
        A contiguous tensor (*, out_features) of the input's type. The input's gradient is that of the product with
        the weight that the codes stand for (rounding counts as the identity); codes and scale have none.

    Raises:
        TypeError: types or devices that do not fit.
        ValueError: shapes that do not fit, indices out of order, an unknown activation.
        IndexError: a column out of range.
        NotImplementedError: a forced backend cannot run the call; a gradient of `scale` is wanted.
    """
    return block_sparse_linear_int8_maybe_packed(input, codes, columns, starts, scale, bias, activation, None)


def block_sparse_linear_int8_maybe_packed(
    input: Tensor,
    codes: Tensor,
    columns: Tensor,
    starts: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    packed: Tensor | None,
) -> Tensor:
    """`block_sparse_linear_int8` with what a layer keeps of its codes (`fastnn.ops.packing`), where there is that."""
    if packed is not None and activation in ACTIVATION_CODE and _dispatch.is_plain(OP, input, bias):
        # The kernel checks the indices, and the bias's type and shape; packing has checked codes and scale.
        code = ACTIVATION_CODE[activation]
        result: Tensor = _fwd(input, codes, columns, starts, packed, bias, scale.shape[0], code, True)
        return result
    if isinstance(input, Tensor) and autocast.active(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input = cast(input, dtype)
        bias = bias if bias is None or bias.dtype == torch.float32 else cast(bias, dtype)
    _check(input, codes, columns, starts, scale, bias, activation)
    if _dispatch.pick(OP, input) == "reference":
        note_reference("linear_block_sparse_int8_fwd")
        depth = codes.shape[1] * UNIT
        check_order("fastnn.block_sparse_linear_int8", columns, starts, -(-input.shape[-1] // depth))
        return block_sparse_linear_int8_reference(input, codes, columns, starts, scale, bias, activation)
    codes, columns, starts = codes.contiguous(), columns.contiguous(), starts.contiguous()
    if packed is None:
        packed = torch.ops.fastnn.linear_block_sparse_int8_pack.default(codes, starts, scale.detach(), True)
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        found = BlockSparseLinearInt8Function.apply(input, bias, codes, columns, starts, scale, packed)  # type: ignore[no-untyped-call]
        return ACTIVATIONS[activation](found)
    code = ACTIVATION_CODE[activation]
    result = _fwd(input, codes, columns, starts, packed, bias, scale.shape[0], code, True)
    return result
