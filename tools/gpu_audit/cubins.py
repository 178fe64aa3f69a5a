"""Where kernels come from: cubins, objects and libraries that nvcc made, and what tools/triton_aot.py made."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sass import Kernel, Summary, demangled, summaries, tool

ROOT = Path(__file__).resolve().parents[2]
TOGETHER = 64
"""Cubins that a process reads at a time."""


@dataclass
class Found:
    """A kernel with what its launch adds."""

    kernel: Kernel | Summary
    language: str
    """CUDA or Triton."""
    name: str
    """Short: without namespaces, template and function arguments."""
    variant: str
    """Its template arguments, or Triton's configuration."""
    threads: int
    dynamic_shared: int

    @property
    def shared(self) -> int:
        """Bytes, static and dynamic."""
        return self.kernel.static_shared + self.dynamic_shared


def short(name: str) -> tuple[str, str]:
    """(name, template arguments) of a demangled kernel."""
    name = re.sub(r"\(anonymous namespace\)::|fastnn::(?:cuda::)?", "", name).removeprefix("void ")
    match = re.match(r"([\w:]+)(?:<(.*)>)?\(", name + "(", re.DOTALL)
    return (match[1], match[2] or "") if match else (name, "")


class Policy:
    """Dynamic shared memory by the launch policy's own functions, compiled into a small program."""

    HEADER = ROOT / "csrc" / "cuda" / "policy_matrix.h"
    SOURCE = """
#include "cuda/policy_matrix.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
using namespace fastnn::cuda;
int main(int n, char** a) {
  auto v = [&](int i) { return std::atoi(a[i]); };
  int bytes = 0;
  if (!std::strcmp(a[1], "Large")) bytes = gemm_shared(kLargeTile);
  if (!std::strcmp(a[1], "Medium")) bytes = gemm_shared(kMediumTile);
  if (!std::strcmp(a[1], "Small") || !std::strcmp(a[1], "Plain")) bytes = gemm_shared(kSmallTile);
  if (!std::strcmp(a[1], "gemm_f32")) bytes = gemm_shared_f32(v(2));
  if (!std::strcmp(a[1], "fwd")) bytes = attention_fwd_shared(v(2), v(3));
  if (!std::strcmp(a[1], "dkv")) bytes = attention_dkv_shared(v(2), v(3));
  if (!std::strcmp(a[1], "dq")) bytes = attention_dq_shared(v(2), v(3));
  std::printf("%d", bytes);
}
"""

    def __init__(self) -> None:
        self._program: Path | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._known: dict[tuple[str, ...], int] = {}

    def shared(self, name: str, variant: str) -> int:
        """Bytes of dynamic shared memory of a kernel; 0 for kernels that the policy does not know."""
        query = self._query(name, variant)
        if not query or not self.HEADER.exists():
            return 0
        if query not in self._known:
            self._known[query] = int(
                subprocess.run([self._built(), *query], capture_output=True, text=True).stdout or 0
            )
        return self._known[query]

    @staticmethod
    def _query(name: str, variant: str) -> tuple[str, ...]:
        numbers = re.findall(r"(?<![\w.])\d+(?![\w.])", variant)
        if name == "gemm_kernel" and (tile := re.search(r"\b(Large|Medium|Small|Plain)\b", variant)):
            return (tile[1],)
        if name == "gemm_f32_kernel" and numbers:
            return ("gemm_f32", next((n for n in numbers if n in ("64", "128")), numbers[0]))
        part = re.match(r"attention_(fwd|dkv|dq)\w*kernel", name)
        features = next((n for n in numbers if n in ("64", "128", "256")), "")
        return (part[1], features, "1" if "true" in variant else "0") if part and features else ()

    def _built(self) -> str:
        if self._program is None:
            source, program = (Path(self._folder.name) / name for name in ("shared.cpp", "shared"))
            source.write_text(self.SOURCE)
            subprocess.run(["c++", "-std=c++20", f"-I{ROOT / 'csrc'}", "-o", program, source], check=True)
            self._program = program
        return str(self._program)


def collect(paths: Sequence[Path], cache: Path | None = None, jobs: int = 1) -> list[Found]:
    """Every kernel below the paths, read by `jobs` processes; what a cubin says is kept in the folder `cache`."""
    policy = Policy()
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs) as pool:
        cubins = list(_cubins(paths, Path(folder)))
        together = [cubins[i : i + TOGETHER] for i in range(0, len(cubins), TOGETHER)]
        read = functools.partial(summaries, cache=cache)
        parts = map(read, together) if jobs == 1 else pool.map(read, together)
        for cubin, here in zip(cubins, itertools.chain.from_iterable(parts), strict=True):
            note = cubin.with_suffix(".json")
            if note.exists():
                found += _triton(here, json.loads(note.read_text("utf-8")))
            else:
                found += _cuda(here, policy)
    return found


def _cubins(paths: Sequence[Path], folder: Path) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(p for ending in ("*.cubin", "*.cu.o", "*.so") for p in path.rglob(ending))
            yield from _cubins(inside, folder)
        elif path.suffix == ".cubin":
            yield path
        else:
            into = folder / f"{path.stem}-{abs(hash(str(path)))}"
            into.mkdir()
            subprocess.run([tool("cuobjdump"), "-xelf", "all", str(path.resolve())], cwd=into, capture_output=True)
            yield from sorted(into.glob("*.cubin"))


def _cuda(here: Sequence[Summary], policy: Policy) -> Iterator[Found]:
    names = demangled([kernel.name for kernel in here])
    for kernel in here:
        name, variant = short(names[kernel.name])
        yield Found(kernel, "CUDA", name, variant, kernel.max_threads or 1024, policy.shared(name, variant))


def _triton(here: Sequence[Summary], note: dict[str, object]) -> Iterator[Found]:
    for kernel in here:
        # Triton counts all of its shared memory as given at the launch.
        kernel.static_shared = 0
        threads = 32 * int(str(note["num_warps"]))
        yield Found(
            kernel, "Triton", str(note["kernel"]), str(note.get("config", "")), threads, int(str(note["shared"]))
        )
