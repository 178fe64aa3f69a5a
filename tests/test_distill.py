"""Distillation: values, exact gradients, every reduction and mask, the step in a loop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn import Distiller, distillation_loss, hidden_state_loss
from fastnn.distill import distillation_loss_reference
from fastnn.testing import assert_within_budget
from fastnn.testing.policy import FORWARD_FACTOR, GRADIENT_FACTOR

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def torchs(student, teacher, temperature):
    """As one would write it with torch's own operators."""
    p, q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradient(dtype, temperature):
    student, teacher = randn(3, 5, 37, dtype=dtype), 3 * randn(3, 5, 37, seed=1, dtype=dtype)
    student[0, 0, 3] = teacher[0, 1, 4] = 20
    found = []
    for loss, x, y in (
        (lambda *a: distillation_loss(*a[:2], temperature=a[2], reduction="none"), student, teacher),
        (torchs, student, teacher),
        (distillation_loss_reference, student.double(), teacher.double()),
    ):
        x = x.clone().requires_grad_()
        rows = loss(x, y, temperature)
        (gradient,) = torch.autograd.grad(rows, x, randn(3, 5, seed=2, dtype=x.dtype))
        found.append((rows.detach(), gradient))
    (a, da), (b, db), (c, dc) = found
    assert_within_budget(a, c, b, dtype, FORWARD_FACTOR, where="loss")
    assert_within_budget(da, dc, db, dtype, GRADIENT_FACTOR, where="gradient")


def test_kernels_run():
    student, teacher = randn(4, 33).requires_grad_(), randn(4, 33, seed=1)
    with fastnn.record() as runs:
        distillation_loss(student, teacher, temperature=2.0).backward()
    assert {"masked_softmax_fwd", "cross_entropy_fwd", "cross_entropy_bwd"} <= {run.kernel for run in runs}


def test_equal_logits_have_no_loss_and_no_gradient():
    x = randn(3, 50).requires_grad_()
    loss = distillation_loss(x, x.detach().clone(), temperature=3.0)
    (gradient,) = torch.autograd.grad(loss, x)
    assert abs(loss.item()) < 1e-5 and gradient.abs().max() < 1e-7


def test_no_gradient_reaches_the_teacher():
    student, teacher = randn(3, 8).requires_grad_(), randn(3, 8, seed=1).requires_grad_()
    (distillation_loss(student, teacher) + hidden_state_loss(student, teacher)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_second_derivatives():
    teacher = randn(2, 5, seed=1).double()
    x = randn(2, 5).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s: distillation_loss(s, teacher, temperature=2.0), (x,))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
@pytest.mark.parametrize("which", ["mask", "target", "both", "numbers"])
@pytest.mark.parametrize("kind", ["logits", "mse", "cosine"])
def test_rows_that_do_not_count(kind, which, reduction):
    student, teacher = randn(3, 4, 9), randn(3, 4, 9, seed=1)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    target = torch.where(mask, 3, -7)
    options = {"mask": mask}
    if kind == "logits" and which in ("target", "both"):
        options = {"target": target, "ignore_index": -7}
        if which == "both":
            options["mask"] = torch.ones_like(mask).index_fill_(1, torch.tensor([0]), False)
    elif which == "numbers":
        options = {"mask": mask.long()}
    counts = mask & options["mask"].bool() if "mask" in options else mask
    student[~counts], teacher[~counts] = float("nan"), float("inf")
    student.requires_grad_()

    def loss(x, y, **how):
        if kind == "logits":
            return distillation_loss(x, y, temperature=2.0, **how)
        return hidden_state_loss(x, y, kind=kind, **how)

    found = loss(student, teacher, reduction=reduction, **options)
    rows = loss(student[counts], teacher[counts], reduction="none")
    expected = {
        "none": torch.zeros(3, 4).masked_scatter(counts, rows),
        "mean": rows.sum() / counts.sum(),
        "sum": rows.sum(),
        "batchmean": rows.sum() / 3,
    }[reduction]
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient[~counts].eq(0).all() and gradient[counts].abs().max() > 1e-4


def test_hidden_states_by_formula():
    student, teacher = randn(4, 6), randn(4, 6, seed=1)
    torch.testing.assert_close(hidden_state_loss(student, teacher), F.mse_loss(student, teacher))
    cosine = 1 - F.cosine_similarity(student, teacher).mean()
    torch.testing.assert_close(hidden_state_loss(student, teacher, kind="cosine"), cosine)
    scaled = hidden_state_loss(3 * teacher + 1, teacher, normalize=True)
    assert scaled < 1e-6 < hidden_state_loss(student, teacher, normalize=True)
    project = nn.Linear(3, 6)
    loss = hidden_state_loss(randn(4, 3), teacher, projection=project)
    torch.testing.assert_close(loss, F.mse_loss(project(randn(4, 3)), teacher))
    loss.backward()
    assert project.weight.grad.abs().sum() > 0


def networks():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4))
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return teacher.train(), student.train()


def test_a_step_in_a_loop_teaches():
    teacher, student = networks()
    frozen = copy.deepcopy(teacher.state_dict())
    project = nn.Linear(8, 16)
    step = Distiller(
        teacher,
        logits=lambda out: out,
        hidden={"1": "1"},
        weights={"hidden": 0.5, "logits": 2.0},
        temperature=2.0,
        projections={"1": project},
    )
    x = randn(64, 6)
    parameters = [*student.parameters(), *project.parameters()]
    losses = []
    for _ in range(60):
        found = step(student, x)
        torch.testing.assert_close(found.loss.detach(), 2 * found.parts["logits"] + 0.5 * found.parts["1"])
        losses.append(found.loss.item())
        gradients = torch.autograd.grad(found.loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.2 * gradient
    assert losses[-1] < 0.5 * losses[0]
    assert teacher.training and teacher[2].training and student.training
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for model in (teacher, student) for m in model.modules())
    teacher.eval()
    with torch.no_grad():
        said = teacher(x)
    torch.testing.assert_close(found.parts["logits"], distillation_loss(found.output, said, temperature=2.0).detach())


def test_the_teacher_does_not_drop_out():
    teacher, _ = networks()
    twin = copy.deepcopy(teacher).eval()
    loss = Distiller(teacher, logits=lambda out: out)(twin, randn(8, 6)).loss
    assert abs(loss.item()) < 1e-5


def test_batches_and_masks_of_any_kind():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x, mask):
            return {"logits": self.layer(x)}

    torch.manual_seed(0)
    teacher, student = Model(), Model()
    x, mask = randn(3, 5, 6), torch.ones(3, 5).index_fill_(1, torch.tensor([4]), 0)
    step = Distiller(teacher, logits=lambda out: out["logits"], mask=lambda batch: batch["mask"])
    by_name = step(student, {"x": x, "mask": mask}).loss
    by_place = Distiller(teacher, logits=lambda out: out["logits"], mask=lambda b: b[1])(student, (x, mask)).loss
    assert torch.equal(by_name, by_place)
    torch.testing.assert_close(by_name, distillation_loss(student.layer(x), teacher.layer(x), mask=mask))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "teacher must be a Tensor", lambda: distillation_loss(randn(2, 3), [1.0])),
        (TypeError, "floating point", lambda: distillation_loss(randn(2, 3), torch.ones(2, 3).long())),
        (ValueError, r"teacher must be \(2, 3\)", lambda: distillation_loss(randn(2, 3), randn(2, 4))),
        (ValueError, "at least one dimension", lambda: distillation_loss(randn(), randn())),
        (ValueError, "temperature must", lambda: distillation_loss(randn(2, 3), randn(2, 3), temperature=0)),
        (ValueError, "reduction must", lambda: distillation_loss(randn(2, 3), randn(2, 3), reduction="avg")),
        (ValueError, "mask must", lambda: distillation_loss(randn(2, 3), randn(2, 3), mask=torch.ones(3))),
        (ValueError, "target must", lambda: distillation_loss(randn(2, 3), randn(2, 3), target=torch.ones(2, 3))),
        (ValueError, "kind must", lambda: hidden_state_loss(randn(2, 3), randn(2, 3), kind="l1")),
        (ValueError, "projection= can", lambda: hidden_state_loss(randn(2, 3), randn(2, 4))),
        (ValueError, "projection= can", lambda: hidden_state_loss(randn(2, 3), randn(1, 3))),
        (ValueError, "nothing to compare", lambda: Distiller(nn.Linear(2, 2))),
        (ValueError, "the teacher has no module 'x'", lambda: Distiller(nn.Linear(2, 2), hidden={"": "x"})),
        (
            ValueError,
            "weights for",
            lambda: Distiller(nn.Linear(2, 2), logits=lambda out: out, weights={"nosuch": 1.0}),
        ),
    ],
)
def test_errors(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_errors_of_a_step():
    teacher, student = networks()
    with pytest.raises(ValueError, match="the student is the teacher"):
        Distiller(teacher, logits=lambda out: out)(teacher, randn(2, 6))
    with pytest.raises(ValueError, match="the student has no module 'nosuch'"):
        Distiller(teacher, hidden={"nosuch": "1"})(student, randn(2, 6))
    student.add_module("spare", nn.Linear(1, 1))
    student.forward = lambda x: nn.Sequential(student[0], student[1], student[2])(x)
    with pytest.raises(ValueError, match="did not run"):
        Distiller(teacher, hidden={"spare": "1"})(student, randn(2, 6))
    assert not any(m._forward_hooks for model in (teacher, student) for m in model.modules())
