"""`import fastnn`: quick, silent, without side effects; and what the extension's file may ask of a system."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnn import _extension

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MS = 100
ROUNDS = 5


def python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {k: v for k, v in os.environ.items() if not k.startswith("FASTNN_")}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, env={**variables, "PYTHONPATH": path, **environment}, check=True
    )


@pytest.mark.alone
def test_import_adds_little_to_torch():
    code = "import torch, time; t = time.perf_counter(); import fastnn; print((time.perf_counter() - t) * 1e3)"
    times = []
    for _ in range(ROUNDS):  # the least of several: another process may be using the machine
        times.append(float(python(code).stdout))
        if times[-1] < LIMIT_MS / 2:
            break
    assert min(times) < LIMIT_MS, f"import fastnn took {times} ms"


def test_import_prints_nothing_and_warns_of_nothing():
    run = python("import fastnn", "-W", "always::RuntimeWarning:fastnn")
    assert run.stdout == "" and run.stderr == ""


def test_import_brings_in_no_extra():
    code = (
        "import sys, json, torch; before = set(sys.modules); import fastnn;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = json.loads(python(code).stdout)
    packages = {module.split(".")[0] for module in new}
    assert not packages & {"transformers", "triton", "rich", "safetensors", "pytest", "hypothesis", "pandas", "scipy"}


STATE = """
import gc, json, random, signal, sys, threading, warnings
import numpy as np, torch

def state():
    tiny = torch.tensor([1e-40, 3e-39])
    third = (torch.tensor([1.0]) / 3).view(torch.int32).item()
    return {
        "torch rng": torch.get_rng_state().sum().item(),
        "numpy rng": np.random.get_state()[1].sum().item(),
        "python rng": hash(random.getstate()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "python threads": threading.active_count(),
        "subnormals": (tiny * 1.0).tolist() + [sys.float_info.min / 2 * 1.0],
        "rounding": third,
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "warning filters": [str(f) for f in warnings.filters],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGSEGV, signal.SIGILL, signal.SIGFPE)],
        "gc": [gc.isenabled(), gc.get_threshold()],
        "hooks": [sys.excepthook is sys.__excepthook__, len(sys.meta_path), str(sys.displayhook)],
    }

before = state()
import fastnn
after = state()
print(json.dumps({key: [str(before[key]), str(after[key])] for key in before if before[key] != after[key]}))
"""


def test_import_changes_no_state_of_the_process():
    assert json.loads(python(STATE).stdout) == {}


PATCHES = """
import json, sys, types
import torch, torch.library, torch.nn.functional, torch.autograd.forward_ad

def names():
    owners = {name: module for name, module in list(sys.modules.items()) if name.split(".")[0] == "torch" and module}
    owners |= {f"{cls.__module__}.{cls.__name__}": cls for cls in (
        torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.nn.Softmax, torch.nn.Parameter, torch.autograd.Function)}
    return {(owner, name): id(value) for owner, thing in owners.items() for name, value in vars(thing).items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}

before = names()
import fastnn
after = names()
modules = {owner for owner, _ in before}
print(json.dumps(sorted(f"{owner}.{name}" for (owner, name), value in after.items()
                        if owner in modules and before.get((owner, name)) != value)))
"""


def test_import_patches_nothing_of_torch():
    assert json.loads(python(PATCHES).stdout) == []


# ---- the extension's file


@pytest.fixture(scope="module")
def extension() -> Path:
    if _extension._C is None:
        pytest.skip(_extension.missing)
    return Path(_extension._C.__file__)


def tool(name: str, *arguments: str) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not on PATH")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


def test_extension_exports_its_init_function_only(extension):
    exported = [line.split()[-1] for line in tool("nm", "-D", "--defined-only", str(extension)) if line.strip()]
    assert exported == ["PyInit__C"]


def test_extension_needs_libtorch_cpu_and_searches_no_folder(extension):
    dynamic = tool("readelf", "-dW", str(extension))
    needed = {match[1] for line in dynamic if (match := re.search(r"\(NEEDED\).*\[(.*)\]", line))}
    assert "libtorch_cpu.so" in needed
    system = re.compile(r"lib(stdc\+\+|gcc_s|c|m|pthread|dl|rt)\.so\.\d+|ld-linux.*")
    others = {library for library in needed - {"libtorch_cpu.so"} if not system.fullmatch(library)}
    assert not others, f"needs {others}: a second OpenMP runtime, libpython or another torch library"
    assert not [line for line in dynamic if "(RPATH)" in line or "(RUNPATH)" in line]


def test_extension_holds_no_path_of_the_machine_that_built_it(extension):
    data = extension.read_bytes()
    sources = rb"/(?:[\w.+-]+/)+[\w.+-]+\.(?:h|hpp|hxx|cpp|cc|cu|py)\b"
    absolute = [text for text in re.findall(rb"[^\x00-\x1f\x7f-\xff]+", data) if re.match(sources, text)]
    assert not absolute, absolute
    for path in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert str(path).encode() not in data, f"{path} is in {extension.name}"


def newer_than_2_11() -> set[str]:
    """Functions that torch's C shim declares only for a target newer than 2.11, from the installed headers."""
    found: set[str] = set()
    shim = Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h"
    guards: list[bool] = []
    for line in shim.read_text().splitlines():
        if re.match(r"\s*#\s*if", line):
            version = re.search(r"TORCH_VERSION_2_(\d+)_", line)
            guards.append(bool(version and int(version[1]) > 11))
        elif re.match(r"\s*#\s*endif", line):
            guards.pop()
        elif any(guards):
            found |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line))
    return found


def test_extension_loads_on_the_oldest_torch(extension):
    newer = newer_than_2_11()
    assert newer, "the shim header has no guarded function any more: this test reads the wrong file"
    undefined = {line.split()[-1] for line in tool("nm", "-D", "--undefined-only", str(extension)) if " w " not in line}
    assert not undefined & newer, f"needs {undefined & newer}, which torch 2.11 lacks"


def test_import_works_on_the_plainest_instruction_set(extension):
    assert python("import fastnn; print(fastnn._extension._C.isa())", FASTNN_ISA="scalar").stdout == "scalar\n"
