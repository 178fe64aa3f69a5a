"""The CUDA kernels, run on the CPU by tests/cuda_emu: the cells of the matrix, thread orders, bytes moved."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastnn import testing
from fastnn.ops.activation import ACTIVATION_CODE
from fastnn.testing import DTYPES, LAYOUTS, cases

sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))
import emulated_ops as emulated
from emulated_ops import Emulated

pytestmark = pytest.mark.skipif(shutil.which(emulated.COMPILER) is None, reason="needs a C++ compiler")
FORWARD = Emulated()
OTHERS = (Emulated(order="reverse", early=True), Emulated(order="random:7"))
ROW_OPS = ("softmax", "cross_entropy", "norm", "activation")


@pytest.fixture(scope="module", autouse=True)
def library():
    return emulated.library()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", emulated.OPS)
def test_cell(op, dtype, layout):
    taken = [case for case in cases(op) if case.layout == layout and not case.wide and FORWARD.takes(case)]
    assert taken, "an empty cell"
    for case in taken:
        testing.check(case, dtype, FORWARD)


def test_the_emulated_library_has_the_ops_of_csrc_cuda():
    assert {*ROW_OPS, "linear", "attention"} <= set(emulated.OPS)


def _results(case, dtype, target):
    inputs = case.inputs(DTYPES[dtype])
    leaves = {name: t.detach().requires_grad_(name in case.differentiable) for name, t in inputs.items()}
    with target.forced():
        output = case.call(leaves)
        torch.manual_seed(0)
        wanted = [leaves[name] for name in case.differentiable]
        gradients = torch.autograd.grad(output, wanted, torch.randn_like(output)) if wanted else ()
    return [output.detach(), *gradients]


@pytest.mark.parametrize("op", ROW_OPS)
def test_no_order_of_threads_shows(op):
    """Every case in bfloat16, in three orders: equal bits."""
    for case in cases(op):
        if case.wide or not FORWARD.takes(case):
            continue
        first = _results(case, "bf16", FORWARD)
        for target in OTHERS:
            for one, other in zip(first, _results(case, "bf16", target), strict=True):
                assert testing.same_bits(one, other), f"{case.op}/{case.name} differs in {target}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ROW_OPS)
def test_wide(op, dtype):
    for case in cases(op):
        if case.wide and FORWARD.takes(case):
            testing.check(case, dtype, FORWARD)


def _moved(call):
    """(bytes of global memory that a call moves, share of them in accesses of 16 bytes)."""
    emulated.counters()
    with FORWARD.forced():
        call()
    found = emulated.counters()
    moved = found["loaded"] + found["stored"]
    return moved, 16 * found["wide"] / moved


@pytest.mark.parametrize("columns", [256, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_move_what_they_must(dtype, columns):
    """Within 5 % of reading each input and writing each output once, in accesses of 16 bytes."""
    own = DTYPES[dtype]
    rows, size = 8, DTYPES[dtype].itemsize
    x, g, w = torch.randn(rows, columns).to(own), torch.randn(rows, columns).to(own), torch.randn(columns).to(own)
    target = torch.randint(columns, (rows,))
    raw = torch.ops.fastnn_emu
    with torch.no_grad():
        y = raw.softmax_fwd(x, -1, False, None)
        _, stats, divisors = raw.cross_entropy_fwd(x, target, None, 1, -100, 0.0, 0.0, 0.0)
        moments = raw.norm_fwd(x, None, w, w, 1, 1e-5, False, True)[2]
        one = torch.ones((), dtype=own)
        both = torch.cat([x, g], -1)
        silu = ACTIVATION_CODE["silu"]
        calls = {
            "softmax_fwd": (2, lambda: raw.softmax_fwd(x, -1, False, None)),
            "softmax_bwd": (3, lambda: raw.softmax_bwd(g, y, -1, False, own)),
            "norm_fwd": (2, lambda: raw.norm_fwd(x, None, w, w, 1, 1e-5, False, True)),
            "add_norm_fwd": (4, lambda: raw.norm_fwd(x, g, w, w, 1, 1e-5, False, True)),
            "norm_bwd_dx": (3, lambda: raw.norm_bwd(g, None, x, w, moments, 1, False, own, [True, False, False])),
            "activation_fwd": (2, lambda: raw.activation_fwd(x, None, w, silu, False)),
            "glu_fwd": (3, lambda: raw.activation_fwd(x, g, None, silu, False)),
            "packed_glu_fwd": (3, lambda: raw.activation_fwd(both, None, None, silu, True)),
            "activation_bwd": (3, lambda: raw.activation_bwd(g, x, None, w, silu, False, [True, False, False])),
            "glu_bwd": (5, lambda: raw.activation_bwd(g, x, x, None, silu, False, [True, True, False])),
            "packed_glu_bwd": (5, lambda: raw.activation_bwd(g, both, None, None, silu, True, [True, False, False])),
            "cross_entropy_fwd": (1, lambda: raw.cross_entropy_fwd(x, target, None, 1, -100, 0.0, 0.0, 0.0)),
            "cross_entropy_bwd": (
                2,
                lambda: raw.cross_entropy_bwd(one, x, target, None, stats, divisors, 1, -100, 0.0, 0.0, 0.0),
            ),
        }
        for name, (tensors, call) in calls.items():
            moved, wide = _moved(call)
            least = tensors * rows * columns * size + 64 * rows  # and statistics, losses, targets
            assert moved <= 1.05 * least, f"{name}: {moved} bytes, {moved / least:.3f} of what it must"
            if columns >= 1024:
                assert wide >= 0.95, f"{name}: {wide:.1%} of the bytes in accesses of 16 bytes"


@pytest.mark.parametrize("path", sorted(emulated.ROOT.glob("csrc/cuda/*.cu*")), ids=lambda path: path.name)
def test_nvcc_and_the_emulator_see_one_body(path):
    """Only the two headers that say how a macro or an instruction is done look at who compiles."""
    conditionals = re.findall(r"^\s*#\s*(?:if|elif|else|ifdef|ifndef)\b.*", path.read_text(), re.MULTILINE)
    if path.name not in ("common.cuh", "ptx.cuh"):
        assert not conditionals, f"{path.name}: {conditionals}"
    assert not re.search(r"__CUDA_ARCH__", path.read_text())
