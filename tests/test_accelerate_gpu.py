"""What accelerate and explain say of models on a GPU, as far as it can be asked without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastnn
from fastnn import _dispatch
from fastnn.accelerate import survey
from fastnn.accelerate.explain import _Clock

CUDA = torch.device("cuda")


@pytest.fixture
def triton_alone(monkeypatch):
    """As if Triton could run everything on a GPU, and nothing else."""
    monkeypatch.setattr(_dispatch, "why_not", lambda op, backend, *a: "" if backend == "triton" else f"no {backend}")


def test_every_backend_of_the_device_is_asked(triton_alone):
    assert survey.backend_for("linear", CUDA, torch.float32) == ("triton", "")
    assert survey.backend_for("linear", torch.device("cpu"), torch.float32) == ("", "no cpu")


def test_a_forced_backend_alone_is_asked(triton_alone):
    for forced, found in (
        ("reference", ("reference", "")),
        ("triton", ("triton", "")),
        ("cuda", ("", "no cuda")),
        ("cpu", ("", "no cpu")),
    ):
        with fastnn.use_backend(forced):
            assert survey.backend_for("linear", CUDA, torch.float32) == found


def test_without_kernels_for_gpus_a_model_there_is_left_alone_with_the_reasons():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    backend, reason = survey.backend_for("linear", CUDA, torch.float32)
    there = [name for name in ("cuda", "triton") if not _dispatch.why_no_kernel("linear", name)]
    assert backend in there if there else reason.count(";") >= 1


def test_weights_that_are_not_on_the_cpu_are_not_packed(monkeypatch):
    monkeypatch.setattr(survey, "backend_for", lambda *a: ("triton", ""))
    (found,) = survey.survey(nn.Sequential(nn.Linear(3, 4, device="meta")), freeze=True).findings
    assert not found.patch.freeze
    assert found.note == "not frozen: packed weights are for the CPU, this one is on meta"


def test_times_on_a_gpu_wait_for_it(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    for device, expected in (("cpu", 0), ("cuda", 6)):
        clock = _Clock(device)
        with clock.watching(model):
            model(torch.ones(2, 3))
        assert len(waits) == expected and clock.total > 0
