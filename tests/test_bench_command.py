"""`python -m fastnn bench`: what is asked for is run, what cannot be is refused in words, what was measured is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastnn import _extension, cli
from fastnn.bench import campaign, limits
from fastnn.bench.allocators import PLAIN, TUNED
from fastnn.bench.campaign import BadOptions, Options, plan
from fastnn.bench.contenders import CONTENDERS
from fastnn.bench.results import load
from fastnn.bench.session import Measured, Record
from fastnn.testing.bench_cases import bench_cases, families, find_bench_case

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--rounds", "2", "--passes", "1", "--extra", "0"]


@pytest.fixture(scope="module", autouse=True)
def known_limits(tmp_path_factory):
    """Limits that are known already, measured in no time: the commands need not measure them each."""
    if _extension._C is None:
        yield
        return
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name in ("_PEAK_SECONDS", "_CACHE_SECONDS", "_MEMORY_SECONDS"):
        patch.setattr(limits, name, 0.001)
    found = limits.measure(limits.thread_counts())
    found.load = dict.fromkeys(found.load, 0.0)
    limits.write_atomically(limits._file(), json.dumps(found.to_json()))
    yield
    patch.undo()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def bench(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastnn", "bench", *arguments]
    variables = {**environment(), **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd, env=variables)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], ["'nothing'", "norms, rope, softmax"]),
        (["softmax", "nothing"], ["'nothing'"]),
        (["--only", "nothing"], ["'nothing'", "softmax_fwd/fp32"]),
        (["--with", "nobody"], ["'nobody'", "eager", "tuned"]),
        (["--threads", "0"], ["threads", "got 0"]),
        (["--threads", "9999"], ["threads", "got 9999"]),
        (["--rounds", "0"], ["rounds", "at least 1"]),
        (["--passes", "-1"], ["passes", "-1"]),
        (["--extra", "-1"], ["extra", "at least 0"]),
        (["limits", "softmax"], ["limits goes alone"]),
        (["--document", "README.md"], ["--from"]),
        (["--from", "nothing.json"], ["nothing.json", "No such file"]),
        (["--results", "/dev/null/folder"], ["/dev/null"]),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, words, capsys, tmp_path, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(campaign, "Session", lambda *a: pytest.fail("something was measured"))
    monkeypatch.setattr(campaign, "machine_limits", lambda **a: pytest.fail("something was measured"))
    assert cli.main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastnn bench: ") and len(captured.err.splitlines()) == 1
    assert all(word in captured.err for word in words) and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_results_folder_that_cannot_be_written_is_named_first(error, capsys, tmp_path, monkeypatch):
    pytest.importorskip("rich")

    def refuses(folder):
        raise type(error)(error.errno, error.strerror, str(folder))

    monkeypatch.setattr(campaign, "check_writable", refuses)
    monkeypatch.setattr(campaign, "machine_limits", lambda **a: pytest.fail("something was measured"))
    assert cli.main(["bench", "softmax", "--results", str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err == f"fastnn bench: cannot write {tmp_path / 'there'}: {error.strerror}\n"


def test_a_contender_that_is_not_installed_is_listed_or_refused(monkeypatch):
    monkeypatch.setattr(type(CONTENDERS["openvino"]), "packages", ("no_such_module",))
    found = plan(Options())
    assert "openvino" not in found.contenders
    assert found.missing["openvino"] == "not installed: pip install openvino onnx"
    with pytest.raises(BadOptions, match="contender openvino: not installed: pip install openvino onnx"):
        plan(Options(contenders=("openvino",)))
    assert not plan(Options(contenders=("eager",))).missing  # nobody asked for it


def test_everybody_installed_takes_part_unless_named():
    found = plan(Options())
    assert found.settings == (PLAIN, TUNED)
    assert {"eager", "eager_out", "compile"} <= set(found.contenders)
    assert [case for family in families() for case in bench_cases(family) if not case.sweep] == found.cases
    named = plan(Options(contenders=("eager", "tuned")))
    assert (named.contenders, named.settings) == (["eager"], (PLAIN, TUNED))
    assert plan(Options(contenders=("compile",))).settings == (PLAIN,)


def test_quick_and_sweep_are_eager_and_ours():
    quick = plan(Options(quick=True))
    assert [case.family for case in quick.cases] == list(families())
    assert (quick.contenders, quick.settings) == (["eager"], (PLAIN,))
    sweep = plan(Options(sweep=True))
    assert sweep.contenders == ["eager"] and len(sweep.cases) > 100 and all(case.sweep for case in sweep.cases)


def test_entrants_of_a_case_and_why_others_are_not():
    entrants, refused = plan(Options()).entrants(find_bench_case("linear+gelu_tanh/bf16 (128, 768, 3072)"))
    labels = [entrant.label for entrant in entrants]
    assert labels[:3] == ["fastnn", "fastnn packed", "eager"] and "fastnn packed, tuned" in labels
    assert refused["eager_out"] == "torch has no out= for it"


def test_slow_contenders_retire_and_the_best_of_each_kind_stays():
    def at(milliseconds, frozen=False):
        return Record(PLAIN, frozen, times=[milliseconds * 1e-3] * 3)

    records = {
        "fastnn": at(9),
        "eager": at(2),
        "compile": at(3.5),
        "openvino": at(1, True),
        "onnxruntime": at(1.6, True),
    }
    assert campaign._Run._racing(Measured(records)) == {"fastnn", "eager", "openvino"}


@pytest.mark.alone  # measures time
def test_a_run_is_kept_shown_and_read_back(tmp_path, extension):
    run = bench("softmax", "--only", "fwd/fp32 (64", "--with", "eager,tuned", *FAST, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (kept,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert "kept in" in run.stderr and kept.name in run.stderr
    found = load(kept)
    (row,) = found.rows()
    assert found.complete and found.date and found.machine["cpu"] and found.versions["torch"]
    assert row.plain.name == "eager" and row.tuned.name == "eager" and 0 < row.share < 2
    assert "softmax_fwd/fp32" in run.stdout and "of limit" in run.stdout
    again = bench("--from", str(kept), cwd=tmp_path)
    assert again.returncode == 0 and again.stdout == run.stdout
    as_json = bench("--from", str(kept), "--json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["rows"][0]["row"] == "softmax_fwd/fp32"
    document = tmp_path / "page.md"
    document.write_text("<!-- rows:begin -->\n<!-- rows:end -->\n")
    assert bench("--from", str(kept), "--document", "page.md", cwd=tmp_path).returncode == 2
    document.write_text("<!-- rows:begin -->\n\n<!-- rows:end -->\n")
    assert bench("--from", str(kept), "--document", "page.md", cwd=tmp_path).returncode == 0
    assert f"<!-- from {kept.name} -->" in document.read_text()


@pytest.mark.alone  # measures time
def test_quick_ends_within_a_minute_and_keeps_nothing(tmp_path, extension):
    start = time.monotonic()
    run = bench("--quick", "--json", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))  # limits measured as well
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start <= 60
    found = json.loads(run.stdout)
    assert {row["family"] for row in found["rows"]} == set(families())
    assert all(row["plain"]["name"] == "eager" for row in found["rows"])
    assert not (tmp_path / "benchmarks").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_killed_midway_it_keeps_what_was_measured(how, tmp_path, extension):
    command = [sys.executable, "-m", "fastnn", "bench", "linear", "--sweep", "--only", "(1, ", "--results", "out"]
    child = subprocess.Popen(
        [*command, "--rounds", "1"],
        cwd=tmp_path,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120

    def measured() -> int:
        kept = list((tmp_path / "out").glob("*.json")) if (tmp_path / "out").exists() else []
        return len(load(kept[0]).cases) if kept else 0

    while measured() < 2 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(how)
    _, errors = child.communicate(timeout=60)
    (kept,) = (tmp_path / "out").iterdir()
    found = load(kept)
    assert len(found.cases) >= 2 and not found.complete, errors
    assert all(entrant["times"] for case in found.cases for entrant in case["entrants"].values())
    if how == signal.SIGINT:
        assert child.returncode == 130 and "what was measured is kept" in errors and found.stopped == "interrupted"
    shown = bench("--from", str(kept), cwd=tmp_path)
    assert shown.returncode == 0 and "Not complete" in shown.stdout


def test_wrong_results_of_ours_end_with_status_1(monkeypatch, capsys, tmp_path):
    class Wrong:
        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def visit(self, case, entrants, rounds, measured):
            measured.wrong["fastnn"] = "error 3 is above 1"
            measured.records["eager"] = Record(PLAIN, False, times=[1e-3] * 3)

        def end_processes(self):
            return None

    monkeypatch.setattr(campaign, "Session", Wrong)
    arguments = ["bench", "softmax", "--only", "fwd/fp32 (64", "--json", "--results", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["rows"][0]["verdict"] == "wrong result"


def test_rows_contenders_and_limits_can_be_listed(tmp_path, extension):
    pytest.importorskip("rich")
    listed = bench("--list", cwd=tmp_path)
    assert listed.returncode == 0 and "softmax_bwd/bf16 (49152, 512)" in listed.stdout
    assert all(name in listed.stdout for name, who in CONTENDERS.items() if "cpu" in who.devices)
    only = bench("cross-entropy", "--list", cwd=tmp_path).stdout
    assert "cross_entropy_fb" in only and "softmax_bwd" not in only
    shown = bench("limits", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for words in ("read, 4 KiB pages", "copy, huge pages, streaming stores", "L3 read", "fp32, scalar"):
        assert words in shown.stdout
    as_json = json.loads(bench("limits", "--json", cwd=tmp_path).stdout)
    assert as_json["peak"] and as_json["cache"] and as_json["memory"]
