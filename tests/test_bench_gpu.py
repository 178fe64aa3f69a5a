"""The benchmark of GPUs as far as it can be tested without one: rows, clock, ways with a forced backend, tables."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastnn import _dispatch, cli
from fastnn.bench import campaign, documents, gpu_limits, gpu_machine, gpu_tables, worker
from fastnn.bench.allocators import PLAIN
from fastnn.bench.campaign import BadOptions, Options, plan
from fastnn.bench.contenders import CONTENDERS
from fastnn.bench.contenders import Ours as OurContender
from fastnn.bench.gpu_clock import GpuClock
from fastnn.bench.gpu_engines import Liger
from fastnn.bench.limits import Bound
from fastnn.bench.results import Result, case_to_json, load
from fastnn.bench.session import Entrant, Measured, Record
from fastnn.bench.verdict import Verdict
from fastnn.bench.worker import Worker, check_kernel
from fastnn.testing.bench_cases import Ours, Work, bench_cases, families, find_bench_case, on_gpu
from fastnn.testing.targets import GPU_BACKENDS

WITHOUT_GPU_KERNELS = {"decode", "linear_ce", "linear_quant", "mlp", "rope", "sparse"}
ROWS = [case for family in families() for case in bench_cases(family, "cuda")]
GPU = {"name": "A GPU", "driver": "580.1", "cuda": "13.0", "hip": "", "capability": "9.0"}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


# ---- rows


def test_every_family_has_rows_for_gpus():
    assert {case.family for case in ROWS} == set(families()) - WITHOUT_GPU_KERNELS
    assert {case.direction for case in ROWS} == {"fwd", "bwd", "fb"}
    for case in ROWS:
        assert case.device == "cuda" and case.id.endswith(" on cuda") and find_bench_case(case.id) is case
        assert [way.backend for way in case.ours] == [way.label for way in case.ours] == list(GPU_BACKENDS)
        assert all(way.bar.plain is None for way in case.ours)
        assert not case.constants and not case.onnx and not case.sweep
        assert all(who.why_not(case) or "cuda" in who.devices for who in CONTENDERS.values() if who.devices != ("cpu",))


def small(row: str, *shape: int):
    """A row of GPUs, small and on the CPU."""
    (case,) = [c for c in bench_cases("softmax") if c.row == row and c.shape == shape]
    return replace(on_gpu(case), device="cpu")


@pytest.mark.parametrize("name", ["relu", "gelu_tanh"])
def test_torchs_fused_layer_computes_the_row(name):
    row = next(case for case in ROWS if case.name == f"linear+{name}")
    case = replace(row, device="cpu", make=lambda dtype, generator: {
        "input": torch.randn(3, 5), "weight": torch.randn(4, 5), "bias": torch.randn(4)
    })  # fmt: skip
    inputs = case.inputs()
    torch.testing.assert_close(case.run(case.by_hand, inputs), case.run(case.torch_call, inputs), atol=1e-3, rtol=1e-3)


# ---- the clock


class Device:
    """What `torch.cuda` answers, on a clock that each call moves by a millisecond."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 10)

    def Event(self, enable_timing):
        assert enable_timing
        owner = self

        class Event:
            def record(self):
                self.at = owner.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()

    def synchronize(self):
        self.log.append("synchronize")

    def _sleep(self, cycles):
        assert cycles > 0

    def empty_cache(self):
        self.log.append("empty")

    def reset_peak_memory_stats(self):
        self.log.append("reset")

    def memory_allocated(self):
        return 100

    def max_memory_allocated(self):
        return 164

    def call(self):
        self.now += 1e-3


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def clock(device):
    return GpuClock("cpu", device)


def test_the_clock_gives_the_median_by_events(clock, device):
    durations = iter([9.0, 5.0, 1.0, 2.0])  # the first is not timed

    def call():
        device.now += next(durations)

    found = clock.timed(call, 3)
    assert found.seconds == pytest.approx(2.0) and found.idle == 0 and 0 <= found.host < 1
    assert device.log == ["synchronize"] * 3
    assert clock.extra_memory(device.call) == 64


def test_a_worker_forces_the_backend_of_each_way(clock, device, monkeypatch, extension):
    case = small("softmax_fwd/fp32", 64, 128)
    ways = (Ours("cpu", case.ours[0].prepare, "softmax_fwd", backend="cpu"), *case.ours[:1])
    monkeypatch.setattr(worker, "find_bench_case", lambda id: replace(case, ours=ways))
    forced = []

    def watched(call, count):
        forced.append(_dispatch.backend_in_force())
        call()
        device.call()
        return worker.Sample(1e-3, 0.0, 1e-5)

    monkeypatch.setattr(clock, "timed", watched)
    here = Worker(1, PLAIN, "cuda", clock)
    found = here.open(case.id, ["fastnn cpu", "fastnn cuda", "eager"], 0.01, True)
    assert found["fastnn cpu"]["count"] == 10 and found["fastnn cpu"]["memory"] == 64
    assert forced[-1] is None and "cpu" in forced  # eager came last
    if "cuda" not in _dispatch.KERNELS["softmax"]:
        assert found["fastnn cuda"] == {"refused": _dispatch.why_no_kernel("softmax", "cuda")}
    answer = here.sample("fastnn cpu", 3)
    assert answer == {"seconds": 1e-3, "idle": 0.0, "host": 1e-5} and forced[-1] == "cpu"
    assert _dispatch.backend_in_force() is None
    here.close()
    assert "empty" in device.log


def test_a_way_that_ran_on_another_backend_is_found(extension):
    case = small("softmax_fwd/fp32", 64, 128)
    way = Ours("cpu", case.ours[0].prepare, "softmax_fwd", backend="cpu")
    case = replace(case, ours=(way,))
    who = OurContender("cpu")
    runner = who.prepare(case, case.inputs(), 1, PLAIN)
    with _dispatch.use_backend("reference"):
        assert "softmax_fwd on reference" in check_kernel(case, who, runner)
    with runner.around():
        assert check_kernel(case, who, runner) == ""


def test_the_backward_row_runs_the_kernel_of_the_backend_in_force(extension):
    case = next(c for c in bench_cases("softmax") if c.name == "softmax_bwd")
    x = {"grad": torch.randn(3, 5), "output": torch.softmax(torch.randn(3, 5), -1)}
    (found,) = case.ours[0].prepare(x)()
    torch.testing.assert_close(found, case.torch_call(x))
    with _dispatch.use_backend("reference"), pytest.raises(KeyError):
        case.ours[0].prepare(x)


# ---- who takes part


def test_contenders_are_those_of_the_device(monkeypatch):
    monkeypatch.setattr(campaign, "why_no_gpu", lambda: "")
    found = plan(Options(device="cuda"))
    assert found.settings == (PLAIN,)
    assert {"eager", "by_hand", "compile"} <= {*found.contenders, *found.missing} and "openvino" not in found.missing
    assert {"liger", "flash_attn"} <= {*found.contenders, *found.missing}
    entrants, refused = found.entrants(next(c for c in ROWS if c.row == "softmax_fwd/bf16"))
    assert [entrant.label for entrant in entrants[:3]] == ["fastnn cuda", "fastnn triton", "eager"]
    assert "by_hand" in refused
    assert {case.family for case in plan(Options(device="cuda", quick=True)).cases} == {case.family for case in ROWS}
    with pytest.raises(BadOptions, match="unknown contender 'openvino'; known: eager"):
        plan(Options(device="cuda", contenders=("openvino",)))
    with pytest.raises(BadOptions, match="no sweep"):
        plan(Options(device="cuda", sweep=True))
    assert "liger" not in plan(Options()).missing


def test_a_missing_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda", "--quick"]) == 2
    assert "device cuda: torch" in capsys.readouterr().err
    assert cli.main(["bench", "limits", "--device", "cuda"]) == 2
    assert "no GPU to measure" in capsys.readouterr().err
    with pytest.raises(BadOptions, match="device must be cpu or cuda, got 'tpu'"):
        plan(Options(device="tpu"))


def test_what_torch_compile_leaves_is_in_a_process_of_its_own():
    ours, eager, compiled = (Entrant(name, PLAIN) for name in ("fastnn cuda", "eager", "compile"))
    assert ours.process(1, "cuda") == eager.process(1, "cuda") != compiled.process(1, "cuda")
    assert eager.process(4, "cuda") == eager.process(1, "cuda")


def test_liger_is_judged_on_fresh_inputs(monkeypatch):
    """Its cross-entropy writes the gradient over the logits."""

    def softmax(x):
        found = torch.softmax(x, -1)
        x.zero_()
        return found

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(liger_softmax=softmax))
    case = small("softmax_fwd/fp32", 64, 128)
    inputs = case.inputs()
    runner = Liger().prepare(case, inputs, 1, PLAIN)
    runner.call()
    for _ in range(2):
        torch.testing.assert_close(runner.results(), case.run(case.torch_call, inputs))
    assert "no function" in Liger().why_not(next(c for c in ROWS if c.family == "attention"))


# ---- limits


def test_limits_are_the_best_of_each_kind():
    found = gpu_limits.measure("cpu", lambda call: (call(), 1e-3)[1])
    assert set(found.memory) == {"read", "copy", "write"} and set(found.peak) == set(gpu_limits.UNITS)
    assert found.memory["copy"] == 2 * found.memory["read"] == 2 * (1 << 16) / 1e-3
    assert not torch.backends.cuda.matmul.allow_tf32
    assert gpu_limits.GpuLimits.from_json(found.to_json()) == found
    with pytest.raises(KeyError):
        gpu_limits.GpuLimits.from_json({**found.to_json(), "format": 0})


def test_the_bound_is_the_longer_of_bytes_and_operations():
    limits = gpu_limits.GpuLimits("m", GPU, {"fp32": 1e12, "bf16": 8e12}, {"read": 1e12, "copy": 1e12, "write": 1e12})
    assert limits.bound(Work(10**9, 10**9, 0)) == Bound(2e-3, "memory")
    assert limits.bound(Work(1, 1, 8 * 10**12, "bf16")) == Bound(1.0, "bf16 operations")
    assert limits.bound(Work(1, 1, 10**12, "int8")).seconds == 1.0  # a unit without a rate of its own


def test_limits_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits = gpu_limits.GpuLimits("key", GPU, {"fp32": 1.0}, {"read": 1.0, "copy": 1.0, "write": 1.0})
    calls = []
    monkeypatch.setattr(gpu_limits, "gpu_key", lambda: "key")
    monkeypatch.setattr(gpu_limits, "measure", lambda: (calls.append(1), limits)[1])
    for _ in range(2):
        assert gpu_limits.gpu_limits() == limits
    assert len(calls) == 1
    gpu_limits.gpu_limits(fresh=True)
    assert len(calls) == 2


def test_the_drivers_version(monkeypatch, tmp_path):
    path = tmp_path / "version"
    monkeypatch.setattr(gpu_machine, "_DRIVER", path)
    assert gpu_machine.driver_version() == ""
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n")
    assert gpu_machine.driver_version() == "580.159.04"


# ---- results


def times(milliseconds: float) -> Record:
    return Record(
        PLAIN, False, "fresh", 1, 1, [milliseconds * 1e-3 * (1 + 0.01 * (i % 3 - 1)) for i in range(21)], 0, 1e-5
    )


def result(**records: Record) -> Result:
    case = next(c for c in ROWS if c.row == "softmax_fwd/bf16")
    labels = {name.replace("_", " "): one for name, one in records.items()}
    measured = Measured(labels, {"fastnn triton": "no Triton"} if "fastnn_triton" not in records else {}, {})
    limits = gpu_limits.GpuLimits("m", GPU, {"fp32": 5e13}, {"read": 3e12, "copy": 3e12, "write": 3e12})
    return Result(
        machine={"cpu": "A", "gpu": GPU, "cores": 2, "isa": "avx2"},
        versions={"torch": "2.11.0", "fastnn": "0.1.0"},
        commit="abc",
        date="2026-01-02 03:04 UTC",
        method={"threads": 1, "bars": False, "quick": False, "sweep": False, "device": "cuda"},
        limits=limits.to_json(),
        missing={"liger": "not installed: pip install liger-kernel"},
        cases=[case_to_json(case, Bound(1e-3, "memory"), measured)],
        complete=True,
    )


def test_backends_are_columns():
    found = result(fastnn_cuda=times(2.0), fastnn_triton=times(1.25), eager=times(2.5), compile=times(2.0))
    (line,) = gpu_tables.lines(found)
    text = gpu_tables.cells(line, gpu_tables.labels_of(found))
    assert text[:5] == ["softmax_fwd/bf16", "49152x512", "2 ms", "1.25 ms", "compile 2 ms"]
    assert (
        text[5].startswith("1.00 (")
        and text[6].startswith("1.60 (")
        and text[7:] == ["1 ms memory", "80 %", "10 / 10 / 10"]
    )
    assert line.verdict is Verdict.LEVEL
    assert "A GPU, driver 580.1, CUDA 13.0, torch 2.11.0" in gpu_tables.markdown(found)
    assert "memory read 3.00, copy 3.00, write 3.00 TB/s" in gpu_tables.markdown(found)
    assert found.cases[0]["entrants"]["eager"]["host"] == 1e-5
    pytest.importorskip("rich")
    assert gpu_tables.rows_table(found).row_count == 1


def test_the_verdict_is_the_faster_ways():
    (line,) = gpu_tables.lines(result(fastnn_cuda=times(2.0), fastnn_triton=times(9.0), eager=times(2.2)))
    assert line.verdict is Verdict.LEVEL and line.ways["triton"].verdict is Verdict.BEHIND
    (line,) = gpu_tables.lines(result(fastnn_cuda=times(3.0), eager=times(2.2)))
    assert line.verdict is Verdict.BEHIND and "-" in gpu_tables.cells(line, ["cuda", "triton"])
    (line,) = gpu_tables.lines(result(eager=times(2.2)))
    assert line.verdict is None and gpu_tables.verdict_text(line) == "not measured"
    assert "fastnn triton on softmax_fwd/bf16 (49152, 512) on cuda gave no time: no Triton" in gpu_tables.footer(
        result(eager=times(2.2))
    )
    assert "eager 2.2 ms" in gpu_tables.cells(line, ["cuda", "triton"])
    assert any(line.startswith("liger: not installed") for line in gpu_tables.footer(result(eager=times(1.0))))


def test_documents_hold_them(tmp_path: Path):
    source, document = tmp_path / "r.json", tmp_path / "d.md"
    result(fastnn_cuda=times(2.0), eager=times(2.2)).save(source)
    document.write_text("# T\n" + "\n\n".join(documents.markers("rows")) + "\n")
    documents.write(document, [source])
    assert "| softmax_fwd/bf16 | 49152x512 | 2 ms |" in document.read_text()
    assert documents.problem_with(document, tmp_path) == ""
    assert load(source).rows()[0].verdict is Verdict.LEVEL
    pytest.importorskip("rich")
    assert cli.main(["bench", "--from", str(source)]) == 0
