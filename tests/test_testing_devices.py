"""Inputs on other devices keep what a case is about: their memory layout. Unwritten memory is poisoned everywhere."""

from __future__ import annotations

import pytest
import torch

from fastnn import testing
from fastnn.testing.devices import copied, memory, on_device, synchronize
from fastnn.testing.inputs import ARRANGE, arrange
from fastnn.testing.poison import poisoned
from fastnn.testing.targets import Target, targets, unavailable


@pytest.mark.parametrize("layout", ARRANGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_a_copy_has_the_layout_the_values_and_the_gaps(layout, dtype):
    t = arrange((torch.randn(4, 6) * 3).to(dtype), layout)
    (found,) = copied({"t": t}, "cpu").values()
    assert (found.shape, found.stride(), found.storage_offset()) == (t.shape, t.stride(), t.storage_offset())
    assert found.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()
    assert testing.same_bits(memory(found), memory(t)) and testing.same_bits(found, t)


def test_what_shares_memory_shares_it_again():
    base = torch.randn(3, 4)
    found = copied({"a": base, "b": base.t(), "c": base.clone()}, "cpu")
    assert found["a"].data_ptr() == found["b"].data_ptr() != found["c"].data_ptr()


def test_nothing_is_copied_to_where_it_is():
    given = {"t": torch.randn(3)}
    assert on_device(given, "cpu")["t"] is given["t"]
    synchronize("cpu")


def test_empty_tensors_and_scalars():
    found = copied({"empty": torch.empty(0, 3), "scalar": torch.tensor(4)}, "cpu")
    assert found["empty"].shape == (0, 3) and found["scalar"].item() == 4


def test_targets_of_gpus_are_there_or_say_why_not():
    found = {target.backend for target in (*targets("cuda"), *unavailable("cuda"))}
    assert {"cuda", "triton"} <= found
    if not torch.cuda.is_available():
        assert targets("cuda") == () and set(unavailable("cuda").values()) == {"torch sees no GPU"}
    names = [str(Target(backend, device="cuda")) for backend in ("cuda", "triton", "reference")]
    assert names == ["cuda", "triton-cuda", "reference-cuda"]


def test_poison_fills_what_python_code_allocates():
    x = torch.zeros(3)
    with poisoned():
        found = [torch.empty(2, 3), torch.empty_like(x), torch.empty_strided((2, 2), (2, 1)), x.new_empty((4,))]
        assert all(t.isnan().all() for t in found)
        assert (torch.empty(3, dtype=torch.int64) == -7).all() and torch.empty(2, dtype=torch.bool).all()
        assert (torch.empty(3, dtype=torch.uint8) == 249).all()
        wanted = torch.empty(2, requires_grad=True)
        assert wanted.isnan().all() and wanted.requires_grad
    assert "new_empty" not in vars(torch.Tensor) and not hasattr(torch.empty, "__wrapped__")
