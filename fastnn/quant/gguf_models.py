"""Models out of GGUF files: tensors by name into any model, and Llama-shaped models whole.

llama.cpp's converter names a Llama's tensors its own way and turns the rows of queries and keys, since its rotation
takes neighbours for the pairs that transformers' takes from the halves of a head. Turning them back moves whole rows,
each with its groups, so every code and scale stays the file's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import nn
from ..accelerate.isolate import check_model
from .container import FormatError
from .gguf import Gguf
from .linear import is_conv1d
from .quantize import become

WHERE = "fastnn.load_gguf"

_FLOATING = ("F32", "F16", "BF16")


def load_gguf(
    path: str | os.PathLike[str],
    model: Module | None = None,
    names: Mapping[str, str] | None = None,
    *,
    int8_input: bool = False,
) -> Any:
    """Gives a model the tensors of a GGUF file, in place; or makes the Llama-shaped model that the file describes.

    Layers whose tensor holds codes become `Int4Linear`, `Int8WeightOnlyLinear` or their embeddings, as
    `fastnn.quantize_` would make them, with the file's own codes and scales; one tensor for several layers is shared by
    them. Floating tensors are copied, or become the parameter where the model's is on the meta device. Nothing is
    changed before all have been read and fit.

    Args:
        path: the file.
        model: any module; None for a new `transformers.LlamaForCausalLM` in float32, in eval mode, whose sizes, head
            (tied where the file has none) and token ids are the file's. That needs transformers.
        names: path of a parameter in the model ("layers.0.mlp.weight") -> the tensor's name in the file. None makes a
            model of its own, whose names are known.
        int8_input: whether layers on codes of 4 bits round their inputs to 8 bits, as `Int4Int8Dynamic` does: quicker,
            and less exact.

    Returns:
        `model`, or the new one.

    Raises:
        FormatError: (a ValueError) the file is truncated, or no GGUF file, or its metadata describe no Llama.
        NotImplementedError: a model of another architecture, or with what `LlamaForCausalLM` does not have.
        KeyError: a name that the model or the file lacks.
        RuntimeError: a tensor that does not fit.
        TypeError: only one of `model` and `names`; codes of a kind that is not known.
        ImportError: transformers is not installed.
        OSError: the file cannot be read.
    """
    if (model is None) != (names is None):
        raise TypeError(f"{WHERE}: model and names go together: both, or neither for the model that the file describes")
    with Gguf(path) as file:
        if model is None or names is None:
            return _llama(file, int8_input)
        check_model("load_gguf", model)
        _fill(file, model, names, {}, int8_input)
    return model


def _fill(file: Gguf, model: Module, names: Mapping[str, str], rows: Mapping[str, Tensor], int8_input: bool) -> None:
    """`rows`: tensor's name in the file -> the order in which its rows are taken."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plain: list[tuple[str, Tensor, Tensor]] = []
    changed: dict[Module, nn.QuantizedModule] = {}
    known: dict[str, nn.QuantizedModule] = {}
    for target, source in names.items():
        if target not in parameters:
            raise KeyError(f"{WHERE}: the model has no parameter {target!r}")
        parameter, entry = parameters[target], file.entry(source)
        module = model.get_submodule(target.rpartition(".")[0])
        if tuple(parameter.shape) != entry.shape:
            shapes = f"{entry.shape} in the file, {tuple(parameter.shape)} in the model"
            raise RuntimeError(f"{WHERE}: {target} is {shapes}")
        if entry.kind in _FLOATING:
            values = file.tensor(source)
            plain.append((target, parameter, values[rows[source]] if source in rows else values))
            continue
        made = _made(file, source, module, target, rows.get(source), int8_input)
        if source in known:
            for name, buffer in known[source]._buffers.items():
                made._buffers[name] = buffer
        known[source] = made
        changed[module] = made.train(module.training)
    for target, into, values in plain:
        if into.is_meta:
            path, _, name = target.rpartition(".")
            held = torch.nn.Parameter(values.to(into.dtype), into.requires_grad)
            model.get_submodule(path)._parameters[name] = held
        else:
            with torch.no_grad():
                into.copy_(values)
    for module, made in changed.items():
        become(module, made)


def _made(
    file: Gguf, source: str, module: Module, target: str, rows: Tensor | None, int8_input: bool
) -> nn.QuantizedModule:
    weight: Any = module._parameters.get("weight")
    if not target.endswith("weight") or weight is None or is_conv1d(module):
        raise RuntimeError(f"{WHERE}: {target} cannot take codes: it is no dense layer's or embedding's weight")
    made: nn.QuantizedModule
    if type(module) is torch.nn.Embedding:
        made = file.embedding(source, weight.dtype)
    elif type(module) in (torch.nn.Linear, nn.Linear):
        layer: Any = module
        made = file.linear(source, layer.bias, rows=rows, int8_input=int8_input)
        vars(made)["activation"] = getattr(module, "activation", None)
    else:
        kind = type(module).__name__
        raise RuntimeError(f"{WHERE}: {target} cannot take codes: {kind} is no plain dense layer or embedding")
    if not weight.is_meta:
        for name, buffer in made._buffers.items():
            made._buffers[name] = None if buffer is None else buffer.to(weight.device)
    return made


# ---- Llama

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' name of a part of a layer -> llama.cpp's."""

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _source_of(target: str, tied: bool) -> str:
    """llama.cpp's name of a parameter of LlamaForCausalLM."""
    path, _, kind = target.rpartition(".")
    if path in _OUTSIDE:
        return f"{_OUTSIDE['model.embed_tokens' if tied and path == 'lm_head' else path]}.{kind}"
    _, _, number, part = path.split(".", 3)
    return f"blk.{number}.{_LAYER[part]}.{kind}"


def _halves_of(rows: int, heads: int) -> Tensor:
    """Where the rows of heads, whose pairs are halves, lie in a file that has pairs as neighbours."""
    return torch.arange(rows).reshape(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


class _Metadata:
    """What the file says of a Llama, checked."""

    def __init__(self, file: Gguf) -> None:
        self.file, self.values = file, file.metadata
        kind = self.values.get("general.architecture")
        if kind != "llama":
            raise NotImplementedError(
                f"{WHERE}: {file.path} is of architecture {kind!r}; of itself it makes 'llama' alone: give a model and "
                "names for others"
            )

    def number(self, name: str, default: float | None = None) -> Any:
        value = self.values.get(f"llama.{name}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
            raise FormatError(f"{self.file.path}: llama.{name} is {value!r}, no positive number")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int):
            raise FormatError(f"{self.file.path}: llama.{name} is {value!r}, no whole number")
        return value

    def refuse_unknown(self, head: int) -> None:
        """NotImplementedError where the file asks for what the model would not compute."""
        scaling = self.values.get("llama.rope.scaling.type", "none")
        for what, wrong in (
            (f"experts ({self.values.get('llama.expert_count')})", bool(self.values.get("llama.expert_count"))),
            (f"a rotation that is scaled ({scaling})", scaling != "none" or "rope_freqs.weight" in self.file.tensors),
            (f"a rotation of a part of the {head} features", self.count("rope.dimension_count", head) != head),
            ("values narrower or wider than keys", self.count("attention.value_length", head) != head),
            ("attention in a window", bool(self.values.get("llama.attention.sliding_window"))),
        ):
            if wrong:
                raise NotImplementedError(f"{WHERE}: {self.file.path} asks for {what}; no such Llama is made here")


def _config(file: Gguf, tied: bool) -> Any:
    said = _Metadata(file)
    width, heads = said.count("embedding_length"), said.count("attention.head_count")
    kv_heads = said.count("attention.head_count_kv", heads)
    head = said.count("attention.key_length", width // heads)
    if heads % kv_heads or head % 2 or ("llama.attention.key_length" not in said.values and width % heads):
        raise FormatError(
            f"{file.path}: {heads} heads and {kv_heads} of keys of {head} features in a width of {width} are no Llama's"
        )
    said.refuse_unknown(head)
    try:
        from transformers import LlamaConfig
    except ImportError as error:
        raise ImportError(f"{WHERE}: a model of itself needs transformers: pip install transformers") from error
    blocks = said.count("block_count")
    if f"blk.{blocks - 1}.attn_q.weight" not in file.tensors:
        raise FormatError(f"{file.path}: it says that it has {blocks} blocks, and the last one is not there")
    ids = {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return LlamaConfig(
        vocab_size=file.entry("token_embd.weight").shape[0],
        hidden_size=width,
        intermediate_size=said.count("feed_forward_length"),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=said.count("context_length"),
        rms_norm_eps=said.number("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": said.number("rope.freq_base", 10000.0)},
        tie_word_embeddings=tied,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        **ids,
    )


def _llama(file: Gguf, int8_input: bool) -> Any:
    """transformers' Llama with the file's sizes and tensors."""
    tied = "output.weight" not in file.tensors
    config = _config(file, tied)
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.eval()
    names = {target: _source_of(target, tied) for target, _ in model.named_parameters(remove_duplicate=False)}
    left = sorted(file.tensors.keys() - set(names.values()))
    if left:
        raise NotImplementedError(f"{WHERE}: {file.path} has tensors that no Llama here takes: {', '.join(left[:3])}")
    turned = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    rows = {
        source: _halves_of(file.entry(source).shape[0], turned[source.split(".")[2]])
        for source in names.values()
        if source.startswith("blk.") and source.split(".")[2] in turned
    }
    _fill(file, model, names, rows, int8_input)
    if tied and isinstance(model.lm_head, torch.nn.Linear):
        model.lm_head.weight = model.model.embed_tokens.weight
    rotation: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotation)(config)  # its table of frequencies is in no file
    return model
