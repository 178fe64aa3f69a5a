"""Embeddings on codes of 4 or 8 bits in groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.embedding import embedding_groupwise
from ..ops.groups import check_weight, dequantize_groups, groups_of, quantize_groups
from .quantized import QuantizedModule


class GroupwiseEmbedding(QuantizedModule):
    """A table of vectors on codes, with a float16 scale for each `group_size` of them along a row.

    `weight` (uint8 (num_embeddings, ceil(embedding_dim / 2)), two codes of 4 bits to a byte, or int8 (num_embeddings,
    embedding_dim)), `weight_scale` and, where not symmetric, `weight_offset` (float16, (num_embeddings, groups)) are
    buffers, the same as a `GroupwiseLinear`'s, which may share them (tied weights). A new table is zero.

    Args:
        num_embeddings: rows.
        embedding_dim: size of a vector.
        device: where the buffers live.
        dtype: of the results, the default type unless given; `.half()`, `.to(dtype)` and the like change it.
        group_size: columns that share a scale; the last group of a row may be shorter.
        symmetric: whether there is no offset; codes of 8 bits have none.
    """

    op = "linear_groupwise"
    scale_buffers = ("weight_scale", "weight_offset")
    weight_offset: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int = 64,
        symmetric: bool = True,
    ) -> None:
        name = f"fastnn.nn.{type(self).__name__}"
        if type(group_size) is not int or group_size < 1:
            raise ValueError(f"{name}: group_size must be a positive int, got {group_size!r}")
        if self.code_dtype == torch.int8 and not symmetric:
            raise ValueError(f"{name}: codes of 8 bits are symmetric")
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.out_features, self.in_features = num_embeddings, embedding_dim  # of the weight, as a dense layer has it
        self.group_size, self.symmetric = group_size, symmetric
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        shape = num_embeddings, groups_of(embedding_dim, group_size)
        columns = (embedding_dim + 1) // 2 if self.code_dtype == torch.uint8 else embedding_dim
        self.register_buffer("weight", torch.zeros(num_embeddings, columns, dtype=self.code_dtype, device=device))
        self.register_buffer("weight_scale", torch.zeros(shape, dtype=torch.float16, device=device))
        offset = None if symmetric else torch.zeros(shape, dtype=torch.float16, device=device)
        self.register_buffer("weight_offset", offset)

    @classmethod
    def from_float(cls, weight: Tensor, *, group_size: int = 64, symmetric: bool = True) -> GroupwiseEmbedding:
        """The table of a floating weight (num_embeddings, embedding_dim), rounded by `fastnn.ops.quantize_groups`.

        Args:
            weight: finite, any strides; results are of its type.
            group_size, symmetric: as in the constructor.

        Raises:
            ValueError: a weight that is not finite or beyond what float16 scales stand for.
        """
        bits = 4 if cls.code_dtype == torch.uint8 else 8
        parts = quantize_groups(weight, group_size, bits=bits, symmetric=symmetric)
        rows, columns = weight.shape
        table = cls(rows, columns, "meta", weight.dtype, group_size=group_size, symmetric=symmetric)
        table.weight, table.weight_scale, table.weight_offset = parts
        return table

    def forward(self, input: Tensor) -> Tensor:
        """Row `input[...]` of the table: integers (*) give (*, embedding_dim); IndexError where one is out of range."""
        codes, scale, offset = self.weight, self.weight_scale, self.weight_offset
        return embedding_groupwise(
            input, codes, scale, offset, in_features=self.embedding_dim, group_size=self.group_size, dtype=self.dtype
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table that the codes stand for, (num_embeddings, embedding_dim)."""
        codes, scale, offset = self.weight, self.weight_scale, self.weight_offset
        return dequantize_groups(codes, scale, offset, self.embedding_dim, self.group_size, dtype)

    def options(self) -> dict[str, Any]:
        """What a file keeps beside the buffers."""
        return {"group_size": self.group_size, "symmetric": self.symmetric}

    @classmethod
    def stored(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GroupwiseEmbedding:
        """As in the base class."""
        columns, group_size, symmetric = (options[name] for name in ("in_features", "group_size", "symmetric"))
        check_stored(cls.code_dtype, tensors, columns, group_size, symmetric)
        rows = tensors["weight"].shape[0]
        return cls(rows, columns, "meta", group_size=group_size, symmetric=symmetric)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, group_size={self.group_size}, symmetric={self.symmetric}, "
            f"dtype={self.dtype}"
        )


class Int4Embedding(GroupwiseEmbedding):
    """A `GroupwiseEmbedding` on codes of 4 bits."""

    code_dtype = torch.uint8


class Int8Embedding(GroupwiseEmbedding):
    """A `GroupwiseEmbedding` on codes of 8 bits."""

    code_dtype = torch.int8


def check_stored(
    code_dtype: torch.dtype, tensors: Mapping[str, Tensor], in_features: Any, group_size: Any, symmetric: Any
) -> None:
    """Raises ValueError, TypeError or KeyError where tensors of a file are no weight of codes in groups."""
    if type(in_features) is not int or in_features < 0 or symmetric is not ("weight_offset" not in tensors):
        raise ValueError("in_features or the offsets are missing")
    if tensors["weight"].dtype != code_dtype:
        raise ValueError(f"weight must be {code_dtype} codes")
    offset = tensors.get("weight_offset")
    check_weight("fastnn.load", tensors["weight"], tensors["weight_scale"], offset, in_features, group_size)
