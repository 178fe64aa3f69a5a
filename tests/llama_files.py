"""GGUF files of a tiny Llama, written as llama.cpp's converter does, and the model that they stand for."""

from __future__ import annotations

import functools
import struct

import torch
from test_gguf import blocks_of, make_file, text

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, WORDS = 2, 64, 96, 4, 2, 40

PARTS = {
    "attn_q": ("self_attn.q_proj", (WIDTH, WIDTH)),
    "attn_k": ("self_attn.k_proj", (WIDTH // 2, WIDTH)),
    "attn_v": ("self_attn.v_proj", (WIDTH // 2, WIDTH)),
    "attn_output": ("self_attn.o_proj", (WIDTH, WIDTH)),
    "ffn_gate": ("mlp.gate_proj", (HIDDEN, WIDTH)),
    "ffn_up": ("mlp.up_proj", (HIDDEN, WIDTH)),
    "ffn_down": ("mlp.down_proj", (WIDTH, HIDDEN)),
}


def u32(n):
    return 4, struct.pack("<I", n)


def f32(x):
    return 6, struct.pack("<f", x)


METADATA = {
    "general.architecture": (8, text("llama")),
    "llama.block_count": u32(LAYERS),
    "llama.context_length": u32(128),
    "llama.embedding_length": u32(WIDTH),
    "llama.feed_forward_length": u32(HIDDEN),
    "llama.attention.head_count": u32(HEADS),
    "llama.attention.head_count_kv": u32(KV_HEADS),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    "llama.rope.freq_base": f32(500.0),
    "llama.rope.dimension_count": u32(WIDTH // HEADS),
    "tokenizer.ggml.eos_token_id": u32(3),
}


def unturned(rows, heads):
    """llama.cpp's rows of a head are 0 of the first half, 0 of the second, 1 of the first, ..."""
    size = rows.shape[0] // heads
    order = [h * size + 2 * i + half for h in range(heads) for half in (0, 1) for i in range(size // 2)]
    return rows[order]


@functools.lru_cache
def _made(kind, tied):
    """(tensors of the file, state_dict of the model in float64)."""
    tensors, state = {}, {}

    def put(name, target, shape, kind, seed):
        raw, values = blocks_of(kind, *shape, seed, size=0.02)
        tensors[f"{name}.weight"] = (kind, shape, raw)
        state[f"{target}.weight"] = values

    def put_norm(name, target, seed):
        values = 1 + 0.1 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
        tensors[f"{name}.weight"] = ("F32", (WIDTH,), values.numpy().tobytes())
        state[f"{target}.weight"] = values.double()

    put("token_embd", "model.embed_tokens", (WORDS, WIDTH), "Q8_0", 1)
    put_norm("output_norm", "model.norm", 2)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if not tied:
        put("output", "lm_head", (WORDS, WIDTH), "Q8_0", 3)
    for i in range(LAYERS):
        put_norm(f"blk.{i}.attn_norm", f"model.layers.{i}.input_layernorm", 10 * i)
        put_norm(f"blk.{i}.ffn_norm", f"model.layers.{i}.post_attention_layernorm", 10 * i + 1)
        for j, (name, (part, shape)) in enumerate(PARTS.items()):
            target = f"model.layers.{i}.{part}"
            put(f"blk.{i}.{name}", target, shape, kind, 100 * i + j)
            if name in ("attn_q", "attn_k"):
                heads = HEADS if name == "attn_q" else KV_HEADS
                state[f"{target}.weight"] = unturned(state[f"{target}.weight"], heads)
    return tensors, state


def write_llama(path, *, kind="Q4_1", tied=True, extra=(), metadata=()):
    """The file."""
    return make_file(path, {**_made(kind, tied)[0], **dict(extra)}, {**METADATA, **dict(metadata)})


def tiny_llama(state=None, **options):
    """transformers' model of the file's sizes, with `state` where there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()
    if state is not None:
        model.double().load_state_dict(state, strict=True)
    return model


def expected_llama(kind="Q4_1", tied=True):
    """transformers' model in float64 with the values that the file's codes stand for."""
    return tiny_llama(_made(kind, tied)[1], tie_word_embeddings=tied)
