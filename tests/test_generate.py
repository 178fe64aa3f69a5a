"""generate: transformers' own tokens from our loop, for floating and quantised weights, one prompt or several."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from llama_files import tiny_llama, write_llama

import fastnn
from fastnn import Int4Int8Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly, _extension
from fastnn.decoder import decoder_of


def llama(seed=0, **options):
    """Random weights large enough that logits are apart."""
    torch.manual_seed(seed)
    model = tiny_llama(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


def theirs(model, ids, new, **options):
    options = {"eos_token_id": None, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


IDS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize(
    "config",
    [None, Int8Dynamic(), Int8WeightOnly(32), Int4WeightOnly(32, symmetric=False), Int4Int8Dynamic(16)],
    ids=lambda c: "float" if c is None else type(c).__name__,
)
def test_tokens_are_those_of_transformers(config, biases):
    model = llama(attention_bias=biases, mlp_bias=biases)
    if config is not None:
        fastnn.quantize_(model, config)
    expected = theirs(model, IDS, 20)
    assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=20, eos=()), expected)
    assert len(set(expected[:, 7:].flatten().tolist())) > 5


def test_a_model_made_in_inference_mode_is_packed_for_each_call():
    with torch.inference_mode():
        model = llama()
        first = theirs(model, IDS, 8)
        with pytest.warns(RuntimeWarning, match="every call of fastnn.generate packs"):
            assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=8, eos=()), first)
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
        second = theirs(model, IDS, 8)
        assert not torch.equal(first, second)
        with pytest.warns(RuntimeWarning, match="every call of fastnn.generate packs"):
            assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=8, eos=()), second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", fastnn.info()["isa"]["supported"])
def test_hidden_states_are_those_of_the_model(dtype, isa, request):
    _extension._C.set_isa(isa)
    request.addfinalizer(lambda: _extension._C.set_isa(None))
    model = llama(head_dim=32, num_key_value_heads=1, hidden_act="gelu").to(dtype)
    truth = copy.deepcopy(model).double()
    with torch.no_grad():
        decoder = decoder_of(model)
        caches = decoder.caches(3, 12)
        found = decoder.run(IDS, caches, torch.zeros(3, dtype=torch.int64))
        more = decoder.run(IDS[:, :2], caches, torch.tensor([7, 5, 3]))
        for b, length in enumerate((7, 5, 3)):
            ids = torch.cat((IDS[b, :length], IDS[b, :2]))[None]
            expected = truth.model(ids).last_hidden_state[0]
            plain = model.model(ids).last_hidden_state[0]
            limit = 4 * (plain.double() - expected).abs().max() + 1e-5
            assert ((more[b].double() - expected[-2:]).abs() <= limit).all()
            assert ((found[b, :length].double() - expected[:-2]).abs() <= limit).all()


def test_prompts_of_any_lengths_run_together():
    model = llama()
    prompts = [IDS[0, :2], IDS[1].tolist(), IDS[2, :5]]
    found = fastnn.generate(model, prompts, max_new_tokens=12, eos=())
    for prompt, tokens in zip(prompts, found, strict=True):
        alone = torch.as_tensor(prompt)[None]
        assert torch.equal(tokens, theirs(model, alone, 12)[0])


def test_a_sequence_ends_and_the_others_go_on():
    model = llama()
    free = theirs(model, IDS, 12)
    end = int(free[0, 9])  # the third new token of the first
    expected = theirs(model, IDS, 12, eos_token_id=end, pad_token_id=7)
    found = fastnn.generate(model, IDS, max_new_tokens=12, eos=end, pad=7)
    assert torch.equal(found, expected) and (found[0, 10:] == 7).all() and found.shape[1] > 10
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [end, 39], 7
    expected = theirs(model, IDS, 12, eos_token_id=[end, 39], pad_token_id=7)
    assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=12), expected)
    listed = fastnn.generate(model, list(IDS), max_new_tokens=12, eos=end)
    assert listed[0].tolist() == free[0, :10].tolist()


def test_a_file_of_codes_generates(tmp_path):
    model = fastnn.load_gguf(write_llama(tmp_path / "m.gguf", kind="Q4_0"))
    expected = theirs(model, IDS, 16, eos_token_id=3)
    assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=16, pad=0), expected)


def test_follows_its_weights():
    model = llama()
    first = fastnn.generate(model, IDS, max_new_tokens=8, eos=())
    decoder = decoder_of(model)
    assert decoder_of(model) is decoder
    copied = copy.deepcopy(model)
    assert vars(copied)["_fastnn_decoder"].decoder is None and model.state_dict().keys() == copied.state_dict().keys()
    assert vars(pickle.loads(pickle.dumps(model)))["_fastnn_decoder"].decoder is None
    model.model.layers[1].mlp.down_proj.weight.neg_()
    changed = fastnn.generate(model, IDS, max_new_tokens=8, eos=())
    assert torch.equal(changed, theirs(model, IDS, 8)) and not torch.equal(changed, first)
    fastnn.quantize_(model, Int4WeightOnly(32))
    assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=8, eos=()), theirs(model, IDS, 8))
    model.requires_grad_(True)
    fastnn.dequantize_(model)
    trained = decoder_of(model.requires_grad_(True))
    model.model.layers[0].mlp.up_proj.weight.data.neg_()  # moves no version
    assert decoder_of(model) is not trained
    assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=8, eos=()), theirs(model, IDS, 8))


def test_nothing_and_one():
    model = llama()
    assert torch.equal(fastnn.generate(model, IDS, max_new_tokens=0), IDS)
    assert fastnn.generate(model, [], max_new_tokens=3) == []
    one = fastnn.generate(model, IDS[0], max_new_tokens=1, eos=())
    assert torch.equal(one, theirs(model, IDS[:1], 1))


def test_other_models_are_refused_by_name():
    def refused(words, model, error=NotImplementedError, ids=IDS, new=4, **options):
        with pytest.raises(error, match=words):
            fastnn.generate(model, ids, max_new_tokens=new, **options)

    refused("Linear is not taken: it must be a Llama-shaped", torch.nn.Linear(2, 2))
    refused("depend on the length", llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    refused("feed-forward blocks use tanh", llama(hidden_act="tanh"))
    refused("computes in torch.float64", llama().double())
    hooked = llama()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    refused("layers.1.mlp has hooks", hooked)
    replaced = llama()
    replaced.model.layers[0].self_attn.k_proj = torch.nn.Sequential(replaced.model.layers[0].self_attn.k_proj)
    refused("k_proj is a Sequential", replaced)
    mixed = llama()
    fastnn.quantize_(mixed, Int8Dynamic(), include="model.layers.0.self_attn.k_proj")
    refused("not of one kind", mixed)
    half = llama()
    half.model.norm.bfloat16()
    refused("model.norm is of torch.bfloat16", half)
    model = llama()
    refused("130 positions are wanted, and the model knows 128", model, ValueError, new=123)
    refused("must be in 0 .. 39", model, IndexError, ids=IDS + 30)
    refused("none of them empty", model, ValueError, ids=[[1], []])
    refused("of int64", model, ValueError, ids=IDS.float())
    refused("ids must be", model, TypeError, ids="text")
    refused("max_new_tokens", model, ValueError, new=-1)
    refused("eos must be", model, TypeError, eos="a")
    refused("model must be a Module", None, TypeError)
    with fastnn.use_backend("reference"):
        refused("backend 'reference' is asked for", model)


def test_the_compiled_loop_checks_what_it_is_given():
    decoder = decoder_of(llama())
    caches = decoder.caches(2, 8)
    x = torch.zeros(2 * 3 * 64 * 4, dtype=torch.uint8).numpy()

    def run(x=x, n=3, lengths=(0, 0), tables=decoder.tables, keys=caches.keys, capacity=8):
        lengths = torch.tensor(lengths).numpy()
        decoder.layers.run(x, 2, n, lengths, *tables, capacity, keys, caches.values)

    run()
    wrong = (
        {"x": x[:-4]},
        {"n": 4},
        {"lengths": (0,)},
        {"lengths": (6, 0)},
        {"lengths": (-1, 0)},
        {"capacity": 9},
        {"keys": caches.keys[:1]},
        {"tables": [t[:2] for t in decoder.tables]},
    )
    for options in wrong:
        with pytest.raises(ValueError, match=r"fastnn\._C\.Decoder"):
            run(**options)
    with pytest.raises(TypeError):
        run(x=x.astype("float32"))
    with pytest.raises(ValueError, match="rows of the product"):
        decoder.output.apply(x[:-4], x)
