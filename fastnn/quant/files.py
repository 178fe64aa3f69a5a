"""Models in one file: `save` and `load`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import nn
from ..accelerate.isolate import check_model
from ..ops.block_sparse import values_empty
from ..sparse.convert import become as become_sparse
from .container import FormatError, read, write
from .encoder import mind_fast_path
from .linear import float_weight, is_conv1d
from .quantize import become

FORMAT = 2
"""Of what is kept beside the tensors. A later version reads earlier ones."""


def save(model: Module, path: str | os.PathLike[str], *, shapes: Mapping[str, Any] | None = None) -> None:
    """Writes the model's `state_dict` and which of its layers are quantised or block-sparse to one safetensors file.

    Plain tensors with a checksum each, shared ones once; the file is replaced as a whole, after it is on the disk.

    Args:
        model: any module whose `state_dict` holds dense tensors alone.
        path: the file; its folder exists.
        shapes: of a model that was shrunk (the reports' `shapes`): `load` gives them to a model of the original sizes.

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
    layers = {
        name: {"kind": type(m).__name__, "in_features": m.in_features, **m.options()}
        for name, m in model.named_modules()
        if isinstance(m, nn.QuantizedModule | nn.BlockSparseLinear)
    }
    sizes = {"shapes": dict(shapes)} if shapes else {}
    write(Path(path), stored, {"version": FORMAT, "shared": shared, "layers": layers, **sizes})


def load(path: str | os.PathLike[str], model: Module | None = None) -> Any:
    """Reads what `save` wrote.

    Args:
        path: the file.
        model: gets the values, with `strict=True`, in place: layers that were quantised or block-sparse when it was
            saved are so in it, too. Nothing is changed before the whole file has been checked.

    Returns:
        `model`; without one, the `state_dict`.

    Raises:
        FormatError: (a ValueError) the file is truncated, altered, or not of `save`.
        RuntimeError: its tensors do not fit the model.
        OSError: it cannot be read.
    """
    path = Path(path)
    tensors, kept = read(path)
    if kept.get("version") not in (1, FORMAT):
        raise FormatError(f"{path}: version {kept.get('version')!r}, this fastnn reads 1 and {FORMAT}")
    shared: Any = kept.get("shared")
    layers: Any = kept.get("int8" if kept["version"] == 1 else "layers")  # version 1 had one kind
    known = isinstance(shared, dict) and all(isinstance(name, str) and name in tensors for name in shared.values())
    if not known or not isinstance(layers, dict):
        raise FormatError(f"{path}: its metadata are not those of fastnn.save")
    state = {**tensors, **{name: tensors[source] for name, source in shared.items()}}
    if model is None:
        return state
    check_model("load", model)
    with _resized(path, model, kept.get("shapes")):
        chosen = _fitting(path, model, state, layers)
    codes: dict[str, Tensor] = {}
    for name, (module, made) in chosen.items():
        weight: Any = module.weight
        for own in _held(made):
            key = f"{name}.{own}" if name else own
            source = shared.get(key, key)
            if source not in codes:
                codes[source] = _memory(own, state[key], weight)
            setattr(made, own, codes[source])
        if isinstance(made, nn.BlockSparseLinear):
            become_sparse(module, made)
        else:
            become(module, made)
    mind_fast_path(model)
    model.load_state_dict(state, strict=True)
    return model


@contextmanager
def _resized(path: Path, model: Module, shapes: Any) -> Iterator[None]:
    """Gives the model the file's sizes; the old ones again where what is done meanwhile fails."""
    if shapes is None:
        yield
        return
    from ..prune.shrink import resized  # what few files need, and takes its time to import

    try:
        changes = resized(model, {part: dict(shapes[part]) for part in ("tensors", "attributes")})
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise RuntimeError(f"fastnn.load: the sizes in {path} do not fit the model: {error}") from None
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            changes.undo()


Made = nn.QuantizedModule | nn.BlockSparseLinear


def _held(made: Made) -> list[str]:
    """What a file has of it, apart from the bias."""
    return [name for name in _TENSORS if getattr(made, name, None) is not None]


def _memory(own: str, stored: Tensor, weight: Tensor) -> Tensor:
    """For one of a layer's tensors, on the device of the weight that it had."""
    if own == "values":
        values = values_empty(tuple(stored.shape), weight.dtype, weight.device)
        return torch.nn.Parameter(values, weight.requires_grad)
    if own == "weight" and stored.dim() == 4:  # blocks of codes, which are read in place, too
        return values_empty(tuple(stored.shape), stored.dtype, weight.device)
    return torch.empty_like(stored, device=weight.device)


def _fitting(
    path: Path, model: Module, state: Mapping[str, Tensor], layers: Mapping[str, Any]
) -> dict[str, tuple[Module, Made]]:
    """Path -> (layer, the one that it is to become, without its memory yet), of layers that are dense and floating yet.

    Raises RuntimeError where the file's tensors do not fit, before anything is changed.
    """
    modules = dict(model.named_modules())
    found: dict[str, tuple[Module, Made]] = {}
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    problems = []
    for name, options in layers.items():
        module, prefix = modules.get(name), f"{name}." if name else ""
        made = _empty_layer(path, options, state, prefix)
        if _same_kind(module, made):
            continue
        embeds = isinstance(made, nn.GroupwiseEmbedding)
        dense = isinstance(module, torch.nn.Linear) or (module is not None and is_conv1d(module))
        fits = isinstance(module, torch.nn.Embedding) if embeds else dense
        if module is None or not fits or "weight" not in module._parameters:
            kind = "embedding" if embeds else "dense layer"
            what = "blocks" if isinstance(made, nn.BlockSparseLinear) else "codes"
            problems.append(f"{name or 'the model'} is no {kind}, but the file has {what} for it")
            continue
        if isinstance(made, nn.GroupwiseEmbedding):
            made.dtype = float_weight(module).dtype
        else:
            made._parameters["bias"] = module._parameters["bias"]
        found[name] = (module, made.train(module.training))
        if float_weight(module).shape != (made.out_features, made.in_features):
            there, here = (made.out_features, made.in_features), tuple(float_weight(module).shape)
            problems.append(f"{prefix}weight is {there} in the file, {here} in the model")
        wanted.pop(f"{prefix}weight", None)
        wanted.update({f"{prefix}{key}": getattr(made, key).shape for key in _held(made)})
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


_KINDS: dict[str, type[Made]] = {
    kind.__name__: kind
    for kind in (
        nn.BlockSparseLinear,
        nn.Int8BlockSparseLinear,
        nn.Int4Embedding,
        nn.Int4Linear,
        nn.Int8Embedding,
        nn.Int8Linear,
        nn.Int8WeightOnlyLinear,
    )
}


def _same_kind(module: Module | None, made: Made) -> bool:
    if type(module) is not type(made) or not isinstance(module, nn.QuantizedModule | nn.BlockSparseLinear):
        return False
    return module.in_features == made.in_features and module.options() == made.options()


def _empty_layer(path: Path, options: Any, state: Mapping[str, Tensor], prefix: str) -> Made:
    """A layer for these tensors, without memory of its own: what the file says of sizes costs none."""
    held = {name: state[f"{prefix}{name}"] for name in _TENSORS if f"{prefix}{name}" in state}
    try:
        return _KINDS[options.get("kind", "Int8Linear")].stored(options, held)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(
            f"{path}: its quantised layers, or those on blocks, lack tensors or are of a kind unknown ({error})"
        ) from None


_TENSORS = ("weight", "weight_scale", "weight_offset", "values", "columns", "starts")
"""Of layers on codes, and of those on blocks."""
