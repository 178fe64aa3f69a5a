"""Models in one file: `save` and `load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from .. import nn
from ..accelerate.isolate import check_model
from ..ops.linear import ACTIVATIONS
from .container import FormatError, read, write
from .int8 import float_weight, is_conv1d
from .quantize import become

FORMAT = 1
"""Of what is kept beside the tensors. A later version reads earlier ones."""


def save(model: Module, path: str | os.PathLike[str]) -> None:
    """Writes the model's `state_dict` and which of its layers are quantised to one safetensors file.

    Plain tensors with a checksum each, shared ones once; the file is replaced as a whole, after it is on the disk.

    Args:
        model: any module whose `state_dict` holds dense tensors alone.
        path: the file; its folder exists.

    Raises:
        TypeError: `model` is no module, or its `state_dict` holds something that is no dense tensor.
        OSError: the file cannot be written.
    """
    check_model("save", model)
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, t in model.state_dict().items():
        if not isinstance(t, Tensor):
            raise TypeError(f"fastnn.save: the state_dict's {name!r} is no tensor but {type(t).__name__}")
        key = (t.data_ptr(), t.dtype, t.shape, t.stride(), t.device)
        if t.numel() and key in first:
            shared[name] = first[key]
        else:
            stored[name] = t
            first[key] = name
    layers = {name: {"activation": m.activation} for name, m in model.named_modules() if isinstance(m, nn.Int8Linear)}
    write(Path(path), stored, {"version": FORMAT, "shared": shared, "int8": layers})


def load(path: str | os.PathLike[str], model: Module | None = None) -> Any:
    """Reads what `save` wrote.

    Args:
        path: the file.
        model: gets the values, with `strict=True`, in place: layers that were quantised when it was saved are
            quantised in it, too. Nothing is changed before the whole file has been checked.

    Returns:
        `model`; without one, the `state_dict`.

    Raises:
        FormatError: (a ValueError) the file is truncated, altered, or not of `save`.
        RuntimeError: its tensors do not fit the model.
        OSError: it cannot be read.
    """
    path = Path(path)
    tensors, kept = read(path)
    if kept.get("version") != FORMAT:
        raise FormatError(f"{path}: version {kept.get('version')!r}, this fastnn reads {FORMAT}")
    shared: Any = kept.get("shared")
    layers: Any = kept.get("int8")
    known = isinstance(shared, dict) and all(isinstance(name, str) and name in tensors for name in shared.values())
    if not known or not isinstance(layers, dict):
        raise FormatError(f"{path}: its metadata are not those of fastnn.save")
    state = {**tensors, **{name: tensors[source] for name, source in shared.items()}}
    if model is None:
        return state
    check_model("load", model)
    chosen = _fitting(path, model, state, layers)
    codes: dict[str, Tensor] = {}
    for name, (module, made) in chosen.items():
        weight: Any = module.weight
        for buffer in ("weight", "weight_scale"):
            key = f"{name}.{buffer}" if name else buffer
            like = torch.empty_like(state[key], device=weight.device)
            made._buffers[buffer] = codes.setdefault(shared.get(key, key), like)
        become(module, made)
    model.load_state_dict(state, strict=True)
    return model


def _fitting(
    path: Path, model: Module, state: Mapping[str, Tensor], layers: Mapping[str, Any]
) -> dict[str, tuple[Module, Module]]:
    """Path -> (layer, the int8 layer that it is to become, without its memory yet), of layers that are floating yet.

    Raises RuntimeError where the file's tensors do not fit, before anything is changed.
    """
    modules = dict(model.named_modules())
    found: dict[str, tuple[Module, Module]] = {}
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    problems = []
    for name, options in layers.items():
        module, prefix = modules.get(name), f"{name}." if name else ""
        made = _empty_layer(path, options, state.get(f"{prefix}weight"), state.get(f"{prefix}weight_scale"))
        if isinstance(module, nn.Int8Linear):
            continue
        dense = isinstance(module, torch.nn.Linear) or (module is not None and is_conv1d(module))
        if module is None or not dense or "weight" not in module._parameters:
            problems.append(f"{name or 'the model'} is no dense layer, but the file has int8 codes for it")
            continue
        made.bias = module._parameters["bias"]
        found[name] = (module, made.train(module.training))
        shape = float_weight(module).shape
        wanted[f"{prefix}weight"], wanted[f"{prefix}weight_scale"] = shape, shape[:1]
    problems += [f"the file lacks {name}" for name in wanted.keys() - state.keys()]
    problems += [f"the model lacks {name}" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(wanted[name])} in the model"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise RuntimeError(f"fastnn.load: the file does not fit the model: {'; '.join(sorted(problems)[:3])}{more}")
    return found


def _empty_layer(path: Path, options: Any, codes: Tensor | None, scale: Tensor | None) -> nn.Int8Linear:
    """A layer for these codes on the meta device: what the file says of sizes costs no memory."""
    activation: Any = options.get("activation") if isinstance(options, dict) else ()
    if codes is None or scale is None or codes.dtype != torch.int8 or scale.dtype != torch.float32:
        raise FormatError(f"{path}: its int8 layers lack codes or scales")
    if codes.dim() != 2 or not (activation is None or (isinstance(activation, str) and activation in ACTIVATIONS)):
        raise FormatError(f"{path}: its int8 layers are of a kind that this fastnn does not know")
    layer = nn.Int8Linear(codes.shape[1], codes.shape[0], False, "meta")
    layer.activation = cast(Any, activation)
    return layer
