"""Running a model on samples, one block at a time, and deciding on its layers by what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..accelerate.isolate import isolated, plain_inputs
from ..nn import QuantizedLinear
from ..nn.linear_groupwise import GroupwiseLinear
from ..progress import Step, progress
from . import smooth
from .chain import Chain, carried, lists_of_blocks, run
from .checkpoint import Folder, digest
from .encoder import mind_fast_path
from .fold import Change, agree
from .gptq import Gptq, gptq
from .linear import float_weight
from .observe import Watch
from .smooth import SmoothQuant


@dataclass(frozen=True)
class Calibration:
    """Samples that `quantize_` runs the model on, and how.

    The list of blocks that holds most of the model is run one block at a time: what a block gives with its layers
    quantised is kept for each sample, and goes into the next one. So statistics are those of one block, later blocks
    make up for what earlier ones lost, and no other block's weights are touched meanwhile. Where the model has no such
    list, or its blocks do not simply follow each other, all layers are seen in one run, and the report says why.
    """

    inputs: Iterable[Any]
    """Each a tensor, a tuple of positional or a mapping of keyword arguments; at least one. They are kept."""
    blocks: str | None = None
    """Path of the list of blocks; looked for where it is None, and every layer at once where it is empty."""
    folder: str | PathLike[str] | None = None
    """Keeps what was decided of each finished block: the same call goes on after a stop, with the same result."""
    progress: bool = False
    """Whether a bar is shown (needs rich)."""


@dataclass
class Target:
    """A layer to decide on."""

    name: str
    module: Module
    method: Gptq | SmoothQuant
    make: Callable[[Module], Module]
    """The layer as it is now, rounded to nearest."""
    made: QuantizedLinear
    """What it is to become; rounded to nearest at first."""
    remark: str = ""
    error: float | None = None
    """Of its outputs on the calibration, relative, where it was measured."""
    nearest: float | None = None
    """The same of rounding to nearest."""


@dataclass
class _Part:
    """Layers that are seen in the same runs."""

    name: str
    root: Module
    targets: list[Target]
    run: Callable[[int], Any]
    """The part's output for a sample."""


@dataclass
class Outcome:
    """What calibration came to, beside its targets."""

    text: str
    """How it ran, in words."""
    changes: list[Change] = field(default_factory=list)


def calibrate(
    model: Module, targets: Sequence[Target], ready: Mapping[Module, Module], calibration: Calibration, config: str
) -> Outcome:
    """Decides on the targets; the model stays as it was.

    Args:
        model: is run in evaluation mode, without gradients.
        targets: what is found is written to them.
        ready: layers that are decided on already, and what they become: the others see inputs with these in place.
        calibration: samples and options.
        config: what a folder's files are checked against, beside the samples and the weights.
    """
    samples = [plain_inputs(sample) for sample in calibration.inputs]
    if not samples:
        raise ValueError("fastnn.quantize_: calibration has no inputs")
    with isolated(model), torch.inference_mode(False), torch.no_grad(), progress(calibration.progress) as bar:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                vars(module)["training"] = False
        _swap(model, ready)
        return _Walk(model, list(targets), samples, calibration, config).go(bar)


class _Walk:
    """One calibration, inside `isolated`."""

    def __init__(
        self, model: Module, targets: list[Target], samples: list[Any], calibration: Calibration, config: str
    ) -> None:
        self.model, self.targets, self.samples, self.calibration = model, targets, samples, calibration
        self.names = {module: name for name, module in model.named_modules()}
        self.outcome = Outcome("")
        self.config = config
        self.folder: Folder | None = None

    def go(self, bar: Callable[[int], Step]) -> Outcome:
        """Every part in turn."""
        chain, path = self._chain()
        count = len(self.samples)
        if self.calibration.folder is not None:
            start = digest(self.config, [t.name for t in self.targets], self.samples, chain.states if chain else [])
            self.folder = Folder(Path(self.calibration.folder), start)
        blocks = [] if chain is None else list(chain.blocks)
        inner = {module for block in blocks for module in block.modules()}
        rest = [target for target in self.targets if target.module not in inner]
        step = bar(count * (2 * len(blocks) + bool(rest)))
        outputs: list[Any] = []
        for i, block in enumerate(blocks):
            if chain is not None:  # as where there are blocks
                outputs = self._block(chain, i, block, f"{path}.{i}", step)

        def whole(sample: int) -> Any:
            if chain is None:
                return run(self.model, self.samples[sample])
            with chain.replaced(outputs[sample]):
                return run(self.model, self.samples[sample])

        if rest:
            self._decide(len(blocks), _Part("the rest" if blocks else "the model", self.model, rest, whole), step)
        return self.outcome

    def _chain(self) -> tuple[Chain | None, str]:
        """The blocks and their path, with the first one's inputs; says in the outcome how the model is run."""
        wanted, count = self.calibration.blocks, f"{len(self.samples)} samples"
        modules = [target.module for target in self.targets]
        reason = "" if wanted == "" else "it has no list of blocks with most of the layers"
        for path, blocks in lists_of_blocks(self.model, modules):
            inside = {module for block in blocks for module in block.modules()}
            most = 2 * len(inside & set(modules)) >= len(modules)
            if wanted == "" or not (most if wanted is None else path == wanted):
                continue
            chain, reason = Chain(blocks), ""
            for sample in self.samples:
                reason = reason or chain.record(self.model, sample)
            if not reason:
                self.outcome.text = f"calibrated on {count}, block by block along {path or 'the model'} ({len(blocks)})"
                return chain, path or "block"
            reason = f"{path or 'the model'}: {reason}"
        if wanted:
            raise ValueError(f"fastnn.quantize_: calibration cannot go along blocks = {wanted!r}: {reason}")
        self.outcome.text = f"calibrated on {count}, all layers at once" + (f" ({reason})" if reason else "")
        return None, ""

    def _block(self, chain: Chain, index: int, block: Module, name: str, step: Step) -> list[Any]:
        """Decides on a block's layers; its outputs, with these in place, which are the next one's inputs."""
        inside = set(block.modules())
        targets = [target for target in self.targets if target.module in inside]

        def one(sample: int) -> Any:
            return chain.arguments[sample][index].run(block, chain.states[sample])

        self._decide(index, _Part(name, block, targets, one), step)
        made: dict[Module, Module] = {target.module: target.made for target in targets}
        _swap(self.model, made)
        chain.blocks[index] = block = made.get(block, block)
        outputs = []
        for sample in range(len(self.samples)):
            outputs.append(one(sample))
            step(name)
        chain.states = [carried(output) for output in outputs]
        return outputs

    def _decide(self, index: int, part: _Part, step: Step) -> None:
        stored = None
        if self.folder is not None:
            self.folder.enter(index, part.root)
            stored = self.folder.load()
        if stored is not None:
            self._restore(part, *stored)
        elif part.targets:
            self._look(part, step)
            return
        for _ in self.samples:
            step(part.name)

    def _look(self, part: _Part, step: Step) -> None:
        """Runs the part on every sample, and decides."""
        watch = Watch([t.module for t in part.targets], {t.module for t in part.targets if isinstance(t.method, Gptq)})
        for sample in range(len(self.samples)):
            with watch.on(part.root):
                part.run(sample)
            step(part.name)
        for target in part.targets:
            if isinstance(target.method, Gptq):
                _round(target, target.method, watch)
        changes = self._smooth(part, watch)
        self.outcome.changes += changes
        if self.folder is not None:
            self._store(part, changes)

    def _smooth(self, part: _Part, watch: Watch) -> list[Change]:
        targets = {t.module: t for t in part.targets if isinstance(t.method, SmoothQuant)}
        found, reasons = smooth.groups(list(targets), watch.seen)
        changes = []
        for norm, layers in found.items():
            methods, name = {targets[layer].method for layer in layers}, self.names[norm]
            (method,) = methods if len(methods) == 1 else (None,)
            inputs = [watch.seen[layer].largest for layer in layers]
            if not isinstance(method, SmoothQuant) or inputs[0] is None:
                reasons.update(dict.fromkeys(layers, f"other layers after {name} are to be smoothed otherwise"))
                continue
            scale = smooth.scales(inputs[0], [float_weight(layer) for layer in layers], method.alpha)
            change, before = Change(norm, layers, scale), part.run(0)
            change.apply()
            if agree(before, part.run(0)):
                changes.append(change)
                for layer in layers:
                    self._smoothed(targets[layer], name)
            else:
                change.undo()
                reasons.update(dict.fromkeys(layers, f"what {name} gives is used elsewhere, too"))
        for layer, reason in reasons.items():
            targets[layer].remark = f"not smoothed: {reason}"
        return changes

    def _smoothed(self, target: Target, norm: str) -> None:
        made = target.make(target.module)
        if isinstance(made, QuantizedLinear):
            target.made, target.remark = made, f"smoothed with {norm}"

    def _store(self, part: _Part, changes: list[Change]) -> None:
        if self.folder is None:
            return
        tensors = {f"{t.name}.{name}": held for t in part.targets for name, held in _codes(t.made).items()}
        tensors.update({f"{self.names[change.norm]}.smooth": change.scale for change in changes})
        kept = {t.name: {"remark": t.remark, "error": t.error, "nearest": t.nearest} for t in part.targets}
        folds = {self.names[change.norm]: [self.names[layer] for layer in change.layers] for change in changes}
        self.folder.store(tensors, {"layers": kept, "smooth": folds})

    def _restore(self, part: _Part, tensors: dict[str, Tensor], kept: dict[str, Any]) -> None:
        """What `_store` wrote, in the targets and in the model."""
        modules = {name: module for module, name in self.names.items()}
        for target in part.targets:
            for name in _codes(target.made):
                setattr(target.made, name, tensors[f"{target.name}.{name}"])
            for name, value in kept["layers"][target.name].items():
                setattr(target, name, value)
        for norm, layers in kept["smooth"].items():
            change = Change(modules[norm], [modules[name] for name in layers], tensors[f"{norm}.smooth"])
            change.apply()
            self.outcome.changes.append(change)


def _codes(made: Module) -> dict[str, Tensor]:
    return {name: held for name, held in made.named_buffers(recurse=False)}


def _round(target: Target, method: Gptq, watch: Watch) -> None:
    seen, made = watch.seen[target.module], target.made
    if seen.gram is None or seen.problem or not isinstance(made, GroupwiseLinear):
        target.remark = f"rounded to nearest: {seen.problem}"
        return
    bits = 8 if made.code_dtype == torch.int8 else 4
    found = gptq(float_weight(target.module), seen.gram, made.group_size, bits, made.symmetric, method)
    made.weight, made.weight_scale, made.weight_offset = found.parts
    target.error, target.nearest, target.remark = found.error, found.nearest, found.remark


def _swap(root: Module, instead: Mapping[Module, Module]) -> None:
    """Puts other modules in place of some; `isolated` takes it back."""
    for module in root.modules():
        for name, child in module._modules.items():
            if child is not None and child in instead:
                module._modules[name] = instead[child]
    mind_fast_path(root)
