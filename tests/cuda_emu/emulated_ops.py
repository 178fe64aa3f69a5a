"""The emulated library, torch.ops.fastnn_emu.*: the CUDA kernels and the bindings as they are, compiled for the CPU.

`library()` builds it once for each state of its sources, into build/cuda_emu; `Emulated` is a target of
`fastnn.testing.check`. Needs a C++20 compiler and pybind11, no CUDA toolkit. In it are the kernels' launchers too, for
emulated.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from fastnn import _dispatch, _record
from fastnn.testing import Target

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KERNELS = tuple(sorted(path for path in (ROOT / "csrc/cuda").glob("*.cu") if path.stem != "device"))
NAMES = re.findall(r"^FASTNN_OP\((\w+)\)", (ROOT / "csrc/ops.def").read_text(), re.MULTILINE)
OPS = tuple(op for op in NAMES if any(f"{path.stem}_".startswith(f"{op}_") for path in KERNELS))
BINDINGS = tuple(ROOT / f"csrc/bindings/{name}.cpp" for name in ("tensor", "device", "loss", *OPS))
CORE = tuple(ROOT / f"csrc/cpu/{name}.cpp" for name in ("cache", "memory", "parallel", "record"))
GLUE = (HERE / "device.cpp", HERE / "matrix_driver.cpp", HERE / "no_cpu.cpp")
FOLDER = ROOT / "build/cuda_emu"
EMULATE = ("-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DFASTNN_CUDA_EMU")
COMPILER = os.environ.get("CXX", "g++")
COUNTERS = (
    *("threads", "switches", "launches", "loaded", "stored", "cached", "accesses", "wide", "loaded_wide"),
    *("sectors", "ideal_sectors", "bank_passes", "bank_excess", "mma", "ldsm", "ldsm_conflicts"),
)


def includes() -> list[str]:
    return [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]


def torch_flags() -> list[str]:
    """What the bindings are compiled with beside the above: as in CMakeLists.txt."""
    folders = [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"])]
    pybind = find_spec("pybind11")
    if pybind is not None and pybind.origin is not None:
        folders.insert(0, Path(pybind.origin).parent / "include")  # before torch's copy of it
    definitions = ["-DFASTNN_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    return [*definitions, *(word for path in folders for word in ("-isystem", str(path)))]


def fingerprint(source: Path, flags: list[str]) -> str:
    """Of a source, its flags and every header that it can see: kernels include no header of the bindings or the CPU."""
    folders = ("cuda", "params") if source.suffix == ".cu" else ("cuda", "params", "bindings", "cpu")
    headers = [path for folder in folders for path in (ROOT / "csrc" / folder).glob("*.*h")]
    found = hashlib.sha256(" ".join((COMPILER, torch.__version__, *flags)).encode())
    for path in (source, *sorted([*headers, *HERE.glob("*.h")])):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def compile_all(sources: list[tuple[Path, list[str]]], folder: Path, processes: int | None = None) -> list[Path]:
    """Compiles each source with its flags; RuntimeError with the compiler's words."""

    def one(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        out = folder / f"{source.parent.name}_{source.stem}_{fingerprint(source, flags)}.o"
        if out.exists():
            return out
        part = out.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-x", "c++", "-c", str(source), "-o", str(part), *flags]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr[-6000:]}")
        part.rename(out)
        return out

    with ThreadPoolExecutor(processes or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, sources))


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Of test processes side by side one builds, the others wait."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def library_path() -> Path:
    """Builds the library."""
    with alone("library"):
        return _build(FOLDER)


@cache
def library() -> ctypes.CDLL:
    """Builds and loads the library; torch.ops.fastnn_emu has its operators then."""
    path = library_path()
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    for op in OPS:
        raw = torch.ops.fastnn_emu
        pair = [_logged(f"{op}_{way}", getattr(raw, f"{op}_{way}").default) for way in ("fwd", "bwd")]
        _dispatch.register(op, "emulated", _dispatch.Kernels(*pair))
    return loaded


def _precompiled(header: str, folder: Path, flags: list[str]) -> list[str]:
    """Compiles a header once for many sources, each of which would read torch's and pybind11's for five seconds."""
    text = folder / f"{Path(header).stem}_{fingerprint(ROOT / 'csrc' / header, flags)}.h"
    out = text.with_suffix(".h.gch")
    if not out.exists():
        text.write_text(f'#include "{header}"\n')
        part = out.with_suffix(f".{os.getpid()}")
        subprocess.run([COMPILER, "-x", "c++-header", str(text), "-o", str(part), *flags], check=True)
        part.rename(out)
    return ["-include", str(text)]


def _build(folder: Path) -> Path:
    plain = [*EMULATE, "-Werror", "-O1", *includes()]  # -O2 compiles a third longer: 15 s of a core
    binding = [*plain, "-fvisibility=hidden", *torch_flags()]
    with ThreadPoolExecutor(1) as pool:
        header = pool.submit(_precompiled, "bindings/tensor.h", folder, binding)
        objects = compile_all([(source, plain) for source in (*KERNELS, *CORE, *GLUE)], folder)
        binding += header.result()
    objects += compile_all([(source, binding) for source in BINDINGS], folder)
    made_of = hashlib.sha256(" ".join(object.name for object in objects).encode()).hexdigest()[:16]
    path = folder / f"libfastnn_emu_{made_of}.so"
    if not path.exists():
        torch_cpu = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
        part = path.with_suffix(f".{os.getpid()}")
        link = [COMPILER, "-shared", *map(str, objects), str(torch_cpu), "-o", str(part)]
        subprocess.run([*link, "-Wl,--allow-shlib-undefined"], check=True)
        part.rename(path)
    return path


def _logged(kernel, handle):
    def call(*arguments):
        if _record._runs is not None:
            _record._runs.append(_record.KernelRun(kernel, "emulated", ""))
        return handle(*arguments)

    return call


def counters() -> dict[str, int]:
    """What was counted since the last call; see emu::Counters."""
    values = (ctypes.c_uint64 * len(COUNTERS))()
    assert library().fastnn_emu_counters(values, len(COUNTERS)) == len(COUNTERS)
    return dict(zip(COUNTERS, values, strict=True))


@contextmanager
def tracing() -> Iterator[None]:
    """Counts sectors of global memory and bank conflicts of shared memory inside the block."""
    library().fastnn_emu_trace(1)
    try:
        yield
    finally:
        library().fastnn_emu_trace(0)


@dataclass(frozen=True)
class Emulated(Target):
    """The CUDA kernels on the CPU: in which order threads run, whether copies to shared memory land late or early."""

    backend: str = "emulated"
    order: str = "forward"
    early: bool = False
    multiprocessors: int = 132
    """Of the GPU that launch policies believe in: few make long rows be shared out less."""

    def __str__(self) -> str:
        return f"emulated-{self.order}{'-early' if self.early else ''}"

    def takes(self, case):
        return case.op in OPS and case.forward_kernel == f"{case.op}_fwd"

    @contextmanager
    def forced(self) -> Iterator[None]:
        assert library().fastnn_emu_set(self.order.encode(), int(self.early), self.multiprocessors)
        before = _dispatch.pick
        _dispatch.pick = lambda op, x: "emulated"
        try:
            yield
        finally:
            _dispatch.pick = before
