"""The demo's training runs: both ways learn the same."""

from __future__ import annotations

import pytest
import torch

from fastnn.demo.train import digits, train_classifier, train_language


@pytest.mark.parametrize("llama", [False, True], ids=["GPT-2", "Llama"])
def test_language_model_learns_the_same_both_ways(tmp_path, llama):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    found = train_language(text, llama, lambda total: None, steps=12, batch=2, length=32)
    assert not isinstance(found, str), found
    assert found.curve_difference < 1e-3 and found.fastnn.losses[-1] < found.fastnn.losses[0]


def test_classifier_learns_the_same_both_ways():
    if isinstance(digits(), str):
        pytest.skip(digits())
    torch.set_num_threads(1)
    found = train_classifier(lambda total: None, epochs=1)
    assert found.curve_difference < 1e-2
    assert abs(found.torch.accuracy - found.fastnn.accuracy) < 0.005 and found.fastnn.accuracy > 0.85


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTNN_DATA", raising=False)
    assert "--text" in train_language(None, False, lambda total: None)
    short = tmp_path / "short.txt"
    short.write_text("abc")
    assert "3 characters" in train_language(short, False, lambda total: None)
