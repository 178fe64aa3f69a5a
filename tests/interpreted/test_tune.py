"""FASTNN_TUNE=1: when it searches, what it finds, what it keeps; with a clock of our own and no GPU."""

from __future__ import annotations

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

import fastnn
from fastnn import testing
from fastnn.kernels import config, tune
from fastnn.testing import INTERPRETED

ARCH = config.ARCHS["interpreted"]
START = config.Product(64, 64, 64, 4, 3, 8, 1, False, False)


class Clock:
    """Takes what `cost` says of the configuration that was launched last."""

    def __init__(self, cost):
        self.cost, self.calls, self.last = cost, 0, None

    def __call__(self, call):
        self.calls += 1
        call()
        return self.cost(self.last)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Tuning is on, nothing is known, and every launch takes 1 ms."""
    clock = Clock(lambda config: 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "enabled", True)
    monkeypatch.setattr(tune, "clock", clock)
    monkeypatch.setattr(tune, "_known", {})
    return clock


def files(tmp_path):
    return sorted(tmp_path.glob("fastnn/tune/*"))


def run(clock, start=START, sizes=(64, 64, 64), x=None, options=()):
    """Launches by `tune.run`; every configuration that was launched."""
    seen = []

    def launch(config):
        clock.last = config
        seen.append(config)

    tune.run("matmul", launch, start, torch.zeros(1) if x is None else x, ARCH, sizes, options)
    return seen


class TestDefault:
    def test_nothing_is_timed_and_nothing_is_written(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(tune, "clock", None)
        assert not tune.enabled
        assert run(Clock(None)) == [START]
        assert not files(tmp_path)

    def test_it_is_asked_for_by_0_or_1(self, monkeypatch):
        for value, wanted in (("", False), ("0", False), ("1", True)):
            monkeypatch.setenv("FASTNN_TUNE", value)
            assert tune._asked() is wanted
        monkeypatch.setenv("FASTNN_TUNE", "yes")
        with pytest.raises(ValueError, match="FASTNN_TUNE is 0 or 1, got 'yes'"):
            tune._asked()


class TestSearch:
    def test_it_walks_to_the_fastest(self, tuned):
        tuned.cost = lambda c: 1 + abs(c.bm - 128) / 64 + abs(c.bk - 32) / 32 + abs(c.stages - 4)
        last = run(tuned)[-1]
        assert last == START._replace(bm=128, bk=32, stages=4)
        assert tuned.calls <= tune.MOST

    def test_equals_do_not_replace_the_pure_choice(self, tuned):
        tuned.cost = lambda c: 1.0 if c == START else 1.0 - tune.LEAST_GAIN / 2
        assert run(tuned)[-1] == START

    def test_it_stops(self, tuned):
        times = iter(0.9**i for i in range(10000))
        tuned.cost = lambda c: next(times)
        run(tuned)
        assert tuned.calls <= tune.MOST

    @pytest.mark.parametrize("start", [
        START,
        config.Attention(64, 64, 4, 2),
        config.Rows(4, 512, True, 4),
        config.Tile(2, 1024, 4),
        config.Columns(32, 128, 9, 4),
        config.NormBackward(1, 4096, True, 2, 8),
    ])  # fmt: skip
    def test_neighbours_are_legal(self, start):
        for found in tune.neighbours(start):
            changed = [field for field in start._fields if getattr(found, field) != getattr(start, field)]
            assert len(changed) == 1
            value = getattr(found, changed[0])
            assert value > 0 and (changed[0] == "stages" or value & (value - 1) == 0)
            assert tune._config(list(found), start) == found

    def test_a_row_in_pieces_stays_alone(self):
        assert {found.rows for found in tune.neighbours(config.Rows(1, 1024, False, 16))} == {1}

    def test_what_does_not_fit_is_passed_over(self, tuned):
        def launch(config):
            tuned.last = config
            if config.bm > 64:
                raise OutOfResources(1, 0, "shared memory")
            if config.bn < 64:
                raise RuntimeError("PassManager::run failed")

        tuned.cost = lambda c: 64 / c.bm + c.bn / 64 + c.stages
        assert tune.search(launch, START) == START._replace(stages=1)

    def test_errors_of_the_pure_choice_are_raised(self, tuned):
        def launch(config):
            raise OutOfResources(1, 0, "shared memory")

        with pytest.raises(OutOfResources):
            tune.search(launch, START)


class TestCache:
    def test_one_search_for_a_bucket(self, tuned):
        run(tuned, sizes=(100, 64, 64))
        calls = tuned.calls
        assert calls > 1 and len(run(tuned, sizes=(128, 64, 64))) == 1 and tuned.calls == calls
        for other in (
            {"sizes": (129, 64, 64)},
            {"options": (True,)},
            {"x": torch.zeros(1, dtype=torch.bfloat16)},
            {"start": START._replace(bk=32)},
        ):
            before = tuned.calls
            run(tuned, **{"sizes": (128, 64, 64), **other})
            assert tuned.calls > before, other

    def test_another_process_finds_it_on_disk(self, tuned, tmp_path, monkeypatch):
        tuned.cost = lambda c: 1.0 / c.bm
        found = run(tuned)[-1]
        assert found.bm == 256
        (path,) = files(tmp_path)
        for word in ("cpu", "interpreted", f"fastnn-{fastnn.__version__}", "triton-"):
            assert word in path.name
        monkeypatch.setattr(tune, "_known", {})
        calls = tuned.calls
        assert run(tuned) == [found] and tuned.calls == calls

    def test_results_of_others_are_kept(self, tuned, tmp_path):
        run(tuned)
        (path,) = files(tmp_path)
        path.write_text(json.dumps({**json.loads(path.read_text()), "theirs": [1]}))
        run(tuned, sizes=(1, 1, 1))
        assert {"theirs"} < set(json.loads(path.read_text())) and len(json.loads(path.read_text())) == 3

    @pytest.mark.parametrize("text", ["", '{"cut', "[1]", "broken"])
    def test_a_broken_file_is_no_file(self, tuned, tmp_path, monkeypatch, text):
        run(tuned)
        (path,) = files(tmp_path)
        entry = json.loads(path.read_text())
        path.write_text(text if text != "broken" else json.dumps({key: [7] * len(START) for key in entry}))
        monkeypatch.setattr(tune, "_known", {})
        assert run(tuned)[-1] == START
        assert json.loads(path.read_text()) == entry

    def test_a_folder_that_cannot_be_written_is_told(self, tuned, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.warns(RuntimeWarning, match="results are not kept"):
            run(tuned)
        assert len(run(tuned)) == 1

    def test_no_search_while_a_graph_is_captured(self, tuned, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        x = type("OnGpu", (), {"is_cuda": True, "dtype": torch.float32, "device": torch.device("cpu")})()
        assert run(tuned, x=x) == [START] and tuned.calls == 0 and not files(tmp_path)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("activation", "gelu_bias_rows"),
        ("activation", "silu_packed_rows"),
        ("linear", "gelu_bias"),
        ("attention", "everything"),
        ("softmax", "rows"),
        ("norm", "add_layer_rows"),
        ("cross_entropy", "everything_mean"),
    ],
)
def test_what_is_launched_again_and_again_is_right(op, name, tuned, monkeypatch):
    """Each launch overwrites what the one before wrote; the last one's configuration is another than the first's."""
    monkeypatch.setattr(tune, "MOST", 3)
    times = iter(0.9**i for i in range(10000))
    tuned.cost = lambda c: next(times)
    testing.check(testing.find_case(op, name), "bf16", INTERPRETED)
    assert tuned.calls > 1
