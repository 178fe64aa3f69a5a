"""Packed weights: a layer-owned copy of a frozen weight in the order the matrix kernel reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _extension


def state_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Differs when the tensor is replaced or written to. None: of an inference tensor torch counts no changes."""
    try:
        return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()
    except RuntimeError:
        if tensor.is_inference():
            return None
        raise


def warn_of_uncounted(what: str, consequence: str) -> None:
    """That `what` is an inference tensor, and so is not ..."""
    warnings.warn(
        f"fastnn: {what} was created in torch.inference_mode, where torch counts no changes, and so is not "
        f"{consequence}. Create the model outside inference_mode (torch.no_grad is fine)",
        RuntimeWarning,
        stacklevel=3,
    )


class PackedWeight:
    """The packed copy of one layer's weight and the rule that it is never stale.

    Belongs to one layer. It is in no state_dict, and pickling or copying the layer yields an empty one. The copy is
    built on first use and rebuilt when the weight's memory, version, type, shape or strides, or the instruction set,
    differ; it is not used while the layer trains or a gradient of the weight may be wanted, because torch's fused
    optimizers write to a weight without moving its version. A weight that is an inference tensor has no version: it is
    never packed, with a RuntimeWarning.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._key: tuple[Any, ...] = ()
        self._source: tuple[Tensor, ...] = ()  # holds the weight's memory: else another weight could get its address

    def get(self, weight: Tensor, training: bool) -> Tensor | None:
        """The packed copy of `weight`, or None where the rule forbids it or no kernel reads one."""
        if torch.compiler.is_compiling() or _dispatch.transformed():
            return None  # a data pointer cannot be guarded; a transformed tensor has none
        if training or (weight.requires_grad and torch.is_grad_enabled()):
            self.drop()
            return None
        if weight.dtype not in _dispatch.KERNEL_DTYPES:
            return None
        return self._copy_of((weight,), "linear_pack")

    def _copy_of(self, sources: tuple[Tensor, ...], packer: str, *options: object) -> Tensor | None:
        """The copy that the raw operator `packer` makes of `sources` by `options`; None where no kernel reads one."""
        if _extension._C is None or sources[0].device.type != "cpu":
            return None
        if _dispatch.backend_in_force() not in (None, "cpu"):
            return None
        states = [state_of(t) for t in sources]
        if None in states:
            warn_of_uncounted("a weight", "kept packed; every call reads it as it lies, which is slower")
            self.drop()
            return None
        key = (_extension._C.isa(), *options, *states)
        if self._packed is None or key != self._key:
            pack: Callable[..., Tensor] = getattr(torch.ops.fastnn, packer).default
            self._source = tuple(t.detach() for t in sources)
            self._packed, self._key = pack(*self._source, *options, True), key
        return self._packed

    def drop(self) -> None:
        """Forgets the packed copy and frees its memory."""
        self._packed, self._key, self._source = None, (), ()

    @property
    def nbytes(self) -> int:
        """Bytes the packed copy holds at present."""
        return 0 if self._packed is None else self._packed.numel() * self._packed.element_size()

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return type(self)()

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return type(self), ()


class PackedCodes(PackedWeight):
    """The same of int8 codes, which no optimizer writes to: it is used while the layer's model trains, too."""

    def get_codes(self, codes: Tensor, scale: Tensor) -> Tensor | None:
        """The packed copy of a weight codes * scale[:, None], or None where no kernel reads one."""
        if torch.compiler.is_compiling() or _dispatch.transformed():
            return None
        return self._copy_of((codes, scale), "linear_int8_pack")

    def get_blocks(self, codes: Tensor, starts: Tensor, scale: Tensor) -> Tensor | None:
        """What the kernel needs beside blocks of codes, which it reads in place; None where no kernel reads it."""
        if torch.compiler.is_compiling() or _dispatch.transformed():
            return None
        return self._copy_of((codes, starts, scale), "linear_block_sparse_int8_pack")

    def get_groups(
        self, codes: Tensor, scale: Tensor, offset: Tensor | None, in_features: int, group_size: int
    ) -> Tensor | None:
        """The packed copy of a weight of codes in groups, or None where no kernel reads one."""
        if torch.compiler.is_compiling() or _dispatch.transformed():
            return None
        bits = 4 if codes.dtype == torch.uint8 else 8
        if offset is None:
            return self._copy_of((codes, scale), "linear_groupwise_pack", None, in_features, group_size, bits)
        return self._copy_of((codes, scale, offset), "linear_groupwise_pack", in_features, group_size, bits)
