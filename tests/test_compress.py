"""`python -m fastnn compress`: the file it writes gives the model back, and what it cannot do it says."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

pytest.importorskip("transformers")

from llama_files import tiny_llama, write_llama

import fastnn
from fastnn import cli
from fastnn.compression import command, look, search, within
from fastnn.nn import Int4Embedding, Int4Linear, Int8Linear


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_folder_becomes_a_file_of_codes(folder, capsys):
    from transformers import LlamaForCausalLM

    for option, kind in (("--int8", Int8Linear), ("--int4", Int4Linear)):
        out = folder / f"m{option}.safetensors"
        arguments = ["compress", str(folder / "model"), option, "--out", str(out), "--tokens", "8"]
        assert cli.main([*arguments, "--group-size", "32"]) == 0
        text = capsys.readouterr().out
        for words in ("Quantised", "down_proj", "MiB became", "1x8 tokens", "the same bits"):
            assert words in text, words
        original = LlamaForCausalLM.from_pretrained(folder / "model")
        model = fastnn.load(out, LlamaForCausalLM(original.config))
        assert type(model.model.layers[0].self_attn.q_proj) is kind
        assert isinstance(model.model.embed_tokens, Int4Embedding) == (option == "--int4")
        expected = copy_of(original, option)
        ids = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, expected.eval()(ids).logits)


def copy_of(model, option):
    config = fastnn.Int8Dynamic() if option == "--int8" else fastnn.Int4WeightOnly(32)
    fastnn.quantize_(model, config)
    return model


def test_a_gguf_keeps_its_codes(tmp_path, capsys):
    path, out = write_llama(tmp_path / "m.gguf"), tmp_path / "m.safetensors"
    assert cli.main(["compress", str(path), "--out", str(out)]) == 0
    assert "the same bits" in capsys.readouterr().out
    model = fastnn.load_gguf(path)
    state = fastnn.load(out)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert cli.main(["compress", str(path), "--int4", "--out", str(out)]) == 2
    assert "own codes are kept" in capsys.readouterr().err


@pytest.mark.slow  # as tests/test_to_onnx.py
def test_an_onnx_file_beside_it(folder, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    out, file = folder / "m.safetensors", folder / "m.onnx"
    arguments = ["compress", str(folder / "model"), "--int4", "--group-size", "32", "--tokens", "8"]
    assert cli.main([*arguments, "--out", str(out), "--onnx", str(file)]) == 0
    assert "16 layers on codes in groups, off by" in " ".join(capsys.readouterr().out.split())
    from transformers import LlamaForCausalLM

    model = fastnn.load(out, LlamaForCausalLM.from_pretrained(folder / "model")).eval()
    ids = torch.arange(15).reshape(3, 5)  # other sizes than the example's, and rows that end earlier
    mask = (torch.arange(5) < torch.tensor([[5], [2], [1]])).long()
    (found,) = onnxruntime.InferenceSession(file).run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert (torch.from_numpy(found) - expected)[mask.bool()].abs().max() <= 1e-4 * expected.abs().max()


def test_what_is_exported(folder, capsys, monkeypatch):
    given = []

    def export(model, path, example, dynamic_shapes):
        given.append((model.config.use_cache, path, example, dynamic_shapes))
        raise RuntimeError("other numbers")

    monkeypatch.setattr(command, "export", export)
    monkeypatch.setattr(command, "check_installed", lambda: None)
    out, file = str(folder / "m.safetensors"), folder / "m.onnx"
    arguments = ["compress", str(folder / "model"), "--int8", "--out", out, "--tokens", "8", "--onnx"]
    assert cli.main([*arguments, str(file)]) == 1
    assert "no ONNX file was written: other numbers" in capsys.readouterr().err
    ((keeps, path, example, shapes),) = given
    assert keeps is False and path == file and set(shapes) == {"input_ids", "attention_mask"} == set(example)
    assert example["input_ids"].shape == (2, 8) and example["attention_mask"].sum(1).tolist() == [8, 5]
    assert cli.main([*arguments, str(folder / "none" / "m.onnx")]) == 2
    assert "no folder" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else object())
    assert cli.main([*arguments, str(file)]) == 2
    assert "pip install 'fastnn[onnx]'" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch):
    """Clocks that cost no time, few texts."""
    monkeypatch.setattr(look, "medians", lambda calls, input: (2.0, *[1.0] * (len(calls) - 1)))
    monkeypatch.setattr(
        search, "milliseconds", lambda model, states, example, rounds: [[2.0, 2.0], [1.0, 1.0]][-len(states) :]
    )
    monkeypatch.setattr(search, "memory", lambda *_: None)
    monkeypatch.setattr(within, "_BATCH", 4)
    monkeypatch.setattr(within, "_RANDOM", 8)


def test_a_budget_of_agreement(folder, capsys, quick):
    out, report = folder / "m.safetensors", folder / "report"
    arguments = ["compress", str(folder / "model"), "--out", str(out), "--tokens", "8", "--evaluations", "2"]
    files = ["--report", f"{report}.json", "--report", f"{report}.md"]
    assert cli.main([*arguments, "--budget", "0.05", "--target", "size", *files]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "on random token ids, which says little",
        "changed for size",
        "read back into a fresh model",
        "1.0000 before",
    ):
        assert words in text, words
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.from_pretrained(folder / "model")
    model = fastnn.load(out, LlamaForCausalLM(original.config)).eval()
    assert sum(isinstance(layer, fastnn.nn.QuantizedModule) for layer in model.modules()) > 3
    assert json.loads((folder / "report.json").read_text())["max_drop"] == 0.05
    assert "## Compressed" in (folder / "report.md").read_text()
    assert cli.main([*arguments, "--budget", "1e-10"]) == 1
    assert "no candidate keeps the metric within the budget" in " ".join(capsys.readouterr().err.split())


def test_a_budget_of_spearmans_correlation(tmp_path, capsys, quick, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    import transformers

    words = [f"w{i}" for i in range(60)]
    known = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=62, **sizes))
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "model")
    texts = [" ".join(words[(i * k) % 60] for k in range(1, 4 + i % 5)) for i in range(40)]
    pairs, out = tmp_path / "pairs.csv", tmp_path / "m.safetensors"
    pairs.write_text("".join(f"{a},{b},{i % 7 / 2}\n" for i, (a, b) in enumerate(itertools.pairwise(texts))))
    arguments = ["compress", str(tmp_path / "model"), "--budget", "0.5", "--target", "size", "--out", str(out)]
    assert cli.main([*arguments, "--sts", str(pairs), "--tokens", "8", "--evaluations", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Spearman's correlation on 20 of the 39 pairs" in text and "on what the search did not see" in text
    monkeypatch.setattr(within, "_value", lambda evaluate, model: float(model is loaded[-1]) * -9 if loaded else 1.0)
    loaded = []
    monkeypatch.setattr(within, "load", lambda path, fresh: loaded.append(fastnn.load(path, fresh)) or loaded[-1])
    assert cli.main([*arguments, "--text", str(pairs), "--tokens", "8", "--evaluations", "1"]) == 1
    captured = capsys.readouterr()
    assert "mean cosine) on 20 lines" in " ".join(captured.out.split()) and "beyond the budget of 0.5" in captured.err
    pairs.write_text("a,b\n")
    assert cli.main([*arguments, "--sts", str(pairs)]) == 2
    assert "each row must be" in capsys.readouterr().err


def test_says_why_it_does_not_begin(folder, capsys):
    out = str(folder / "m.safetensors")
    for arguments, words in (
        ([str(folder / "model"), "--out", out], "--int8, --int4 or --budget must be given"),
        ([str(folder / "model"), "--int8", "--out", str(folder / "none" / "m")], "no folder"),
        ([str(folder / "empty"), "--int8", "--out", out], "empty"),
        ([str(folder / "model"), "--int8", "--out", out, "--sts", out], "--sts goes with --budget"),
        ([str(folder / "model"), "--budget", "0.1", "--out", out, "--sts", out], "there is no file"),
        ([str(folder / "model"), "--budget", "0.1", "--out", out, "--report", "m.txt"], "a .json, .md or .png file"),
        ([str(folder / "model"), "--budget", "0.1", "--out", out, "--evaluations", "0"], "must be at least 1"),
    ):
        assert cli.main(["compress", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_file_that_gives_another_model_fails(folder, capsys, monkeypatch):
    def worse(path, model):
        loaded = fastnn.load(path, model)
        loaded.model.layers[1].mlp.down_proj.weight[0, 0] += 1
        return loaded

    monkeypatch.setattr(command, "load", worse)
    out = folder / "m.safetensors"
    assert cli.main(["compress", str(folder / "model"), "--int8", "--out", str(out), "--tokens", "8"]) == 1
    assert "down_proj.weight came back otherwise" in capsys.readouterr().err
