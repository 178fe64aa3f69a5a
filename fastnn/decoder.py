"""Llama-shaped models as `fastnn.generate` runs them: packed weights, keys and values that are kept.

A token of a small model is a thousand small calls, and what stands around them costs as much as they do: modules,
hooks, checks of arguments that do not change, masks, caches that are copied. Here a model is read once into packed
weights (`Decoder`), and the layers of a step are one call of csrc/cpu/decoder.cpp, which runs the kernels of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import _dispatch, _extension, nn
from .nn.hooks import hooked
from .ops.activation import ACTIVATION_CODE
from .ops.groups import bits_of
from .ops.kv_cache import KVCache
from .ops.linear_groupwise import pack_groups
from .ops.packing import state_of, warn_of_uncounted

WHERE = "fastnn.generate"

_LLAMAS = (
    "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM",
)
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Whose frequencies do not depend on the length."""
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def refusal(model: Module, reason: str) -> NotImplementedError:
    """What is raised for a model that the loop does not run."""
    return NotImplementedError(f"{WHERE}: {type(model).__name__} is not taken: {reason}")


def check_kind(model: Module) -> None:
    """NotImplementedError where the loop would compute something else than the model."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if not kinds.intersection(_LLAMAS):
        known = " or ".join(name.rpartition(".")[2] for name in _LLAMAS)
        raise refusal(
            model, f"it must be a Llama-shaped model of transformers, {known}; its own generate() runs others"
        )
    config: Any = model.config
    if getattr(config, "sliding_window", None) is not None:
        raise refusal(model, f"its attention sees a window of {config.sliding_window}")
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in _FIXED_ROTATIONS:
        raise refusal(model, f"the frequencies of its rotation ({rotation}) depend on the length")
    if config.hidden_act not in _ACTIVATIONS:
        raise refusal(model, f"its feed-forward blocks use {config.hidden_act}")
    for name, module in model.named_modules():
        if hooked(module) or "forward" in vars(module):
            raise refusal(
                model, f"{name or 'the model'} has hooks or a forward of its own, which the loop would pass by"
            )
        if module.training and isinstance(module, torch.nn.Dropout) and module.p:
            raise refusal(model, f"{name} drops values: call eval() first")


def _source(model: Module, name: str) -> Module:
    """A layer that multiplies, of a kind that the loop knows."""
    layer = model.get_submodule(name)
    plain = isinstance(layer, torch.nn.Linear) and type(layer).forward in (torch.nn.Linear.forward, nn.Linear.forward)
    if not plain and not isinstance(layer, (nn.Int8Linear, nn.GroupwiseLinear)):
        raise refusal(model, f"{name} is a {type(layer).__name__}; Linear and fastnn's quantised layers are known")
    if getattr(layer, "activation", None) is not None:
        raise refusal(model, f"{name} has an activation of its own")
    return layer


def _bytes(t: Tensor) -> Any:
    """The tensor's own memory, as an array of bytes."""
    return t.detach().contiguous().view(torch.uint8).reshape(-1).numpy()


def _joined_bias(layers: Sequence[Any], dtype: torch.dtype) -> Any:
    """The layers' biases end to end, zeros for the ones without; None where none has any."""
    if all(layer.bias is None for layer in layers):
        return None
    parts = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    return _bytes(torch.cat([part.to(dtype) for part in parts]))


def _product(model: Module, names: Sequence[str], dtype: torch.dtype) -> Any:
    """The products of layers that read the same input, their results side by side: a `_C.DecoderProduct`."""
    library, extension = torch.ops.fastnn, _extension._C
    layers: list[Any] = [_source(model, name) for name in names]
    first = layers[0]

    def joined(name: str) -> Tensor:
        parts = [getattr(layer, name).detach() for layer in layers]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    if len({_kind(layer) for layer in layers}) > 1:
        raise refusal(model, f"{', '.join(names)} read the same input and are not of one kind")
    inputs, outputs = first.in_features, sum(layer.out_features for layer in layers)
    groups: tuple[Any, ...] = ()
    if isinstance(first, nn.GroupwiseLinear):
        kind, codes, size = 2, joined("weight"), first.group_size
        offset = None if first.weight_offset is None else joined("weight_offset")
        packed = pack_groups(codes, joined("weight_scale"), offset, inputs, size)
        groups = size, bits_of(codes), offset is not None, first.int8_input
    elif isinstance(first, nn.Int8Linear):
        kind, packed = 1, library.linear_int8_pack.default(joined("weight"), joined("weight_scale"), True)
    else:
        kind, packed = 0, library.linear_pack.default(joined("weight"), True)
    if first.weight.dtype.is_floating_point and first.weight.dtype != dtype:
        raise refusal(model, f"{names[0]} is of {first.weight.dtype}, the embeddings of {dtype}")
    bias, code = _joined_bias(layers, dtype), _dispatch.KERNEL_DTYPES.index(dtype)
    return extension.DecoderProduct(code, kind, outputs, inputs, _bytes(packed), bias, *groups)  # type: ignore[union-attr]


def _kind(layer: Any) -> tuple[Any, ...]:
    """Layers of one kind can be one product."""
    if isinstance(layer, nn.QuantizedModule):
        return type(layer), *sorted(layer.options().items(), key=lambda item: item[0])
    return torch.nn.Linear, layer.weight.dtype


def _norm(model: Module, name: str, dtype: torch.dtype) -> tuple[Any, float]:
    """Weight and epsilon."""
    module: Any = model.get_submodule(name)
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), module._parameters.get("weight")
    if eps is None or weight is None or weight.dim() != 1 or "RMSNorm" not in type(module).__name__:
        raise refusal(model, f"{name} is a {type(module).__name__}, no RMS norm with a weight")
    if weight.dtype != dtype:
        raise refusal(model, f"{name} is of {weight.dtype}, the embeddings of {dtype}")
    return _bytes(weight), float(eps)


class Caches:
    """The keys and values of each layer."""

    def __init__(self, layers: int, batch: int, kv_heads: int, capacity: int, head: int, dtype: torch.dtype) -> None:
        self.kept = [KVCache(batch, kv_heads, capacity, head, dtype=dtype) for _ in range(layers)]
        self.capacity = capacity
        self._look()

    def _look(self) -> None:
        self.keys, self.values = [_bytes(c.keys) for c in self.kept], [_bytes(c.values) for c in self.kept]

    def keep(self, index: Tensor, filled: int) -> None:
        """Sequences `index` go on; no sequence has more than `filled` rows."""
        for cache in self.kept:
            cache.lengths = torch.full((cache.batch,), filled)
            cache.reorder(index)
        self._look()


class Decoder:
    """A model read into `_C.Decoder`; made anew when a weight of it was changed."""

    def __init__(self, model: Any) -> None:
        config, extension = model.config, _extension._C
        self.embed: Module = model.model.embed_tokens
        self.dtype = dtype = _embedded_dtype(model)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.depth, self.width, self.words = config.num_hidden_layers, config.hidden_size, model.lm_head.out_features
        code, activation = _dispatch.KERNEL_DTYPES.index(dtype), ACTIVATION_CODE[_ACTIVATIONS[config.hidden_act]]
        sizes = config.hidden_size, config.intermediate_size, self.heads, self.kv_heads, self.head
        self.layers: Any = extension.Decoder(code, *sizes, activation)  # type: ignore[union-attr]
        for at in (f"model.layers.{i}" for i in range(self.depth)):
            self.layers.add(
                *_norm(model, f"{at}.input_layernorm", dtype),
                _product(model, [f"{at}.self_attn.{name}_proj" for name in "qkv"], dtype),
                _product(model, [f"{at}.self_attn.o_proj"], dtype),
                *_norm(model, f"{at}.post_attention_layernorm", dtype),
                _product(model, [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"], dtype),
                _product(model, [f"{at}.mlp.down_proj"], dtype),
            )
        self.layers.finish(*_norm(model, "model.norm", dtype))
        self.output = _product(model, ["lm_head"], dtype)
        rotation = model.model.rotary_emb
        self.frequencies, self.table_scale = rotation.inv_freq.detach().float(), float(rotation.attention_scaling)
        self.tables = self._tables(0)
        self.key = key_of(model)
        self.sources = [t.detach() for t in (*model.parameters(), *model.buffers())]  # their addresses stay theirs
        dense = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, nn.QuantizedLinear))]
        uncounted = None in self.key
        if uncounted:
            warn_of_uncounted(
                "a tensor of the model", "trusted to stay; every call of fastnn.generate packs all weights"
            )
        trains = any(p.requires_grad for m in dense for p in m.parameters(recurse=False))
        self.may_change_unseen = uncounted or trains

    def _tables(self, length: int) -> tuple[Any, Any]:
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self.frequencies[None]
        return (angles.cos() * self.table_scale).numpy(), (angles.sin() * self.table_scale).numpy()

    def caches(self, batch: int, capacity: int) -> Caches:
        """Empty ones; the rotation's tables reach as far."""
        if len(self.tables[0]) < capacity:
            self.tables = self._tables(capacity)
        return Caches(self.depth, batch, self.kv_heads, capacity, self.head, self.dtype)

    def run(self, ids: Tensor, caches: Caches, lengths: Tensor) -> Tensor:
        """The last hidden states (batch, n, width), normalized, of ids (batch, n) behind `lengths` rows (batch,)."""
        x = self.embed(ids).contiguous()
        self.layers.run(
            _bytes(x), *ids.shape, lengths.numpy(), *self.tables, caches.capacity, caches.keys, caches.values
        )
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, words) of hidden states (rows, width)."""
        found = torch.empty(len(hidden), self.words, dtype=self.dtype)
        self.output.apply(_bytes(hidden), _bytes(found))
        return found


def _embedded_dtype(model: Any) -> torch.dtype:
    """The type in which the model computes."""
    table = model.model.embed_tokens
    if not isinstance(table, (torch.nn.Embedding, nn.GroupwiseEmbedding)):
        raise refusal(model, f"model.embed_tokens is a {type(table).__name__}")
    dtype: torch.dtype = table.dtype if isinstance(table, nn.GroupwiseEmbedding) else table.weight.dtype
    if dtype not in _dispatch.KERNEL_DTYPES or any(not t.is_cpu for t in model.state_dict().values()):
        raise refusal(model, f"it computes in {dtype}; the loop takes float32, bfloat16 and float16 on the CPU")
    return dtype


def key_of(model: Module) -> tuple[Any, ...]:
    """Differs when a weight is replaced or written to, layers change class, or the instruction set does."""
    tensors = [*model.parameters(), *model.buffers()]
    extension: Any = _extension._C
    kinds = tuple(type(module) for module in model.modules())
    return extension.isa(), kinds, *(state_of(t) for t in tensors)


class Kept:
    """A model's decoder, in no state_dict, pickle or deepcopy of it."""

    decoder: Decoder | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def decoder_of(model: Module) -> Decoder:
    """The model's, made on first use and when a weight has changed since.

    torch's fused optimizers write to a weight without moving its version, and inference tensors have none: it is made
    for each call where there may be such.
    """
    kept = vars(model).setdefault("_fastnn_decoder", Kept())
    decoder = kept.decoder
    if decoder is None or decoder.may_change_unseen or decoder.key != key_of(model):
        decoder = kept.decoder = None  # its memory goes first
        decoder = kept.decoder = Decoder(model)
    return decoder
