"""Rotary position embedding of query and key: one pass over both, float32 in between."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference


class RopeOptions(NamedTuple):
    """What the kernels are told beside the tensors."""

    rotary_dim: int
    interleaved: bool
    heads_dim: int
    """The dimension of query and key, of four, that counts the heads: 1 or 2."""


def is_inside(x: Tensor, heads_dim: int) -> bool:
    """Whether the heads of a position lie side by side in memory, as a linear layer gives them."""
    by_first = x.stride(1) < x.stride(2)
    return bool(by_first if heads_dim == 1 else not by_first)


def _like(x: Tensor, heads_dim: int, inside: bool) -> Tensor:
    b, first, second, d = x.shape
    if inside == (heads_dim == 1):
        return x.new_empty((b, second, first, d)).transpose(1, 2)
    return x.new_empty((b, first, second, d))


def rope_fwd_fake(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads_dim: int,
    grad_handled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `rope_fwd` gives, without its values."""
    rotated = _like(query, heads_dim, is_inside(query, heads_dim))
    return rotated, None if key is None else _like(key, heads_dim, is_inside(key, heads_dim))


def rope_bwd_fake(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads_dim: int,
    inside: list[bool],
    grad_handled: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """What `rope_bwd` gives, without its values."""
    dq = None if grad_query is None else _like(grad_query, heads_dim, inside[0])
    return dq, None if grad_key is None else _like(grad_key, heads_dim, inside[1])


if _extension._C is not None:
    _dispatch.register_raw("rope")
    torch.library.register_fake("fastnn::rope_fwd", rope_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::rope_bwd", rope_bwd_fake, lib=_extension.library)


def _pair_of(table: Tensor, options: RopeOptions) -> tuple[Tensor, Tensor]:
    """What a table (*, length, width) holds for the first and the second of each pair, to multiply with query."""
    table = table.unsqueeze(options.heads_dim - 4)
    if table.shape[-1] != options.rotary_dim:
        return table, table
    if options.interleaved:
        return table[..., ::2], table[..., 1::2]
    first, second = table.chunk(2, -1)
    return first, second


def rope_reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, options: RopeOptions, inverse: bool = False
) -> Tensor:
    """Each pair (a, b) of features as (a cos - b sin, b cos + a sin), in plain PyTorch; inverse: the transpose."""
    if positions is not None:
        cos, sin = (torch.nn.functional.embedding(positions, table) for table in (cos, sin))
    (cos_a, cos_b), (sin_a, sin_b) = _pair_of(cos, options), _pair_of(sin, options)
    turned, rest = x[..., : options.rotary_dim], x[..., options.rotary_dim :]
    half = options.rotary_dim // 2
    a, b = (turned[..., ::2], turned[..., 1::2]) if options.interleaved else (turned[..., :half], turned[..., half:])
    if inverse:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    joined = torch.stack((first, second), -1).flatten(-2) if options.interleaved else torch.cat((first, second), -1)
    return torch.cat((joined.to(x.dtype), rest), -1)


class RopeFunction(torch.autograd.Function):
    """Saves the tables and positions, not query or key: the gradient is rotated back by the same kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        options: RopeOptions,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the backend's forward kernel."""
        ctx.save_for_backward(cos, sin, positions)
        ctx.set_materialize_grads(False)
        heads_dim = options.heads_dim
        ctx.inside = [is_inside(query, heads_dim), key is not None and is_inside(key, heads_dim)]
        ctx.options, ctx.backend = options, backend
        rotated: tuple[Tensor, Tensor | None] = _dispatch.KERNELS["rope"][backend].fwd(
            query, key, cos, sin, positions, *options, True
        )
        return rotated

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor | None, grad_key: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or the differentiable formula under create_graph."""
        cos, sin, positions = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = [grad if needed else None for grad, needed in zip((grad_query, grad_key), needs, strict=False)]
        if grads[0] is None and grads[1] is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            found = [None if g is None else rope_reference(g, cos, sin, positions, ctx.options, True) for g in grads]
        else:
            bwd = _dispatch.KERNELS["rope"][ctx.backend].bwd
            found = list(bwd(*grads, cos, sin, positions, *ctx.options, ctx.inside, True))
        return *found, None, None, None, None, None


def _check_tensor(key: str, tensor: object, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fastnn.rope: {key} must be a Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"fastnn.rope: {key} must be a dense tensor, got layout {tensor.layout}")
    if key == "positions":
        if tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"fastnn.rope: positions must be int64 or int32, got {tensor.dtype}")
    elif not tensor.dtype.is_floating_point:
        raise TypeError(f"fastnn.rope: {key} must be floating point, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"fastnn.rope: {key} is on {tensor.device}, query on {query.device}")


def _check_query(query: object, unsqueeze_dim: object, rotary_dim: object, interleaved: object) -> None:
    _check_tensor("query", query, query)  # type: ignore[arg-type]  # its device is looked at last
    for name, value in (("unsqueeze_dim", unsqueeze_dim), ("rotary_dim", rotary_dim)):
        if isinstance(value, bool) or (not isinstance(value, int) and (value is not None or name == "unsqueeze_dim")):
            raise TypeError(f"fastnn.rope: {name} must be an int, got {type(value).__name__}")
    if not isinstance(interleaved, bool):
        raise TypeError(f"fastnn.rope: interleaved must be a bool, got {type(interleaved).__name__}")


def _check_shapes(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, options: RopeOptions
) -> None:
    """Of query and key with four dimensions."""
    rotary, heads_dim = options.rotary_dim, options.heads_dim
    batch, length, features = query.shape[0], query.shape[3 - heads_dim], query.shape[3]
    if rotary % 2 or not 0 <= rotary <= features:
        raise ValueError(
            f"fastnn.rope: rotary_dim, all features unless given, must be even and at most the {features} features "
            f"of a head; got {rotary}"
        )
    if key is not None and (key.dim() != 4 or [n for d, n in enumerate(key.shape) if d != heads_dim] != [
        n for d, n in enumerate(query.shape) if d != heads_dim
    ]):  # fmt: skip
        raise ValueError(
            f"fastnn.rope: key must have query's shape {tuple(query.shape)} in all but dimension {heads_dim}, the "
            f"heads; got {tuple(key.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"fastnn.rope: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if cos.shape[-1] not in (rotary, rotary // 2):
        raise ValueError(
            f"fastnn.rope: cos must have a width of rotary_dim {rotary}, or half of it; got shape {tuple(cos.shape)}"
        )
    if positions is None:
        if tuple(cos.shape[:-1]) not in ((length,), (1, length), (batch, length)):
            raise ValueError(
                f"fastnn.rope: cos must be (length, width) or (batch or 1, length, width), the batch {batch} and the "
                f"length {length}; got shape {tuple(cos.shape)}"
            )
        return
    if cos.dim() != 2:
        raise ValueError(f"fastnn.rope: beside positions, cos must be (rows, width); got shape {tuple(cos.shape)}")
    if tuple(positions.shape) not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"fastnn.rope: positions must be (length,) or (batch or 1, length), the batch {batch} and the length "
            f"{length}; got shape {tuple(positions.shape)}"
        )


def rope(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    positions: Tensor | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding (Su et al., RoFormer) of query and key, from one pass over each.

    Each pair (a, b) of the first `rotary_dim` features of a head becomes (a cos - b sin, b cos + a sin); the other
    features stay as they are. The first five arguments are those of Hugging Face's `apply_rotary_pos_emb`.

    Args:
        query: (batch, heads, length, features), any strides (heads side by side in memory are read where they lie), or
            without the batch; float32, bfloat16 and float16 run on the kernels, other floating types on the reference.
            It is never written to.
        key: the same with its own number of heads, or None.
        cos: (length, width) or (batch or 1, length, width); beside `positions` (rows, width). The width is rotary_dim,
            an entry for each feature, or half of it, one for each pair. The query's type, or float32 beside half
            precision; of another one, the reference runs.
        sin: of cos's shape and type.
        unsqueeze_dim: the dimension of query and key that counts the heads; the length is the other one before the
            features. 1, or 2 for (batch, length, heads, features); one less without a batch.
        positions: (length,) or (batch or 1, length), the rows of cos and sin to take, int64 or int32; None for rows in
            order.
        rotary_dim: how many features of a head are rotated, even; None for all, where cos has an entry for each.
            Narrower tables need it: they could be of pairs or of a part of the features.
        interleaved: whether a pair is two neighbours (GPT-J) instead of features i and i + rotary_dim / 2 (GPT-NeoX,
            Llama). Tables with an entry for each feature have it in the features' order.

    Returns:
        (query, key) rotated, of their types and shapes, or (query, None); computed in float32 and rounded once. Memory
        is in the order of the input's: heads side by side stay so. Backward rotates the gradients back; it keeps the
        tables and positions and neither query nor key. A gradient of cos or sin is what the reference gives.

    Raises:
        TypeError: a tensor not of a floating type, query and key of two types, an option of the wrong type.
        ValueError: shapes or devices that do not fit.
        IndexError: a position that is no row of cos.
        NotImplementedError: a forced backend cannot run the call.
    """
    _check_query(query, unsqueeze_dim, rotary_dim, interleaved)
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin), ("positions", positions)):
        if tensor is not None or name in ("cos", "sin"):
            _check_tensor(name, tensor, query)
    if key is not None and key.dtype != query.dtype:
        raise TypeError(f"fastnn.rope: key must have query's type {query.dtype}, got {key.dtype}")
    rank = query.dim()
    heads_dim = unsqueeze_dim + rank if unsqueeze_dim < 0 else unsqueeze_dim
    if rank not in (3, 4) or heads_dim not in (rank - 3, rank - 2):
        raise ValueError(
            "fastnn.rope: query must be (batch, heads, length, features) or (heads, length, features) and "
            f"unsqueeze_dim its dimension of heads or of length; got shape {tuple(query.shape)} and {unsqueeze_dim}"
        )
    if cos.dim() < 2:
        raise ValueError(f"fastnn.rope: cos must be (length, width) or (batch, length, width), got {tuple(cos.shape)}")
    if rotary_dim is None and cos.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"fastnn.rope: cos has a width of {cos.shape[-1]} beside the {query.shape[-1]} features of a head: give "
            "rotary_dim, as many as the width (an entry for each feature rotated) or twice as many (for each pair)"
        )
    options = RopeOptions(cos.shape[-1] if rotary_dim is None else rotary_dim, interleaved, heads_dim + 4 - rank)
    if rank == 4:
        return _rope(query, key, cos, sin, positions, options)
    if key is not None and key.dim() != 3:
        raise ValueError(f"fastnn.rope: key must have query's three dimensions, got shape {tuple(key.shape)}")
    found = _rope(query[None], None if key is None else key[None], cos, sin, positions, options)
    return found[0].squeeze(0), None if found[1] is None else found[1].squeeze(0)


def _rope(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, options: RopeOptions
) -> tuple[Tensor, Tensor | None]:
    _check_shapes(query, key, cos, sin, positions, options)
    backend = _dispatch.pick("rope", query)
    grad = torch.is_grad_enabled()
    odd = _why_reference(query, cos, sin, grad) if backend != "reference" else ""
    if odd:
        _dispatch.refuse_if_forced("rope", odd)
    if backend == "reference" or odd:
        note_reference("rope_fwd")
        rotated = [None if x is None else rope_reference(x, cos, sin, positions, options) for x in (query, key)]
        return rotated[0], rotated[1]  # type: ignore[return-value]  # there is a query
    if positions is not None and positions.dtype != torch.int64:
        positions = positions.long()
    if grad and (query.requires_grad or (key is not None and key.requires_grad)):
        return RopeFunction.apply(query, key, cos, sin, positions, options, backend)  # type: ignore[no-untyped-call]
    found: tuple[Tensor, Tensor | None] = _dispatch.KERNELS["rope"][backend].fwd(
        query, key, cos, sin, positions, *options, True
    )
    return found


def _why_reference(query: Tensor, cos: Tensor, sin: Tensor, grad: bool) -> str:
    """Why a call goes to the reference though its query could run on a kernel, in words; empty where it does not."""
    if grad and (cos.requires_grad or sin.requires_grad):
        return "a gradient of cos or sin is wanted"
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (query.dtype, torch.float32) or table.dtype != cos.dtype:
            return f"{name} must have query's type {query.dtype} or be float32, cos and sin alike; got {table.dtype}"
    return ""


def rope_tables(
    positions: int | Tensor,
    dim: int,
    theta: float = 10000.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin of `position * theta**(-2 i / dim)` for `fastnn.rope`, an entry for each pair of features.

    Args:
        positions: a tensor (*, length) of them, or their number: 0, 1, ...
        dim: how many features are rotated (the rotary_dim of `fastnn.rope`), even.
        theta: the base.
        device: of the result; that of `positions` unless given.
        dtype: of the result. Angles are computed in float64: in float32 a position of a million is off by 0.06.

    Returns:
        (cos, sin), each (*, length, dim / 2).

    Raises:
        ValueError: `dim` not even and positive, `theta` not positive.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"fastnn.rope_tables: dim must be even and positive, got {dim}")
    if not theta > 0:
        raise ValueError(f"fastnn.rope_tables: theta must be positive, got {theta}")
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, device=device)
    places = positions.to(device=device or positions.device, dtype=torch.float64)
    frequencies = theta ** (-torch.arange(0, dim, 2, device=places.device, dtype=torch.float64) / dim)
    angles = places[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
