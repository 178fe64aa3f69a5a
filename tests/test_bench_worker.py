"""The worker and the session: the gate, the interleaving, and what happens when a contender fails."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from fastnn.bench import contenders, session, worker
from fastnn.bench.allocators import PLAIN, SETTINGS, TUNED, environment, owned
from fastnn.bench.contenders import CONTENDERS, Contender, Runner
from fastnn.bench.machine import idlest_cpus
from fastnn.bench.session import Entrant, Measured, Record, Session, WorkerDied, WorkerProcess
from fastnn.bench.worker import Worker, calibrate, extra_memory, sample, settle, timed
from fastnn.testing.bench_cases import find_bench_case

pytestmark = pytest.mark.alone  # measures time

FWD = "softmax_fwd/fp32 (64, 128)"
FB = "linear+gelu_tanh_fb/fp32 (16, 100, 10)"


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def one_of(monkeypatch):
    """Adds a contender whose results are the eager ones, put through a function."""

    def add(change, packages=()):
        class Other(Contender):
            name = "other"

            def prepare(self, case, inputs, threads, setting):
                def call():
                    return tuple(change(t) for t in case.run(case.torch_call, inputs))

                return Runner(call, call)

        Other.packages = packages
        monkeypatch.setitem(CONTENDERS, "other", Other())

    return add


def opened(case: str, *names: str) -> dict:
    return Worker(1, PLAIN).open(case, list(names), 0.0005, True)


@pytest.mark.parametrize("case", [FWD, FB])
def test_the_right_take_part(case, extension):
    found = opened(case, "fastnn", "eager")
    assert all(answer["count"] >= 1 and answer["output"] == "fresh" for answer in found.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 1.001,
        lambda t: torch.full_like(t, float("nan")),
        lambda t: t.flatten(),
        lambda t: t.double(),
        lambda t: torch.cat([t[:-1], t[-1:] + 1e-3]),
    ],
    ids=["scaled", "nan", "shape", "dtype", "last"],
)
def test_the_wrong_get_no_time(one_of, change):
    one_of(change)
    found = opened(FWD, "other", "eager")
    assert "count" not in found["other"] and FWD in found["other"]["wrong"]
    assert "count" in found["eager"]
    with pytest.raises(KeyError):
        runs = Worker(1, PLAIN)
        runs.open(FWD, ["other"], 0.0005, True)
        runs.sample("other", 1)


def test_a_missing_gradient_is_wrong(one_of, monkeypatch):
    one_of(lambda t: t)
    case = find_bench_case(FB)
    truth = case.run(case.torch_call, case.inputs())
    with pytest.raises(worker.BudgetError, match="2 results instead of 4"):
        worker.check(case, truth[:2], truth, truth, "other")


def test_ours_on_the_reference_gets_no_time(extension):
    import fastnn

    with fastnn.use_backend("reference"):
        found = opened(FWD, "fastnn")
    assert "softmax_fwd did not run" in found["fastnn"]["wrong"]


def test_what_a_contender_raises_is_its_reason(one_of):
    def broken(t):
        raise ArithmeticError("no such luck")

    one_of(broken)
    found = opened(FWD, "other", "eager", "eager_out")
    assert found["other"] == {"refused": "ArithmeticError: no such luck"}
    assert found["eager_out"]["output"] == "reused"


def test_large_results_are_compared_in_slices(monkeypatch):
    monkeypatch.setattr(worker, "_SLICE", 1000)
    case = find_bench_case(FWD)
    inputs = case.inputs()
    truth, rival = worker.truth_of(case, inputs), case.run(case.torch_call, inputs)
    worker.check(case, rival, truth, rival, "other")
    spoilt = rival[0].clone()
    spoilt[-1, -1] += 1e-4
    with pytest.raises(worker.BudgetError):
        worker.check(case, (spoilt,), truth, rival, "other")


def test_timing():
    calls = []

    def call():
        calls.append(time.perf_counter())
        time.sleep(0.002)

    found = timed(call, 5)
    assert len(calls) == 5 and 0.002 <= found.seconds <= 0.02
    assert found.idle > 0.5  # asleep, so not running
    before = len(calls)
    sample(call, 3, 1, warm=True)
    assert len(calls) - before == 1 + 3 * 4  # once to warm up; interrupted, so three more tries
    before = len(calls)
    sample(call, 3, 2, warm=False)
    assert len(calls) - before == 3  # several threads may wait for each other
    settle(call)
    count, once = calibrate(call, 0.02)
    assert 1 <= count <= 10 and once >= 0.002


def test_extra_memory_counts_the_result():
    megabytes = 64
    x = torch.zeros(megabytes << 18)
    found = extra_memory(lambda: x + 1)
    if found is None:
        pytest.skip("the system does not tell how far a process grew")
    assert 0.9 * (megabytes << 20) <= found <= 1.5 * (megabytes << 20)


def test_allocator_settings_are_the_environment_alone():
    base = {"HOME": "/", "GLIBC_TUNABLES": "x", "MALLOC_ARENA_MAX": "1", "THP_MEM_ALLOC_ENABLE": "1"}
    assert environment(SETTINGS[PLAIN], base) == {"HOME": "/"}
    tuned = environment(SETTINGS[TUNED], base)
    assert "glibc.malloc.hugetlb=1" in tuned["GLIBC_TUNABLES"] and set(tuned) == {"HOME", "GLIBC_TUNABLES"}
    assert owned("MALLOC_TRIM_THRESHOLD_") and not owned("OMP_NUM_THREADS")


def test_processes_are_shared_where_threads_cannot_collide():
    eager, ours, ort = Entrant("eager", PLAIN), Entrant("fastnn packed", PLAIN), Entrant("onnxruntime", PLAIN)
    assert eager.process(1) == ours.process(1) != ort.process(1)
    assert len({e.process(2) for e in (eager, ours, ort)}) == 3
    assert eager.process(1) != Entrant("eager", TUNED).process(1)
    assert Entrant("eager", TUNED).label == "eager, tuned"


def test_unknown_contenders_are_named():
    with pytest.raises(ValueError, match="unknown contender 'nobody'; known: eager, "):
        contenders.contender("nobody")


@pytest.fixture(scope="module")
def running():
    with Session(1, idlest_cpus(1), 0.0005) as found:
        yield found


def test_a_visit_measures_everybody_in_every_round(running, extension):
    case, measured = find_bench_case(FWD), Measured()
    entrants = [Entrant("fastnn", PLAIN), Entrant("eager", PLAIN), Entrant("eager", TUNED)]
    running.visit(case, entrants, 3, measured)
    running.visit(case, entrants[:2], 2, measured)
    assert {label: len(record.times) for label, record in measured.records.items()} == {
        "fastnn": 5,
        "eager": 5,
        "eager, tuned": 3,
    }
    assert all(0 < time < 1 for record in measured.records.values() for time in record.times)
    assert not measured.refused and not measured.wrong


def test_a_contender_that_cannot_run_the_case_is_refused(running):
    case, measured = find_bench_case("softmax_fb/fp32 (64, 128)"), Measured()
    running.visit(case, [Entrant("eager", PLAIN), Entrant("eager_out", PLAIN)], 1, measured)
    assert "no out=" in measured.refused["eager_out"] and len(measured.records["eager"].times) == 1


def test_a_process_that_dies_takes_only_its_contenders(running):
    case, measured = find_bench_case(FWD), Measured()
    entrants = [Entrant("eager", PLAIN), Entrant("eager", TUNED)]
    running.visit(case, entrants, 1, measured)
    os.kill(running._processes[("torch", TUNED)]._child.pid, signal.SIGKILL)
    running.visit(case, entrants, 1, measured)
    assert len(measured.records["eager"].times) == 2
    assert "ended with status -9" in measured.refused["eager, tuned"]
    again = Measured()
    running.visit(case, entrants, 1, again)  # in a new process
    assert set(again.records) == {"eager", "eager, tuned"}


def test_a_process_that_does_not_answer_is_ended(monkeypatch):
    process = WorkerProcess(1, PLAIN, [])
    os.kill(process._child.pid, signal.SIGSTOP)
    with pytest.raises(WorkerDied, match=r"no answer in 0\.2 s"):
        monkeypatch.setattr(session, "STOP_SECONDS", 0.2)
        process.ask(0.2, do="close")
    assert process._child.poll() is not None


def test_workers_end_with_the_session():
    with Session(1, [], 0.0005) as found:
        found.visit(find_bench_case(FWD), [Entrant("eager", PLAIN)], 1, Measured())
        children = [process._child for process in found._processes.values()]
    assert children and all(child.poll() is not None for child in children)


def test_this_process_keeps_its_processors():
    before = os.sched_getaffinity(0)
    process = WorkerProcess(1, PLAIN, [min(before)])
    assert os.sched_getaffinity(process._child.pid) == {min(before)}
    process.stop()
    assert os.sched_getaffinity(0) == before


def test_a_record_is_ready_for_json():
    assert vars(Record(PLAIN, False)) == {
        "setting": PLAIN,
        "frozen": False,
        "output": "",
        "memory": None,
        "count": 1,
        "times": [],
        "interrupted": 0,
        "host": None,
    }
