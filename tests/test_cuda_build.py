"""The extension says whether it has CUDA kernels and why they cannot run; asking makes no CUDA context."""

from __future__ import annotations

import torch


def test_what_is_missing_is_said(extension):
    problem = extension.cuda_problem()
    if not extension.cuda_compiled():
        assert "FASTNN_CUDA=ON" in problem
    else:
        assert bool(problem) != torch.cuda.is_available()
    assert not torch.cuda.is_initialized()


def test_cuda_operators_are_registered_where_they_are_compiled_in(extension):
    for op in extension.ops():
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnn::{op}_fwd", "CUDA")
        assert has == extension.cuda_compiled()


def test_tf32_is_off_unless_handed_on(extension):
    assert extension.allow_tf32() is False
    extension.set_allow_tf32(True)
    assert extension.allow_tf32() is True
    extension.set_allow_tf32(False)
