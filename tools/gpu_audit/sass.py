"""What a cubin says of its kernels: resources, launch bounds, and the machine code by kinds of instructions."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

KINDS = (
    ("tensor", r"(HMMA|HGMMA|QGMMA|IGMMA|IMMA|QMMA|OMMA|UTC\w*MMA)"),
    ("async copy", r"(LDGSTS|UTMALDG|UBLKCP|UTMASTG)"),
    ("spill", r"(LDL|STL)"),
    ("ldmatrix", r"(LDSM|STSM)"),
    ("global load", r"LDG(?!DEPBAR)"),
    ("global store", r"STG"),
    ("shared", r"(LDS|STS)"),
    ("atomic", r"(ATOM|RED)\b"),
    ("barrier", r"(BAR|SYNCS)"),
    ("shuffle", r"SHFL"),
    ("special", r"MUFU"),
    ("float", r"(FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2)"),
)
"""Kind -> instructions, the first that matches."""

GLOBAL = ("global load", "global store", "async copy")


@functools.cache
def _kind(opcode: str) -> str:
    if opcode.startswith("LDGDEPBAR"):
        return "other"
    return next((kind for kind, pattern in KINDS if re.match(pattern, opcode)), "other")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    opcode: str
    rest: str
    loops: tuple[int, ...] = ()
    """The loops that it is in, by their numbers."""

    @property
    def kind(self) -> str:
        """Its name in `KINDS`, else `other`."""
        return _kind(self.opcode)

    @property
    def bytes(self) -> int:
        """What a load or store moves in each thread."""
        for width, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
            if width in self.opcode:
                return size
        return 4


@dataclass
class Kernel:
    """One kernel in one cubin."""

    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    static_shared: int = 0
    max_threads: int = 0
    """From its launch bounds; 0 where it has none."""
    code: list[Instruction] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """How many instructions there are of each kind."""
        return Counter(instruction.kind for instruction in self.code)

    @property
    def tensor(self) -> list[str]:
        """Its tensor-core instructions, each once."""
        return sorted({i.opcode.split(".")[0] for i in self.code if i.kind == "tensor"})

    @property
    def hot(self) -> list[Instruction]:
        """What is in loops: in those with tensor-core instructions where there are such; all of it without loops."""
        products = {loop for i in self.code if i.kind == "tensor" for loop in i.loops}
        chosen = [i for i in self.code if (products & set(i.loops) if products else i.loops)]
        return chosen or self.code

    @property
    def wide_share(self) -> float | None:
        """Of the bytes that the hot instructions move from and to global memory, the share by 128 bits; None without.

        Of instructions as written: a loop for tails counts as much as the one for the rest.
        """
        found = [i for i in self.hot if i.kind in GLOBAL]
        bulk = [i for i in found if i.opcode.startswith(("UTMA", "UBLKCP"))]
        sizes = [i.bytes for i in found if i not in bulk]
        if not sizes:
            return 1.0 if bulk else None
        return sum(size for size in sizes if size == 16) / sum(sizes)

    @property
    def has_wide(self) -> bool:
        """Whether it has a path that moves 128 bits at a time."""
        return any(i.kind in GLOBAL and (i.bytes == 16 or i.opcode.startswith(("UTMA", "UBLKCP"))) for i in self.code)


@dataclass
class Summary:
    """What the audit asks of a `Kernel`, without its code."""

    name: str
    arch: int
    registers: int
    stack: int
    static_shared: int
    max_threads: int
    counts: dict[str, int]
    tensor: list[str]
    wide_share: float | None
    has_wide: bool

    @classmethod
    def of(cls, kernel: Kernel) -> Summary:
        """Of each kind of instruction a number, 0 where there is none."""
        counts = {kind: kernel.counts[kind] for kind, _ in KINDS}
        sizes = (kernel.registers, kernel.stack, kernel.static_shared, kernel.max_threads)
        return cls(kernel.name, kernel.arch, *sizes, counts, kernel.tensor, kernel.wide_share, kernel.has_wide)


@functools.cache
def tool(name: str) -> str:
    """Where cuobjdump or nvdisasm is: FASTNN_CUDA_TOOLS, PATH, Triton's wheel, NVIDIA's wheels.

    Raises:
        FileNotFoundError: nowhere; says how to get it.
    """
    places = [os.environ.get("FASTNN_CUDA_TOOLS", ""), *os.environ.get("PATH", "").split(os.pathsep)]
    for module, below in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin"), ("nvidia", "cuda_nvdisasm/bin")):
        spec = importlib.util.find_spec(module)
        places += (
            [str(Path(folder) / below) for folder in (spec.submodule_search_locations or ()) if spec] if spec else []
        )
    for place in filter(None, places):
        found = shutil.which(name, path=place)
        if found:
            return found
    raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm (or triton)")


def run(name: str, *arguments: str) -> str:
    """What the tool prints."""
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled name -> as in the source; as it is where c++filt is missing."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, text.splitlines(), strict=True))


def summaries(cubin: Path, cache: Path | None = None) -> list[Summary]:
    """The kernels of a cubin, by name; from `cache` where a cubin of the same bytes was read before by this source."""
    if cache is None:
        return [Summary.of(kernel) for kernel in kernels(cubin)]
    digest = hashlib.sha256(Path(__file__).read_bytes() + cubin.read_bytes()).hexdigest()
    known = cache / f"{digest[:32]}.json"
    if known.exists():
        return [Summary(**one) for one in json.loads(known.read_text("utf-8"))]
    found = summaries(cubin)
    partial = known.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(one) for one in found]), "utf-8")
    partial.rename(known)
    return found


def kernels(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin, by name."""
    text = run("nvdisasm", str(cubin))
    target = re.search(r"\.target\s+sm_(\d+)", text)
    if target is None:
        raise ValueError(f"{cubin}: no target in the disassembly")
    arch = int(target[1])
    found = {name: Kernel(name, arch, *fields) for name, fields in _resources(cubin, arch).items()}
    for name, threads in _max_threads(text).items():
        if name in found:
            found[name].max_threads = threads
    for name, code in _code(text).items():
        if name in found:
            found[name].code = code
    return [found[name] for name in sorted(found)]


def _resources(cubin: Path, arch: int) -> dict[str, tuple[int, int, int]]:
    found, name = {}, ""
    for line in run("cuobjdump", "--dump-resource-usage", str(cubin)).splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and (fields := dict(re.findall(r"(REG|STACK|SHARED):(\d+)", line))):
            shared = int(fields["SHARED"]) - (1024 if arch >= 90 else 0)  # what the system reserves is counted there
            found[name] = (int(fields["REG"]), int(fields["STACK"]), max(shared, 0))
            name = ""
    return found


def _max_threads(text: str) -> dict[str, int]:
    """From the attributes of each kernel's info section: threads in x, y and z."""
    found, name = {}, ""
    waiting: list[int] | None = None
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.nv\.info\.(\S+?),", line):
            name, waiting = match[1], None
        elif "EIATTR_" in line:
            waiting = [] if re.search(r"EIATTR_(MAX_THREADS|REQNTID)\b", line) else None
        elif waiting is not None and (match := re.search(r"\.word\s+0x([0-9a-f]+)", line)):
            waiting.append(int(match[1], 16))
            if len(waiting) == 3:
                found[name], waiting = waiting[0] * waiting[1] * waiting[2], None
    return found


def _code(text: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    lines: list[tuple[str, str, str]] = []
    name = ""
    for line in text.splitlines():
        if match := re.match(r"\.text\.(\S+):", line.strip()):
            if name:
                found[name] = _with_loops(lines)
            name, lines = match[1], []
        elif match := re.match(r"\s*(\.L_x_\d+):", line):
            lines.append((match[1], "", ""))
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", line):
            lines.append(("", match[1], match[2]))
        elif line.startswith("//----") and name:
            found[name] = _with_loops(lines)
            name, lines = "", []
    if name:
        found[name] = _with_loops(lines)
    return found


def _with_loops(lines: list[tuple[str, str, str]]) -> list[Instruction]:
    """Loops are backward branches; what lies between a branch and its label is inside."""
    at = {label: i for i, (label, _, _) in enumerate(lines) if label}
    loops: list[list[int]] = [[] for _ in lines]
    for i, (_, opcode, rest) in enumerate(lines):
        match = re.search(r"\.L_x_\d+", rest) if opcode.startswith("BRA") else None
        start = at.get(match[0], i) if match else i
        if start < i - 1:  # a branch to itself ends every kernel
            for j in range(start, i + 1):
                loops[j].append(i)
    return [Instruction(op, rest, tuple(loops[i])) for i, (_, op, rest) in enumerate(lines) if op]
