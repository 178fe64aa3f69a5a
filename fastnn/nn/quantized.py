"""What layers on codes have in common: buffers that stay codes, a packed copy of their own, a form in files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from ..ops.linear import ACTIVATIONS, Activation
from ..ops.packing import PackedCodes


def _counted(tensor: Tensor) -> Tensor:
    """The tensor or, of one that counts no changes, a copy that does."""
    if not tensor.is_inference() or isinstance(tensor, torch.nn.Parameter):
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class QuantizedModule(Module):
    """A layer whose `weight` is a buffer of codes, its scales beside it.

    Codes and scales keep their types under `.half()`, `.to(dtype)` and the like. The copy in the order that the kernel
    reads belongs to the layer: it is in no state_dict, pickle or deepcopy, and follows the buffers. Buffers are no
    inference tensors, not even those of a layer made in `torch.inference_mode`: torch counts no changes of these.
    """

    code_dtype: ClassVar[torch.dtype]
    """Of `weight`."""
    op: ClassVar[str]
    """The op that runs the layer, as `fastnn._dispatch` knows it."""
    scale_buffers: ClassVar[tuple[str, ...]] = ("weight_scale",)
    """The floating buffers, whose types stay."""

    weight: Tensor
    weight_scale: Tensor
    in_features: int
    out_features: int

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As torch's."""
        super().register_buffer(name, None if tensor is None else _counted(tensor), persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _counted(value) if isinstance(value, Tensor) else value)

    @abstractmethod
    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What a file keeps beside the buffers, as JSON has it."""

    @classmethod
    @abstractmethod
    def stored(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantizedModule:
        """The layer that `options` and the tensors of a file describe, with buffers on the meta device, without bias.

        Raises:
            ValueError, TypeError, KeyError: they describe none.
        """

    def shares_codes_with(self, other: object) -> bool:
        """Whether the codes of one weight are the same in both: as a table and as a dense layer, for example."""
        if not isinstance(other, QuantizedModule) or self.code_dtype != other.code_dtype or self.op != other.op:
            return False
        mine, theirs = self.options(), other.options()
        return all(mine.get(name) == theirs.get(name) for name in ("group_size", "symmetric"))

    @property
    def code_bytes(self) -> int:
        """Of codes, scales and offsets."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values() if b is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        kept = {name: self._buffers.get(name) for name in self.scale_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers.get(name)
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        if "packed" in vars(self):
            vars(self)["packed"].drop()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        extra: Any,
        errors: Any,
    ) -> None:
        """As torch's, which would cut a floating weight down to whole numbers without a word."""
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.dtype != self.code_dtype:
            kind = str(self.code_dtype).removeprefix("torch.")
            errors.append(f"{prefix}weight must be {kind} codes, got {weight.dtype}: quantise after loading")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, extra, errors)


class QuantizedLinear(QuantizedModule):
    """A dense layer on codes; `bias` is a parameter or None."""

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        activation: Activation | None,
    ) -> None:
        if activation not in ACTIVATIONS:
            known = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"fastnn.nn.{type(self).__name__}: activation must be one of {known}; got {activation!r}")
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        zeros = torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)
        self.packed = PackedCodes()

    @abstractmethod
    def run(self, input: Tensor, activation: str | None) -> Tensor:
        """`activation(input @ weight.T + bias)`, whatever the layer's own activation is."""

    def forward(self, input: Tensor) -> Tensor:
        """`activation(input @ weight.T + bias)`; input (*, in_features), result (*, out_features)."""
        return self.run(input, self.activation)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text + "".join(f", {name}={value!r}" for name, value in self.options().items() if value is not None)
