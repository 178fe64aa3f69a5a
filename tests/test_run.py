"""`python -m fastnn run`: the script runs as it would alone, with the settings that measure best."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnn import run as module
from fastnn.bench.allocators import CANDIDATES, PLAIN, TUNED, owned
from fastnn.bench.probe import SMALL, typical_time
from fastnn.run import Choice, choice, choose, explanation, gain

ROOT = Path(__file__).resolve().parent.parent

TELL = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "name": __name__, "env": dict(os.environ), "path": sys.path[0]}))
sys.exit(7)
"""

# What the script's calls take, by the processor's clock: the same on a busy machine.
TIMED = """
import statistics, sys, time, torch
torch.set_num_threads(1)
rows, calls = int(sys.argv[1]), int(sys.argv[2])
x = torch.randn(rows, 2048)
def once():
    start = time.process_time()
    for _ in range(calls):
        torch.softmax(x, -1)
    return time.process_time() - start
print(statistics.median([once() for _ in range(16)][8:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """No allocator variable set, and a cache folder of its own."""
    for name in list(os.environ):
        if owned(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastnn", "run", *arguments]
    return subprocess.run(command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True, timeout=280)


def measured(**times: tuple[float, float]) -> dict:
    """Setting -> milliseconds of the large workload and the small one."""
    return {
        name.replace("_", " "): {"times": {"large": large, SMALL: small}, "peak": 1 << 20}
        for name, (large, small) in times.items()
    }


def test_the_script_runs_as_it_would_alone(folder):
    path = script(folder, TELL)
    run = start("--setting", "tuned", str(path), "--explain", "-m", "one two", cwd=folder)
    assert run.returncode == 7 and not run.stderr
    found = json.loads(run.stdout)
    assert found["argv"] == [str(path), "--explain", "-m", "one two"]
    assert found["name"] == "__main__" and found["path"] == str(folder)
    changed = {name for name in found["env"] if os.environ.get(name) != found["env"][name]}
    assert changed - {"PWD", "OLDPWD", "_"} == set(CANDIDATES[TUNED])
    assert found["env"]["GLIBC_TUNABLES"] == CANDIDATES[TUNED]["GLIBC_TUNABLES"]


def test_a_module_can_be_run(folder):
    script(folder, TELL)
    run = start("--setting", "plain", "-m", "script", "a", cwd=folder)
    assert run.returncode == 7
    assert json.loads(run.stdout)["argv"][1:] == ["a"]


def test_variables_that_are_set_are_left_alone(folder, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    run = start("--explain", str(script(folder, TELL)), cwd=folder)
    found = json.loads(run.stdout)["env"]
    assert found["MALLOC_ARENA_MAX"] == "1" and "GLIBC_TUNABLES" not in found
    assert "MALLOC_ARENA_MAX set already: left alone" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.py"], "no such script: nothing.py"),
        (["-m", "no_such_module"], "no module named no_such_module"),
        ([], "which script?"),
        (["--setting", "best", "a.py"], "invalid choice: 'best'"),
    ],
)
def test_bad_arguments_are_refused_in_words(folder, arguments, words):
    run = start(*arguments, cwd=folder)
    assert run.returncode == 2 and words in run.stderr and not run.stdout


def test_the_best_harmless_setting_is_chosen():
    assert choose(measured(plain=(10, 1), tuned=(2, 1), huge_pages=(4, 1))).name == TUNED
    assert choose(measured(plain=(10, 1), tuned=(2, 1.2), huge_pages=(4, 1))).name == "huge pages"
    assert choose(measured(plain=(10, 1), tuned=(9.9, 1), huge_pages=(11, 1))).name == PLAIN
    assert gain(measured(plain=(10, 1), tuned=(4, 1)), TUNED) == pytest.approx(2.5)


def test_a_choice_is_measured_once(folder, monkeypatch, capsys):
    calls = []
    numbers = measured(plain=(10, 1), tuned=(2, 1), huge_pages=(4, 1))
    monkeypatch.setattr(module, "probe", lambda name: calls.append(name) or numbers[name])
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert choice().name == TUNED and calls == list(CANDIDATES)
    assert "once on this machine" in capsys.readouterr().err
    assert choice().name == TUNED and len(calls) == len(CANDIDATES)
    assert not capsys.readouterr().err
    assert choice(fresh=True).name == TUNED and len(calls) == 2 * len(CANDIDATES)
    module._file().write_text("{}")
    assert choice().name == TUNED and len(calls) == 3 * len(CANDIDATES)


def test_a_probe_that_fails_changes_nothing(folder, monkeypatch):
    def fails(name):
        raise RuntimeError(f"setting {name} could not be measured: no time")

    monkeypatch.setattr(module, "probe", fails)
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("glibc", "2.36"))
    found = choice()
    assert found.name == PLAIN and "could not be measured" in found.why
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("", ""))
    assert "another C library" in choice().why


def test_the_explanation_says_which_why_and_what_it_gained():
    text = explanation(choose(measured(plain=(10, 1), tuned=(2, 1), huge_pages=(4, 1))))
    for words in (
        "allocator setting: tuned (5.0x",
        "GLIBC_TUNABLES=glibc.malloc.hugetlb=1",
        "huge pages",
        "5.00x",
        "1 MiB",
    ):
        assert words in text
    assert "no variable is set" in explanation(Choice(PLAIN, "no setting gains anything here", {}))


def test_typical_time_is_the_processors():
    assert typical_time(lambda: sum(range(10000)), 0.01) > 0


@pytest.mark.alone  # measures time
def test_large_softmaxes_get_faster_and_small_ones_stay(folder):
    if module.platform.libc_ver()[0] != "glibc":
        pytest.skip("the settings are glibc's, and this is another C library")
    path = script(folder, TIMED)
    chosen = choice()  # measured for real
    assert chosen.measured, chosen.why

    def seconds(setting: str, rows: int, calls: int) -> float:
        run = start("--setting", setting, str(path), str(rows), str(calls), cwd=folder)
        assert run.returncode == 0, run.stderr
        return float(run.stdout)

    if chosen.name == PLAIN:
        pytest.skip(f"{chosen.why}: {chosen.measured}")
    large, small = (6144, 1), (4, 2000)
    assert seconds(PLAIN, *large) > 1.2 * seconds(chosen.name, *large)
    assert min(seconds(chosen.name, *small) for _ in range(3)) < 1.2 * max(seconds(PLAIN, *small) for _ in range(3))
