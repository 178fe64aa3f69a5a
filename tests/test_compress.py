"""`python -m fastnn compress`: the file it writes gives the model back, and what it cannot do it says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from llama_files import tiny_llama, write_llama

import fastnn
from fastnn import cli, compress
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

    monkeypatch.setattr(compress, "export", export)
    monkeypatch.setattr(compress, "check_installed", lambda: None)
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


def test_says_why_it_does_not_begin(folder, capsys):
    out = str(folder / "m.safetensors")
    for arguments, words in (
        ([str(folder / "model"), "--out", out], "--int8 or --int4 must be given"),
        ([str(folder / "model"), "--int8", "--out", str(folder / "none" / "m")], "no folder"),
        ([str(folder / "empty"), "--int8", "--out", out], "empty"),
    ):
        assert cli.main(["compress", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_file_that_gives_another_model_fails(folder, capsys, monkeypatch):
    def worse(path, model):
        loaded = fastnn.load(path, model)
        loaded.model.layers[1].mlp.down_proj.weight[0, 0] += 1
        return loaded

    monkeypatch.setattr(compress, "load", worse)
    out = folder / "m.safetensors"
    assert cli.main(["compress", str(folder / "model"), "--int8", "--out", str(out), "--tokens", "8"]) == 1
    assert "down_proj.weight came back otherwise" in capsys.readouterr().err
