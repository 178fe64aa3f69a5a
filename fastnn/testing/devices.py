"""Inputs on another device, in the memory layout they were made in.

`Tensor.to` would make most of them dense: the gaps, offsets and strides of 0 that a case is about would be gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
"""Where cases can run."""


def on_device(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """The tensors on `device`: whole storages are copied, what shared one shares one again."""
    if all(t.device.type == device for t in tensors.values()):
        return dict(tensors)
    return copied(tensors, device)


def copied(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """As `on_device`, with copies also of what is there already."""
    storages: dict[int, Tensor] = {}
    found = {}
    for name, t in tensors.items():
        key = t.untyped_storage()._cdata
        if key not in storages:
            storages[key] = memory(t).to(device, copy=True)
        bytes_there = storages[key].untyped_storage()
        view = torch.empty(0, dtype=t.dtype, device=storages[key].device)
        found[name] = view.set_(bytes_there, t.storage_offset(), t.size(), t.stride())
    return found


def memory(t: Tensor) -> Tensor:
    """All the memory behind `t`, as bytes: the gaps between its elements included."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


@contextmanager
def torchs_sound_kernels(device: str) -> Iterator[None]:
    """On a GPU, torch's attention without its cuDNN and memory-efficient kernels.

    Those read masks and rows that are not aligned to 16 bytes as if they were (seen with torch 2.11): 'misaligned
    address', after which nothing runs in the process.
    """
    if device != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield


def synchronize(device: str) -> None:
    """Waits for what runs on `device`, so that an error of a kernel shows here and not in a later call."""
    if device == "cuda":
        torch.cuda.synchronize()
