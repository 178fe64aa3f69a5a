"""What a cubin says of its kernels: resources, launch bounds, and the machine code by kinds of instructions."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
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


def summaries(cubins: Sequence[Path], cache: Path | None = None) -> list[list[Summary]]:
    """The kernels of each cubin, by name; from `cache` where one of the same bytes was read before by this source."""
    if cache is None:
        return [[Summary.of(kernel) for kernel in here] for here in kernels(cubins)]
    source = Path(__file__).read_bytes()
    places = [cache / f"{hashlib.sha256(source + cubin.read_bytes()).hexdigest()[:32]}.json" for cubin in cubins]
    new = [(cubin, place) for cubin, place in zip(cubins, places, strict=True) if not place.exists()]
    for here, (_, place) in zip(summaries([cubin for cubin, _ in new]), new, strict=True):
        partial = place.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps([asdict(one) for one in here]), "utf-8")
        partial.rename(place)
    return [[Summary(**one) for one in json.loads(place.read_text("utf-8"))] for place in places]


def kernels(cubins: Sequence[Path]) -> list[list[Kernel]]:
    """The kernels of each cubin, by name.

    nvdisasm takes half a second to start, so that it is given the code of all cubins of an architecture at once.
    """
    found: list[list[Kernel]] = []
    waiting: dict[int, list[tuple[Kernel, bytes]]] = {}
    for cubin in cubins:
        data = cubin.read_bytes()
        arch, parts = _arch(cubin, data), dict(_sections(data))
        here = {name: Kernel(name, arch, *fields) for name, fields in _resources(cubin, arch).items()}
        for name, kernel in here.items():
            kernel.max_threads = _max_threads(parts.get(f".nv.info.{name}", b""))
            waiting.setdefault(arch, []).append((kernel, parts[f".text.{name}"]))
        found.append([here[name] for name in sorted(here)])
    for arch, pieces in waiting.items():
        for (kernel, _), code in zip(pieces, _disassembled(arch, [code for _, code in pieces]), strict=True):
            kernel.code = code
    return found


def _arch(cubin: Path, data: bytes) -> int:
    """90 for sm_90: a byte of the ELF header's flags, another one from version 8 of the format on."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError(f"{cubin}: not a cubin")
    flags: int = struct.unpack_from("<I", data, 0x30)[0]
    return (flags >> 8 if data[8] >= 8 else flags) & 0xFF


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of the sections of an ELF file of 64 bits."""
    (at,), (count, names) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3C)
    headers = [struct.unpack_from("<II16xQQ", data, at + 64 * i) for i in range(count)]
    for name, kind, start, size in headers:
        first = headers[names][2] + name
        nobits = kind == 8
        yield data[first : data.index(0, first)].decode(), b"" if nobits else data[start : start + size]


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


MAX_THREADS, REQUIRED_THREADS = 0x05, 0x10
"""Attributes of a kernel's info section: threads in x, y and z."""


def _max_threads(info: bytes) -> int:
    """Of a launch of that kernel, 0 where it has no bounds.

    Each attribute is a format, a number, and two bytes of value; of format 4 these are the size of what follows.
    """
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:
            if attribute in (MAX_THREADS, REQUIRED_THREADS):
                return math.prod(struct.unpack_from("<III", info, at))
            at += size
    return 0


def _disassembled(arch: int, pieces: Sequence[bytes]) -> list[list[Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(pieces))
        file.flush()
        text = run("nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", file.name)
    ends = list(itertools.accumulate(map(len, pieces)))
    lines: list[list[tuple[int, str, str]]] = [[] for _ in pieces]
    piece = 0
    for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", text):
        at = int(match[1], 16)
        while at >= ends[piece]:
            piece += 1
        lines[piece].append((at, match[2], match[3]))
    return [_with_loops(here) for here in lines]


def _with_loops(lines: Sequence[tuple[int, str, str]]) -> list[Instruction]:
    """Loops are backward branches; what lies between a branch and its target is inside."""
    place = {at: i for i, (at, _, _) in enumerate(lines)}
    loops: list[list[int]] = [[] for _ in lines]
    for i, (_, opcode, rest) in enumerate(lines):
        targets = re.findall(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else []
        start = place.get(int(targets[-1], 16), i) if targets else i
        for j in range(start, i + 1) if start < i else ():  # a branch to itself ends every kernel
            loops[j].append(i)
    return [Instruction(op, rest, tuple(loops[i])) for i, (_, op, rest) in enumerate(lines)]
