"""`python -m fastnn run script.py ...`: any script, with the allocator settings that measure best on this machine.

On CPUs much of a large operation's time goes into fresh memory pages, which an allocator on huge pages saves. The
settings are environment variables that must be there when a process starts: so the script gets a process of its own
(this one, replaced), in which nothing else is changed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .bench.allocators import CANDIDATES, PLAIN, environment, owned
from .bench.files import write_atomically
from .bench.limits import cache_folder
from .bench.machine import describe

_SMALL_LOSS = 1.05
"""A setting under which the small workload takes more than this share of its plain time is not chosen."""

_WORTH = 1.1
"""The least gain over plain, on average of the large workloads, for which a setting is chosen."""

_SMALL = "small layer"

_PROBE_SECONDS = 120.0


@dataclass(frozen=True)
class Choice:
    """A setting, and how it was chosen."""

    name: str
    why: str
    measured: dict[str, Any]
    """Setting -> what the probe found; empty where nothing was measured."""


def _file() -> Path:
    found = describe()
    libc = "".join(platform.libc_ver())
    key = f"{found['key']}-{libc}-{torch.__version__}-{found['huge_pages']}-{torch.get_num_threads()}t"
    return cache_folder() / f"allocator-{key}.json"


def probe(name: str) -> dict[str, Any]:
    """What the workloads take under a setting, measured in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        child = subprocess.run(
            [sys.executable, "-m", "fastnn.bench.probe"],
            env={**environment(CANDIDATES[name]), "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
        found: dict[str, Any] = json.loads(child.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise RuntimeError(f"setting {name} could not be measured: {error}") from error
    return found


def gain(measured: dict[str, Any], name: str) -> float:
    """How many times faster than plain the large workloads are, on (geometric) average."""
    plain, other = measured[PLAIN]["times"], measured[name]["times"]
    ratios = [plain[work] / other[work] for work in plain if work != _SMALL]
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def choose(measured: dict[str, Any]) -> Choice:
    """The setting with the greatest gain among those that leave the small workload as it is."""
    small = {name: found["times"][_SMALL] for name, found in measured.items()}
    harmless = [name for name in measured if small[name] <= _SMALL_LOSS * small[PLAIN]]
    best = max(harmless, key=lambda name: gain(measured, name))
    if gain(measured, best) < _WORTH:
        return Choice(PLAIN, "no setting gains anything here", measured)
    return Choice(best, f"{gain(measured, best):.1f}x on large tensors, small ones as before", measured)


def choice(fresh: bool = False) -> Choice:
    """The setting for this machine: from the user's cache folder, or measured now (about five seconds)."""
    given = sorted(name for name in os.environ if owned(name))
    if given:
        return Choice("", f"{', '.join(given)} set already: left alone", {})
    if platform.libc_ver()[0] != "glibc":
        return Choice(PLAIN, "the settings are glibc's, and this is another C library", {})
    if not fresh:
        try:
            return choose(json.loads(_file().read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # not measured yet, or by another version
    sys.stderr.write("fastnn run: measuring allocator settings, once on this machine...\n")
    try:
        measured = {name: probe(name) for name in CANDIDATES}
    except RuntimeError as error:
        return Choice(PLAIN, str(error), {})
    try:
        write_atomically(_file(), json.dumps(measured, indent=1) + "\n")
    except OSError:
        pass  # measured again next time
    return choose(measured)


def explanation(chosen: Choice) -> str:
    """Which setting, why, and what each did in the probe."""
    lines = [f"allocator setting: {chosen.name or 'as given'} ({chosen.why})"]
    if chosen.name:
        found = CANDIDATES[chosen.name]
        lines += [f"  {name}={value}" for name, value in found.items()] or ["  (no variable is set)"]
    if chosen.measured:
        works = list(chosen.measured[PLAIN]["times"])
        lines.append(f"{'setting':<8}" + "".join(f"{work:>20}" for work in works) + f"{'gain':>8}{'peak memory':>14}")
        for name, found in chosen.measured.items():
            times = "".join(f"{found['times'][work] * 1e3:>17.3f} ms" for work in works)
            lines.append(f"{name:<8}{times}{gain(chosen.measured, name):>7.2f}x{found['peak'] / 2**20:>10.0f} MiB")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--explain", action="store_true", help="say which setting, why, and what it gained in a probe")
    parser.add_argument("--fresh", action="store_true", help="measure the settings again")
    parser.add_argument(
        "--setting", choices=list(CANDIDATES), help="take this one instead of what measures best; nothing is measured"
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="the script is the name of a module, as python -m"
    )
    parser.add_argument("script", nargs="?", help="the script; without one, --explain alone")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run(arguments: argparse.Namespace) -> int:
    """The command: replaces this process by the script's, whose exit status is the command's."""
    script = arguments.script
    if script is None and not arguments.explain:
        sys.stderr.write("fastnn run: which script? (--explain alone shows the settings)\n")
        return 2
    if script is not None and not arguments.module and not Path(script).exists():
        sys.stderr.write(f"fastnn run: no such script: {script}\n")
        return 2
    if script is not None and arguments.module and _lacks_module(script):
        sys.stderr.write(f"fastnn run: no module named {script}\n")
        return 2
    if arguments.setting:
        chosen = Choice(arguments.setting, "asked for", {})
    else:
        chosen = choice(arguments.fresh)
    if arguments.explain:
        sys.stderr.write(explanation(chosen) + "\n")
    if script is None:
        return 0
    variables = environment(CANDIDATES[chosen.name]) if chosen.name else dict(os.environ)
    command = [sys.executable, *(["-m"] if arguments.module else []), script, *arguments.arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, variables)


def _lacks_module(name: str) -> bool:
    try:
        return find_spec(name) is None
    except (ImportError, ValueError):
        return True
