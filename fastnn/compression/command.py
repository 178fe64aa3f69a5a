"""`python -m fastnn compress MODEL --int8|--int4|--budget DROP --out FILE [--onnx FILE]`: a smaller model in a file.

MODEL is a folder as Hugging Face's `save_pretrained` writes it, the name of a model that its cache has, or a GGUF
file. The report says of every layer what became of it, and the file is loaded into a fresh model, whose weights and
results must be the same bits; an ONNX file is run by onnxruntime and compared. `--budget` searches (`within.py`).
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..cli import MissingExtra
from ..quant import Int4WeightOnly, Int8Dynamic, load, load_gguf, quantize_, save
from ..to_onnx import check_installed, export
from . import within
from .within import first

_RUNS = 5
"""Of the model before and after, in turns."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _slowdown(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, the name of a cached model, or a GGUF")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--int8", action="store_true", help="dense layers to Int8Dynamic")
    kind.add_argument("--int4", action="store_true", help="dense layers and embeddings to Int4WeightOnly")
    within.add_arguments(parser, kind)
    parser.add_argument("--group-size", type=_positive, default=64, help="of --int4 (default 64)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="an ONNX file to write, too")
    parser.add_argument("--tokens", type=_positive, default=128, help="of the input that is timed (default 128)")
    parser.add_argument(
        "--max-slowdown",
        type=_slowdown,
        default=math.inf,
        metavar="TIMES",
        help="leave a layer alone that would take so many times as long (default: size comes first)",
    )


def run(arguments: argparse.Namespace) -> int:
    """The command: 0 where the files give the model back; 1 where one does not; 2 where it could not begin."""
    missing = [name for name in ("rich", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"needs {', '.join(missing)}; install with:  pip install 'fastnn[demo]'")
    if arguments.onnx is not None:
        check_installed()
    problem = _why_not(arguments)
    if not problem:
        try:
            return _compress(arguments)
        except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
            problem = str(error)
    sys.stderr.write(f"fastnn compress: {problem}\n")
    return 2


def _why_not(arguments: argparse.Namespace) -> str:
    is_gguf, searches = _is_gguf(arguments.model), arguments.budget is not None
    if is_gguf and (arguments.int8 or arguments.int4 or searches):
        return "a GGUF file's own codes are kept: leave out --int8, --int4 and --budget"
    if not is_gguf and not (arguments.int8 or arguments.int4 or searches):
        return "--int8, --int4 or --budget must be given"
    if problem := within.why_not(arguments):
        return problem
    for path in (arguments.out, arguments.onnx):
        if path is not None and not path.parent.is_dir():
            return f"there is no folder {path.parent}"
    return ""


def _is_gguf(name: str) -> bool:
    path = Path(name)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _read(name: str) -> Any:
    """The model, in eval mode."""
    if _is_gguf(name):
        return load_gguf(name)
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return kind.from_pretrained(name, config=config, local_files_only=True).eval()


def _example(model: Any, tokens: int) -> dict[str, Tensor] | None:
    """Token ids for a model that takes them; None for another."""
    words, most = (getattr(model.config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    if getattr(model, "main_input_name", "") != "input_ids" or not isinstance(words, int):
        return None
    length = tokens if not isinstance(most, int) else min(tokens, most)
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, words, (1, length), generator=generator)}


def _milliseconds(models: list[Any], example: dict[str, Tensor]) -> list[float]:
    """Median of each, run in turns."""
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model(**example)
    for _ in range(_RUNS):
        for model, found in zip(models, times, strict=True):
            start = time.perf_counter()
            model(**example)
            found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


def _bytes_of(model: Module) -> int:
    """Of its tensors, shared ones once."""
    each = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(each.values())


def _compress(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    model = _read(arguments.model)
    example = _example(model, arguments.tokens)
    if example is None and arguments.onnx is not None:
        raise ValueError("--onnx is for models that take token ids")
    if arguments.budget is not None:
        return within.run(arguments, console, model, example)
    plain = None
    before = _bytes_of(model)
    if arguments.int8 or arguments.int4:
        plain = copy.deepcopy(model)
        config = Int8Dynamic() if arguments.int8 else Int4WeightOnly(arguments.group_size)
        slowest = arguments.max_slowdown
        console.print(quantize_(model, config, example_inputs=example, max_slowdown=slowest))
    save(model, arguments.out)
    problem = _differs(model, arguments.out, example)
    after = arguments.out.stat().st_size
    console.print(f"{before / 2**20:.1f} MiB became {after / 2**20:.1f} MiB ({after / before:.0%}): {arguments.out}")
    if example is None:
        console.print("Nothing was timed: the model does not take token ids alone.")
    elif plain is not None:
        with torch.no_grad():
            was, now = _milliseconds([plain, model], example)
        shape = "x".join(map(str, example["input_ids"].shape))
        console.print(f"The whole model on {shape} tokens: {was:.1f} ms before, {now:.1f} ms after, {was / now:.2f}x")
    if problem:
        sys.stderr.write(f"fastnn compress: the file was read back, and {problem}\n")
        return 1
    console.print("Read back into a fresh model: the same bits.")
    if example is not None and arguments.onnx is not None:
        try:
            console.print(_onnx(model, arguments.onnx, example["input_ids"]))
        except RuntimeError as error:
            sys.stderr.write(f"fastnn compress: no ONNX file was written: {error}\n")
            return 1
    return 0


def _differs(model: Any, path: Path, example: dict[str, Tensor] | None) -> str:
    """What a fresh model has otherwise after `load`, in words; empty where nothing."""
    fresh = load(path, type(model)(model.config).to(_dtype(model)).eval())
    state, other = model.state_dict(), fresh.state_dict()
    wrong = [name for name, t in state.items() if name not in other or not torch.equal(t, other[name])]
    if wrong or len(state) != len(other):
        return f"{', '.join(wrong[:3]) or 'a tensor'} came back otherwise"
    if example is None:
        return ""
    with torch.no_grad():
        same = torch.equal(first(model(**example)), first(fresh(**example)))
    return "" if same else "the model computes something else"


def _onnx(model: Any, path: Path, ids: Tensor) -> str:
    """Writes the ONNX file, for token ids (batch, tokens) and their mask, any of both; what came of it, in words.

    `fastnn.export` compares it with the model on two rows, half of the second one masked.
    """
    example = {"input_ids": torch.cat((ids, ids.flip(1)))}
    example["attention_mask"] = torch.ones_like(example["input_ids"])
    example["attention_mask"][1, ids.shape[1] // 2 + 1 :] = 0
    model.config.use_cache = False  # keys and values would be results, too
    shapes = {name: {0: "batch", 1: "tokens"} for name in example}
    found = export(model, path, example, dynamic_shapes=shapes)
    kinds = {"int8": found.int8, "on codes in groups": found.grouped, "left with floating weights": found.floating}
    layers = ", ".join(f"{len(names)} layers {kind}" for kind, names in kinds.items() if names)
    return (
        f"ONNX, run by onnxruntime: {found.nbytes / 2**20:.1f} MiB, {layers}, off by {found.error:.1e} of the largest "
        f"result: {path}"
    )


def _dtype(model: Module) -> torch.dtype:
    return next(t.dtype for t in model.parameters() if t.is_floating_point())
