"""Process state every test starts from and must leave behind."""

from __future__ import annotations

import pytest
import torch

from fastnn import _dispatch, _extension

torch.set_num_threads(1)  # tests that are about threads set their own number


def _state() -> dict[str, object]:
    extension = _extension._C
    return {
        "backend": _dispatch.backend_in_force(),
        "isa": extension and extension.isa(),
        "poison": extension and extension.poison(),
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.fixture(autouse=True)
def process_state_is_left_alone():
    before = _state()
    yield
    after = _state()
    if after != before:
        torch.set_num_threads(1)
        if _extension._C is not None:
            _extension._C.set_isa(before["isa"])
            _extension._C.set_poison(before["poison"])
    assert after == before, "the test changed the state of the process"


@pytest.fixture
def extension():
    """The compiled extension; skips where there is none."""
    if _extension._C is None:
        pytest.skip(_extension.missing)
    return _extension._C
