"""The machine's limits: plausible, kept, and those of the performance page where its kind of machine is."""

from __future__ import annotations

import json

import pytest

from fastnn import _extension
from fastnn.bench import limits as module
from fastnn.bench.limits import BUSY, RESIDENT, Limits, NoLimits, machine_limits
from fastnn.bench.machine import OthersLoad, cache_bytes, cpu_family, load_of_cpus, this_machine
from fastnn.testing.bench_cases import Work

GB = 1e9

# The performance page, measured on two cores of an AMD Zen 4 server: low and high end, per number of threads. Of 4 KiB
# pages the high end is that of huge pages: how close they come depends on how scattered the free memory is.
PAGE = {
    1: {
        "fp32": (117, 117),
        "bf16": (234, 234),
        "int8": (469, 469),
        "L1 read": (195, 220),
        "L2 read": (116, 116),
        "L3 read": (83, 97),
        "read, 4 KiB pages": (18, 28),
        "read, huge pages": (28, 28),
        "copy, 4 KiB pages": (17, 26),
        "copy, huge pages": (26, 26),
        "copy, huge pages, streaming stores": (37, 37),
    },
    2: {
        "fp32": (233, 233),
        "bf16": (469, 469),
        "int8": (934, 934),
        "L1 read": (400, 400),
        "L2 read": (208, 208),
        "L3 read": (160, 184),
        "read, 4 KiB pages": (26, 57),
        "read, huge pages": (38, 57),
        "copy, 4 KiB pages": (26, 52),
        "copy, huge pages": (52, 52),
        "copy, huge pages, streaming stores": (51, 75),
    },
}
WITHIN = 0.10


def made(**changes) -> Limits:
    """Limits of an invented machine: 100 G(FL)OP/s, read 10, copy 20, write 40 GB/s, caches 1000, 500, 100 GB/s."""
    peak = {"1": {"best": {"fp32": 100 * GB, "bf16": 200 * GB}}, "2": {"best": {"fp32": 200 * GB, "bf16": 400 * GB}}}
    streams = {"read": 10 * GB, "copy": 20 * GB, "write": 40 * GB}
    memory = {kind: {"4 KiB pages": rate / 2, "huge pages": rate} for kind, rate in streams.items()}
    rates = zip(cache_bytes(), (1000 * GB, 500 * GB, 100 * GB), strict=False)
    cache = {level: {"read": rate, "copy": rate, "write": rate} for level, rate in rates}
    fields = {
        "machine": this_machine().key,
        "isa": "best",
        "peak": peak,
        "cache": {"1": cache, "2": cache},
        "memory": {"1": memory, "2": memory},
        "load": {"1": 0.0, "2": 0.0},
    }
    return Limits(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastnn"


@pytest.fixture
def quick(monkeypatch, extension):
    """Measurements that take no time."""
    for name in ("_PEAK_SECONDS", "_CACHE_SECONDS", "_MEMORY_SECONDS"):
        monkeypatch.setattr(module, name, 0.001)
    monkeypatch.setattr(module, "cache_bytes", lambda: {"L1": 1 << 14, "L2": 1 << 16, "L3": 1 << 18})


def test_operations_bound_a_row():
    bound = made().bound(Work(1000, 1000, 100 * 10**9))
    assert (bound.by, bound.seconds) == ("fp32 operations", pytest.approx(1.0))
    assert made().bound(Work(1000, 1000, 100 * 10**9, "bf16")).seconds == pytest.approx(0.5)
    assert made().bound(Work(1000, 1000, 100 * 10**9, "bf16"), 2).seconds == pytest.approx(0.25)
    # int8 is missing on this machine: it computes in float32
    assert made().bound(Work(1000, 1000, 100 * 10**9, "int8")).seconds == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("read", "written", "seconds"), [(1, 0, 1 / 10), (1, 1, 2 / 20), (0, 1, 1 / 40), (3, 1, 4 * (1 / 10 + 1 / 20) / 2)]
)
def test_memory_bounds_a_row_by_its_mix_of_reads_and_writes(read, written, seconds):
    bound = made().bound(Work(read * 10**9, written * 10**9, 1))
    assert (bound.by, bound.seconds) == ("memory", pytest.approx(seconds))


def test_the_cache_that_holds_a_row_bounds_it():
    sizes = cache_bytes()
    for (level, size), rate in zip(sizes.items(), (1000, 500, 100), strict=False):
        bound = made().bound(Work(size // 2, 0, 1))
        assert (bound.by, bound.seconds) == (f"{level} read", pytest.approx(size / 2 / (rate * GB)))
    assert made().bound(Work(int(RESIDENT * max(sizes.values())) + 64, 0, 1)).by == "memory"


def test_unmeasured_numbers_of_threads_take_the_next_lower_one():
    assert made().operations("fp32", 7) == 200 * GB
    assert made(peak={"2": {"best": {"fp32": 1.0}}}).operations("fp32", 1) == 1.0


def test_measures_everything(quick, folder):
    found = machine_limits(threads=[1])
    assert list(found.peak["1"]) == _extension._C.isa_supported()
    assert all(rates["fp32"] > 0 for rates in found.peak["1"].values())
    assert set(found.cache["1"]) == {"L1", "L2", "L3"}
    assert set(found.memory["1"]["copy"]) == {"4 KiB pages", "huge pages", "huge pages, streaming stores"}
    assert found.isa == _extension._C.isa()


def test_limits_are_kept_and_fresh_ones_measured(quick, folder, monkeypatch):
    monkeypatch.setattr(OthersLoad, "share", lambda self: 0.0)
    first = machine_limits(threads=[1])
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(module, "_measure_peaks", lambda *a: pytest.fail("measured again"))
    assert machine_limits(threads=[1]) == first
    with pytest.raises(pytest.fail.Exception):
        machine_limits(threads=[1], fresh=True)
    with pytest.raises(pytest.fail.Exception):
        machine_limits(threads=[1, 2])  # two threads are not known yet


def test_limits_of_a_busy_machine_are_measured_again_and_the_better_kept(quick, folder, monkeypatch):
    monkeypatch.setattr(OthersLoad, "share", lambda self: 2 * BUSY)
    monkeypatch.setattr(module, "_measure_caches", lambda *a: made().cache["1"])
    monkeypatch.setattr(module, "_measure_memory", lambda *a: made().memory["1"])
    monkeypatch.setattr(module, "_measure_peaks", lambda *a: {"best": {"fp32": 3.0, "bf16": 1.0}})
    machine_limits(threads=[1])
    monkeypatch.setattr(OthersLoad, "share", lambda self: 0.0)
    monkeypatch.setattr(module, "_measure_peaks", lambda *a: {"best": {"fp32": 2.0, "int8": 5.0}})
    found = machine_limits(threads=[1])
    assert found.peak["1"]["best"] == {"fp32": 3.0, "bf16": 1.0, "int8": 5.0}
    assert found.load["1"] == 0.0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', '{"format": 1, "machine": "another"}'])
def test_a_broken_file_is_measured_anew(quick, folder, content, monkeypatch):
    folder.mkdir()
    (folder / f"limits-{this_machine().key}.json").write_text(content)
    assert machine_limits(threads=[1]).peak["1"]


def test_another_machines_file_is_not_taken(quick, folder):
    folder.mkdir()
    other = {**made(machine="another").to_json()}
    (folder / f"limits-{this_machine().key}.json").write_text(json.dumps(other))
    assert machine_limits(threads=[1]).machine == this_machine().key


def test_an_unwritable_cache_folder_costs_nothing_but_time(quick, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine_limits(threads=[1]).peak["1"]


def test_without_the_extension_there_are_no_limits(monkeypatch, folder):
    monkeypatch.setattr(_extension, "_C", None)
    with pytest.raises(NoLimits, match="measured by the compiled extension"):
        machine_limits(fresh=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.measure_peak("fp64", 1, 0.1), ["measure_peak", "kind", "fp32, bf16, int8", "fp64"]),
        (lambda c: c.measure_peak("fp32", 0, 0.1), ["measure_peak", "threads", "0"]),
        (lambda c: c.measure_peak("fp32", 1, -1.0), ["measure_peak", "seconds", "-1"]),
        (lambda c: c.measure_peak("fp32", 1, float("nan")), ["measure_peak", "seconds", "nan"]),
        (lambda c: c.measure_stream("move", 64, "huge", False, 1, 0.1), ["measure_stream", "kind", "move"]),
        (lambda c: c.measure_stream("read", 64, "big", False, 1, 0.1), ["measure_stream", "pages", "big"]),
        (lambda c: c.measure_stream("read", 0, "huge", False, 1, 0.1), ["measure_stream", "bytes", "0"]),
        (lambda c: c.measure_stream("read", 2**60, "huge", False, 1, 0.1), ["measure_stream", "bytes"]),
    ],
)
def test_wrong_measurements_are_refused(extension, call, words):
    with pytest.raises(ValueError) as caught:
        call(extension)
    assert all(word in str(caught.value) for word in words)


def is_the_pages_machine() -> str:
    """Why this is another machine than the performance page's; empty where it is its kind."""
    if _extension._C is None:
        return _extension.missing
    if cpu_family() not in {("AuthenticAMD", 25, 17)}:
        return f"the page's machine is an AMD EPYC of family 25, model 17; this is {cpu_family()}"
    if "avx512_bf16" not in _extension._C.isa_supported():
        return "the page's machine has AVX-512 with BF16 and VNNI"
    return ""


def rate_of(found: Limits, threads: int, what: str) -> float:
    count = str(threads)
    if what in ("fp32", "bf16", "int8"):
        return found.peak[count]["avx512_bf16"][what] / GB
    if what.startswith("L"):
        return found.cache[count][what[:2]]["read"] / GB
    kind, way = what.split(", ", 1)
    return found.memory[count][kind][way] / GB


@pytest.mark.slow  # and only true where neither this machine nor its neighbours on the host do anything else
@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_those_of_the_performance_page(threads, folder):
    other = is_the_pages_machine()
    if other:
        pytest.skip(other)
    if len(load_of_cpus(0)) != 2:
        pytest.skip(f"the page's machine has two cores, this one {len(load_of_cpus(0))}")
    for _ in range(3):
        others = OthersLoad()
        found = machine_limits(threads=[threads], fresh=True)
        load = others.share()
        outside = {}
        for what, (low, high) in PAGE[threads].items():
            rate = rate_of(found, threads, what)
            if not low * (1 - WITHIN) <= rate <= high * (1 + WITHIN):
                outside[what] = f"{rate:.1f}, the page has {low} to {high}"
        if not outside:
            return
    if load > BUSY:
        pytest.skip(f"other processes take {load:.0%} of the processors; outside meanwhile: {outside}")
    assert not outside
