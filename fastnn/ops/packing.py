"""Packed weights: a layer-owned copy of a frozen weight in the order the matrix kernel reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _extension


class PackedWeight:
    """The packed copy of one layer's weight and the rule that it is never stale.

    Belongs to one layer. It is in no state_dict, and pickling or copying the layer yields an empty one. The copy is
    built on first use and rebuilt when the weight's memory, version, type, shape or strides, or the instruction set,
    differ; it is not used while the layer trains or a gradient of the weight may be wanted, because torch's fused
    optimizers write to a weight without moving its version.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._source: Tensor | None = None  # holds the weight's memory: else another weight could get its address

    def get(self, weight: Tensor, training: bool) -> Tensor | None:
        """The packed copy of `weight`, or None where the rule forbids it or no kernel reads one."""
        if torch.compiler.is_compiling() or _dispatch.transformed():
            return None  # a data pointer cannot be guarded; a transformed tensor has none
        if training or (weight.requires_grad and torch.is_grad_enabled()):
            self.drop()
            return None
        if _extension._C is None or weight.device.type != "cpu" or weight.dtype not in _dispatch.KERNEL_DTYPES:
            return None
        if _dispatch.backend_in_force() not in (None, "cpu"):
            return None
        key = (
            weight.data_ptr(),
            weight._version,
            weight.dtype,
            weight.shape,
            weight.stride(),
            _extension._C.isa(),
        )
        if self._packed is None or key != self._key:
            self._packed = torch.ops.fastnn.linear_pack.default(weight.detach(), True)
            self._key, self._source = key, weight.detach()
        return self._packed

    def drop(self) -> None:
        """Forgets the packed copy and frees its memory."""
        self._packed = self._source = None
        self._key = ()

    @property
    def nbytes(self) -> int:
        """Bytes the packed copy holds at present."""
        return 0 if self._packed is None else self._packed.numel() * self._packed.element_size()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()
