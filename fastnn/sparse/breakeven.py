"""How sparse a layer has to be before its blocks are faster than the dense layer, measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from .. import nn
from ..accelerate.survey import backend_for
from ..accelerate.table import Column, plain, rich_table
from ..ops.linear import ACTIVATIONS
from ..quant.linear import is_conv1d
from ..quant.measure import medians
from .form import block_grid
from .masks import masked_weight

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Point:
    """One measurement: three layers in turns, medians, in milliseconds."""

    batch: int
    """Rows of the input."""
    density: float
    """The part of the blocks that was there."""
    ms_sparse: float
    """`fastnn.nn.BlockSparseLinear`."""
    ms_packed: float
    """fastnn's dense layer on a packed weight."""
    ms_torch: float
    """`torch.nn.Linear`, and the activation after it, where there is one."""

    @property
    def pays(self) -> bool:
        """Whether the block-sparse layer was the fastest."""
        return self.ms_sparse < min(self.ms_packed, self.ms_torch)


_COLUMNS = (
    Column("batch", lambda p: str(p.batch), "right"),
    Column("kept", lambda p: f"{p.density:.0%}", "right"),
    Column("ms sparse", lambda p: f"{p.ms_sparse:.3g}", "right"),
    Column("ms packed", lambda p: f"{p.ms_packed:.3g}", "right"),
    Column("ms torch", lambda p: f"{p.ms_torch:.3g}", "right"),
    Column("of packed", lambda p: f"{p.ms_packed / p.ms_sparse:.2f}x", "right"),
    Column("of torch", lambda p: f"{p.ms_torch / p.ms_sparse:.2f}x", "right"),
    Column("faster", lambda p: "yes" if p.pays else "", style="green"),
)


@dataclass(frozen=True)
class Advice:
    """What was measured of one shape. Prints as a table; says nothing of other shapes, threads or machines."""

    in_features: int
    out_features: int
    depth: int
    dtype: torch.dtype
    threads: int
    points: tuple[Point, ...]
    """By batch, then by density."""

    def break_even(self, batch: int) -> float | None:
        """The largest density measured up to which blocks were the fastest at every one; None where they never were.

        Raises:
            ValueError: a batch that was not measured.
        """
        mine = sorted((point for point in self.points if point.batch == batch), key=lambda point: point.density)
        if not mine:
            raise ValueError(f"fastnn.sparse.advise: batch {batch!r} was not measured")
        found = None
        for point in mine:
            if not point.pays:
                break
            found = point.density
        return found

    @property
    def summary(self) -> str:
        """One line for each batch."""
        lines = []
        for batch in dict.fromkeys(point.batch for point in self.points):
            found = self.break_even(batch)
            said = "at no density measured" if found is None else f"up to {found:.0%} of the blocks"
            lines.append(f"batch {batch}: faster than both dense layers {said}")
        return "\n".join(lines)

    @property
    def _title(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        shape = f"{self.in_features} -> {self.out_features}, blocks of 16 x {self.depth}"
        return f"{shape}, {kind}, {self.threads} thread" + ("s" if self.threads > 1 else "")

    def __str__(self) -> str:
        return plain(self._title, _COLUMNS, self.points, self.summary)

    def __rich__(self) -> Any:
        return rich_table(self._title, _COLUMNS, self.points, self.summary)


@torch.inference_mode(False)
@torch.no_grad()
def advise(
    layer: Module, batch: int | Sequence[int] = (1, 16, 128), *, depth: int = 4, densities: Sequence[float] = DENSITIES
) -> Advice:
    """Measures at which densities a layer would be faster with a block-sparse weight, here and now.

    For each batch and density three layers of the same shape run in turns in one process, on random numbers: one with
    equally many blocks at random places in each strip, fastnn's dense one on a packed weight, and torch's. With as many
    threads as torch has set. It takes about a tenth of a second a point, more where five calls take more. Other
    programs that take the cores meanwhile make the result worthless.

    Args:
        layer: a torch or fastnn Linear, Hugging Face's Conv1D or a BlockSparseLinear, of a type and on a device that
            the block-sparse kernels run on; its sizes, type, bias and activation count, its values do not.
        batch: rows of the input, one number or several.
        depth: columns of a block: 2, 4, 8 or 16.
        densities: parts of the blocks that are there, above 0 and at most 1.

    Raises:
        TypeError: a layer of another kind.
        ValueError: a batch, depth or density out of range; a type or device without a kernel.

    Example:
        >>> fastnn.sparse.advise(torch.nn.Linear(768, 3072), 16).break_even(16)
        0.7
    """
    weight, bias, activation = _parts(layer)
    batches = (batch,) if isinstance(batch, int) else tuple(batch)
    if not batches or any(type(m) is not int or m < 1 for m in batches):
        raise ValueError(f"fastnn.sparse.advise: batch must be a positive int or several, got {batch!r}")
    if not densities or any(not 0 < density <= 1 for density in densities):
        raise ValueError(f"fastnn.sparse.advise: densities must be above 0 and at most 1, got {densities!r}")
    n, k = weight.shape
    grid = block_grid(n, k, depth)
    _, reason = backend_for("linear_block_sparse", weight.device, weight.dtype)
    if reason:
        raise ValueError(f"fastnn.sparse.advise: no kernel for the layer: {reason}")
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, k, generator=generator).to(weight.dtype)
    packed, then = packed_dense(values, bias, activation), ACTIVATIONS[activation]

    def of_torch(x: Tensor) -> Tensor:
        return then(F.linear(x, values, bias))

    points: dict[tuple[int, float], Point] = {}
    for density in sorted(set(densities)):
        count = max(1, round(density * grid[1]))
        mask = torch.zeros(grid, dtype=torch.bool)
        mask.scatter_(1, torch.rand(grid, generator=generator).topk(count, 1).indices, True)
        sparse = nn.BlockSparseLinear.from_dense(values, bias, mask, depth=depth, activation=activation)
        for rows in sorted(set(batches)):
            x = torch.randn(rows, k, generator=generator).to(weight.dtype)
            points[rows, density] = Point(
                rows, count / grid[1], *medians((sparse.forward, packed.forward, of_torch), x)
            )
    found = tuple(points[key] for key in sorted(points))
    return Advice(k, n, depth, weight.dtype, torch.get_num_threads(), found)


def _parts(layer: Module) -> tuple[Tensor, Parameter | None, Any]:
    """What has the shape, type and device of the weight (out_features, in_features); bias and activation."""
    activation = getattr(layer, "activation", None)
    if isinstance(layer, nn.BlockSparseLinear):
        weight = layer.values.new_empty(1).expand(layer.out_features, layer.in_features)
    elif isinstance(layer, torch.nn.Linear):
        weight, activation = masked_weight(layer), activation if isinstance(layer, nn.Linear) else None
    elif isinstance(layer, Module) and is_conv1d(layer):
        weight, activation = masked_weight(layer).t(), None
    else:
        raise TypeError(f"fastnn.sparse.advise: layer must be a dense layer, got {type(layer).__name__}")
    bias = layer.bias
    kept = Parameter(bias.detach(), requires_grad=False) if isinstance(bias, Tensor) else None
    return weight, kept, activation


def packed_dense(weight: Tensor, bias: Parameter | None, activation: Any) -> nn.Linear:
    """fastnn's dense layer with that weight, which it keeps a packed copy of."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], False, "meta", weight.dtype, activation=activation)
    layer.weight = Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer.freeze().eval()
