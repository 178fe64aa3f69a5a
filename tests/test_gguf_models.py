"""Llama-shaped models from GGUF files: the names, the rows of queries and keys, the head, and what is refused."""

from __future__ import annotations

import struct

import pytest
import torch

pytest.importorskip("transformers")

from llama_files import expected_llama, u32, write_llama
from test_gguf import text

import fastnn
from fastnn.nn import Int4Linear, Int8Embedding, Int8WeightOnlyLinear
from fastnn.quant import FormatError


@pytest.mark.parametrize(("kind", "tied"), [("Q4_1", True), ("Q4_0", False)])
def test_a_llama_computes_what_its_codes_stand_for(tmp_path, kind, tied):
    path, expected = write_llama(tmp_path / "m.gguf", kind=kind, tied=tied), expected_llama(kind, tied)
    model = fastnn.load_gguf(path)
    assert not model.training and model.config.eos_token_id == 3
    kinds = type(model.model.embed_tokens), type(model.lm_head), type(model.model.layers[1].self_attn.k_proj)
    assert kinds == (Int8Embedding, Int8WeightOnlyLinear, Int4Linear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, weight in expected.state_dict().items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        made = layer.dequantized(torch.float64) if hasattr(layer, "dequantized") else layer.weight.double()
        assert torch.equal(made, weight), name
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        found, truth = model(ids).logits.double(), expected(ids).logits
    assert ((found - truth).abs() <= 1e-5 * truth.abs().max()).all()


def test_inputs_may_be_rounded_to_8_bits(tmp_path):
    path, expected = write_llama(tmp_path / "m.gguf"), expected_llama()
    model = fastnn.load_gguf(path, int8_input=True)
    assert all(m.int8_input for m in model.modules() if isinstance(m, Int4Linear))
    ids = torch.randint(0, 40, (1, 9))
    with torch.no_grad():
        found, truth = model(ids).logits.double(), expected(ids).logits
    error = (found - truth).abs().max() / truth.abs().max()
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        ({"general.architecture": (8, text("mamba"))}, NotImplementedError, "architecture 'mamba'"),
        ({"llama.rope.scaling.type": (8, text("yarn"))}, NotImplementedError, r"scaled \(yarn\)"),
        ({"llama.expert_count": u32(4)}, NotImplementedError, r"experts \(4\)"),
        ({"llama.rope.dimension_count": u32(8)}, NotImplementedError, "a part of the 16 features"),
        ({"llama.attention.sliding_window": u32(8)}, NotImplementedError, "window"),
        ({"llama.block_count": u32(1 << 30)}, FormatError, "the last one is not there"),
        ({"llama.block_count": u32(1)}, NotImplementedError, "no Llama here takes: blk.1"),
        ({"llama.attention.head_count": u32(3)}, FormatError, "no Llama's"),
        ({"llama.embedding_length": (6, struct.pack("<f", 64.0))}, FormatError, "no whole number"),
        ({"llama.attention.head_count": u32(0)}, FormatError, "no positive number"),
        ({"llama.feed_forward_length": u32(64)}, RuntimeError, "in the file"),
    ],
)
def test_what_is_no_such_llama_is_refused(tmp_path, metadata, error, words):
    path = write_llama(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(error, match=words):
        fastnn.load_gguf(path)


def test_nothing_of_the_file_is_left_out(tmp_path):
    frequencies = ("F32", (8,), bytes(32))
    path = write_llama(tmp_path / "m.gguf", extra={"rope_freqs.weight": frequencies})
    with pytest.raises(NotImplementedError, match="scaled"):
        fastnn.load_gguf(path)
    path = write_llama(tmp_path / "m.gguf", extra={"blk.0.attn_sinks.weight": frequencies})
    with pytest.raises(NotImplementedError, match=r"no Llama here takes: blk\.0\.attn_sinks"):
        fastnn.load_gguf(path)
    with pytest.raises(TypeError, match="go together"):
        fastnn.load_gguf(path, torch.nn.Linear(2, 2))
