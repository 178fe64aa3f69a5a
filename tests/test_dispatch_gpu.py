"""The rules by which a call on GPU tensors gets its backend, on tensors without memory: no GPU, no Triton needed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastnn
from fastnn import _dispatch, testing

OPS = tuple(_dispatch.GPU_PREFERENCE)


def on_gpu(*shape, dtype=torch.bfloat16):
    with FakeTensorMode():
        return torch.empty(*shape, device="cuda", dtype=dtype)


@pytest.fixture
def machine(monkeypatch):
    """`machine(backends, ...)` makes this process believe in such an installation and GPU."""

    def make(*backends, hip=None, wide_products=False, too_old=""):
        kernels = _dispatch.Kernels(len, len)  # never called
        monkeypatch.setattr(_dispatch, "KERNELS", {op: dict.fromkeys(("cpu", *backends), kernels) for op in OPS})
        monkeypatch.setattr(_dispatch, "_triton_missing", "" if "triton" in backends else "no Triton here")
        monkeypatch.setattr(_dispatch, "_triton_interprets", False)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(_dispatch, "_has_wide_products", lambda index: wide_products)
        monkeypatch.setattr(_dispatch, "_too_old", lambda index: too_old)

    return make


def test_the_table_is_of_ops_and_backends():
    assert set(OPS) <= set(testing.op_names()) and set(_dispatch.TRITON_FROM) <= set(OPS)
    assert all(sorted(backends) == ["cuda", "triton"] for backends in _dispatch.GPU_PREFERENCE.values())


@pytest.mark.parametrize("op", OPS)
class TestRule:
    def test_the_table_decides_between_two(self, op, machine):
        machine("cuda", "triton")
        assert _dispatch.pick(op, on_gpu(16, 64)) == _dispatch.GPU_PREFERENCE[op][0]

    @pytest.mark.parametrize("only", ["cuda", "triton"])
    def test_one_alone_is_taken(self, op, only, machine):
        machine(only)
        assert _dispatch.pick(op, on_gpu(16, 64)) == only

    def test_without_kernels_the_reference_runs(self, op, machine):
        machine()
        assert _dispatch.pick(op, on_gpu(16, 64)) == "reference"

    def test_amd_takes_triton(self, op, machine):
        machine("cuda", "triton", hip="7.0", wide_products=True)
        assert _dispatch.order(op, "cuda") == ("triton",)
        for rows in (16, 1 << 18):
            assert _dispatch.pick(op, on_gpu(rows, 64)) == "triton"

    def test_amd_without_triton_takes_the_reference(self, op, machine):
        machine("cuda", hip="7.0")
        assert _dispatch.pick(op, on_gpu(16, 64)) == "reference"

    def test_large_products_on_hopper_and_blackwell_take_triton(self, op, machine):
        first = _dispatch.GPU_PREFERENCE[op][0]
        least = _dispatch.TRITON_FROM.get(op, 1 << 23)
        for wide_products in (False, True):
            machine("cuda", "triton", wide_products=wide_products)
            large = "triton" if wide_products and op in _dispatch.TRITON_FROM else first
            assert _dispatch.pick(op, on_gpu(least // 64 - 1, 64)) == first
            assert _dispatch.pick(op, on_gpu(least // 64, 64)) == large
        machine("cuda", wide_products=True)
        assert _dispatch.pick(op, on_gpu(least // 64, 64)) == "cuda"

    def test_other_types_and_old_gpus_take_the_reference(self, op, machine):
        machine("cuda", "triton")
        assert _dispatch.pick(op, on_gpu(16, 64, dtype=torch.float64)) == "reference"
        machine("cuda", "triton", too_old="the GPU's compute capability is 7.5, the kernels need 8.0")
        assert _dispatch.pick(op, on_gpu(16, 64)) == "reference"

    def test_transforms_take_the_reference(self, op, machine):
        machine("cuda", "triton")
        x = on_gpu(16, 64)
        picked = []
        torch.func.vmap(lambda row: picked.append(_dispatch.pick(op, x)) or row)(torch.ones(2))
        assert picked == ["reference"]

    @pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
    def test_one_is_forced(self, op, backend, machine):
        machine("cuda", "triton", wide_products=True)
        with fastnn.use_backend(backend):
            for rows in (16, 1 << 18):
                assert _dispatch.pick(op, on_gpu(rows, 64)) == backend

    @pytest.mark.parametrize(
        ("backend", "having", "reason"),
        [
            ("cpu", ("cuda", "triton"), "the tensors are on cuda"),
            ("cuda", ("triton",), "no CUDA kernels|could not be imported"),
            ("triton", ("cuda",), "no Triton here"),
        ],
    )
    def test_forced_it_does_not_fall_back(self, op, backend, having, reason, machine):
        machine(*having)
        with fastnn.use_backend(backend), pytest.raises(NotImplementedError, match=f"'{backend}' was asked.*{reason}"):
            _dispatch.pick(op, on_gpu(16, 64))


def test_forced_on_an_old_gpu_it_says_why(machine):
    machine("cuda", "triton", too_old="the GPU's compute capability is 7.5, the kernels need 8.0")
    with fastnn.use_backend("triton"), pytest.raises(NotImplementedError, match=r"capability is 7\.5"):
        _dispatch.pick("softmax", on_gpu(16, 64))
