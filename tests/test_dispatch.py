"""Which backend runs, who decides, what is said when it cannot, and what is recorded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastnn
from fastnn import KernelRun, _dispatch, _extension, testing
from fastnn.testing import best

ALL_SETS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]


def python(code, **environment):
    """Runs `code` in a new process; (status, stdout, stderr)."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTNN_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


WHAT_RAN = """
import warnings; warnings.simplefilter("ignore")
import torch, fastnn
with fastnn.record() as runs:
    fastnn.softmax(torch.randn(2, 3), -1)
print(*runs[0][1:], fastnn._extension._C.poison())
"""


def test_extension_is_there():
    """Everything about the kernels is skipped without it: its absence is a failure, once."""
    assert _extension._C is not None, _extension.missing


def test_every_op_has_its_kernels(extension):
    for op in extension.ops():
        assert _dispatch.why_not(op, "cpu", torch.device("cpu"), torch.float32) == ""


class TestInstructionSets:
    def test_all_are_compiled_in(self, extension):
        if os.uname().machine != "x86_64":
            pytest.skip(f"the x86 instruction sets; this is {os.uname().machine}")
        assert extension.isa_compiled() == ALL_SETS

    def test_the_best_is_chosen(self, extension):
        code, out, err = python(WHAT_RAN)
        assert code == 0, err
        assert out == f"cpu {extension.isa_supported()[-1]} False"

    def test_environment_forces_one(self, extension):
        for isa in extension.isa_supported():
            code, out, err = python(WHAT_RAN, FASTNN_ISA=isa)
            assert (code, out) == (0, f"cpu {isa} False"), err

    def test_unknown_one_in_the_environment(self, extension):
        """Whoever forces a set wants that one or none: the import is refused, not sent to the reference."""
        code, _, err = python("import torch, fastnn", FASTNN_ISA="sse9")
        assert code == 1
        last = err.splitlines()[-1]
        assert last.startswith("ValueError") and "FASTNN_ISA" in last and "sse9" in last and "scalar" in last

    def test_set_isa(self, extension):
        before = extension.isa()
        for isa in extension.isa_supported():
            extension.set_isa(isa)
            assert extension.isa() == isa
        extension.set_isa(None)
        assert extension.isa() == extension.isa_supported()[-1]
        extension.set_isa(before)

    @pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "scalar\0"])
    def test_set_isa_of_an_unknown_one(self, extension, name):
        before = extension.isa()
        with pytest.raises(ValueError, match="instruction set"):
            extension.set_isa(name)
        assert extension.isa() == before

    def test_set_isa_of_an_unsupported_one(self, extension):
        lacking = [isa for isa in extension.isa_compiled() if isa not in extension.isa_supported()]
        for isa in lacking:
            with pytest.raises(ValueError, match=isa):
                extension.set_isa(isa)


class TestPoison:
    def test_environment_turns_it_on(self, extension):
        assert python(WHAT_RAN, FASTNN_POISON="1")[1].endswith("True")
        assert python(WHAT_RAN, FASTNN_POISON="0")[1].endswith("False")

    def test_it_really_fills(self, extension):
        """A product over K = 0 without bias is zeros, written by the kernel: it may not be what was allocated."""
        with testing.poisoned():
            assert extension.poison()
            result = fastnn.linear(torch.empty(3, 0), torch.empty(4, 0))
        assert not extension.poison()
        assert torch.equal(result, torch.zeros(3, 4))

    def test_fresh_memory_is_nan(self, extension):
        """An empty packed buffer aside, linear_pack's padding is written; the gap a kernel leaves is not. Seen through
        a packed weight of no columns."""
        with testing.poisoned(), torch.no_grad():
            packed = torch.ops.fastnn.linear_pack(torch.ones(3, 4))
        assert not packed.isnan().any()


class TestUseBackend:
    def test_forces_and_restores(self):
        assert _dispatch.backend_in_force() is None
        with fastnn.use_backend("reference"):
            assert _dispatch.backend_in_force() == "reference"
            with fastnn.use_backend(None):
                assert _dispatch.backend_in_force() is None
            assert _dispatch.backend_in_force() == "reference"
        assert _dispatch.backend_in_force() is None

    def test_restores_after_an_error(self):
        with pytest.raises(KeyError), fastnn.use_backend("reference"):
            raise KeyError
        assert _dispatch.backend_in_force() is None

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"'cuda9'.*cpu, cuda, triton, reference"), fastnn.use_backend("cuda9"):
            pass

    def test_reference_runs(self):
        with fastnn.use_backend("reference"), fastnn.record() as runs:
            fastnn.softmax(torch.randn(3), 0)
        assert runs == [KernelRun("softmax_fwd", "reference", "")]

    @pytest.mark.parametrize(
        ("tensor", "reason"),
        [
            (torch.ones(2, 3, dtype=torch.float64), "float64"),
            (torch.ones(2, 3, device="meta"), "meta"),
        ],
    )
    @pytest.mark.parametrize("op", ["softmax", "log_softmax", "linear"])
    def test_forced_backend_that_cannot_run_says_why(self, op, tensor, reason, extension):
        def call():
            return fastnn.linear(tensor, tensor) if op == "linear" else getattr(fastnn, op)(tensor, -1)

        with fastnn.use_backend("cpu"), pytest.raises(NotImplementedError, match=f"'cpu'.*{reason}"):
            call()
        assert call().dtype == tensor.dtype  # unforced, the reference takes it

    def test_environment_forces_one(self):
        code, out, err = python(WHAT_RAN.replace("fastnn._extension._C.poison()", "''"), FASTNN_BACKEND="reference")
        assert (code, out) == (0, "reference"), err

    def test_unknown_one_in_the_environment(self):
        code, _, err = python("import fastnn", FASTNN_BACKEND="gpu")
        assert code == 1 and "ValueError" in err and "'gpu'" in err


class TestWithoutExtension:
    """As on a machine where it does not load."""

    HIDE = "import sys; sys.modules['fastnn._C'] = None\nimport torch, fastnn, warnings\n"

    def test_warns_once_and_computes(self):
        code, out, err = python(self.HIDE + "for _ in range(3): print(fastnn.softmax(torch.zeros(2), 0).tolist())")
        assert (code, out) == (0, "\n".join(["[0.5, 0.5]"] * 3)), err
        assert err.count("RuntimeWarning") == 1 and "fastnn._C" in err

    def test_forced_kernel_says_why(self):
        code, _, err = python(self.HIDE + "with fastnn.use_backend('cpu'): fastnn.softmax(torch.zeros(2), 0)")
        assert code == 1 and "NotImplementedError" in err and "could not be imported" in err


class TestRecord:
    def test_kernels_in_order(self, extension):
        x = torch.randn(3, 4, requires_grad=True)
        with fastnn.record() as runs:
            fastnn.log_softmax(fastnn.linear(x, torch.randn(5, 4)), -1).sum().backward()
        isa = extension.isa()
        kernels = ["linear_fwd", "softmax_fwd", "softmax_bwd", "linear_bwd"]
        assert runs == [KernelRun(kernel, "cpu", isa) for kernel in kernels]

    def test_nothing_outside(self, extension):
        fastnn.softmax(torch.randn(3), 0)
        with fastnn.record() as runs:
            pass
        fastnn.softmax(torch.randn(3), 0)
        assert runs == []

    def test_does_not_nest(self):
        with fastnn.record(), pytest.raises(RuntimeError, match="nest"), fastnn.record():
            pass
        with fastnn.record() as runs:
            fastnn.softmax(torch.randn(3), 0)
        assert len(runs) == 1

    def test_ends_with_an_error(self):
        with pytest.raises(KeyError), fastnn.record():
            raise KeyError
        with fastnn.record() as runs:
            fastnn.softmax(torch.randn(3), 0)
        assert len(runs) == 1

    def test_sees_all_threads(self):
        def work():
            for _ in range(10):
                fastnn.softmax(torch.randn(3), 0)

        workers = [threading.Thread(target=work) for _ in range(4)]
        with fastnn.record() as runs:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert len(runs) == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_chosen_by_themselves(dtype, extension):
    with fastnn.record() as runs:
        fastnn.softmax(torch.randn(3, 4, dtype=dtype), -1)
        fastnn.linear(torch.randn(3, 4, dtype=dtype), torch.randn(2, 4, dtype=dtype))
    assert {(run.backend, run.isa) for run in runs} == {(best().backend, best().isa)}


def test_profiler_shows_the_operators(extension):
    x = torch.randn(3, 4, requires_grad=True)
    with torch.profiler.profile() as profile:
        fastnn.softmax(fastnn.linear(x, torch.randn(5, 4)), -1).sum().backward()
        with torch.no_grad():
            layer = fastnn.nn.Linear(4, 5).freeze().eval()
            layer(x)
    names = {event.key for event in profile.key_averages()}
    kernels = ("softmax_fwd", "softmax_bwd", "linear_fwd", "linear_bwd", "linear_pack", "linear_packed_fwd")
    assert {f"fastnn::{kernel}" for kernel in kernels} <= names
