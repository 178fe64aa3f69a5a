"""Compiles the Triton kernels for GPUs that need not be here, and holds what comes out to rules.

    python tools/triton_aot.py [--arch sm_90,gfx942] [--only WORDS] [--json FILE] [--out FOLDER] [--odd]

The operators run on tensors without memory; every launch is recorded instead of made and compiled as the launch would
have been (types, alignment, configuration of that architecture). Rules: it compiles; nothing spills; shared memory
fits; products in half precision use wgmma on sm_90 and tcgen05 on sm_100. Exit status 1 where one is broken. `--out`
keeps the machine code of NVIDIA's targets, each with what tools/gpu_audit needs to know of it. `--odd` takes shapes
whose rows no 16 elements divide instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from triton_cases import TYPES, cases

from fastnn.kernels import config

MATRIX = ("matmul", "matmul_bulk", "attention_rows_fwd", "attention_dq", "attention_dkv")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
GFX_SHARED = 65536


@dataclass(frozen=True)
class Launch:
    """A kernel and everything its compilation depends on."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    case: str


@dataclass
class Row:
    """What was compiled."""

    case: str
    kernel: str
    arch: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    matrix: str
    broken: str


def launch_of(kernel: JITFunction, case: str, args: tuple[Any, ...], options: dict[str, int]) -> Launch:
    """As the JIT specializes: 16-byte pointers and multiples of 16 are aligned, 1 and None are constants."""
    signature, constants, aligned = {}, {}, []
    for parameter, value in zip(kernel.params, args, strict=True):
        name = parameter.name
        if parameter.is_constexpr or value is None or isinstance(value, bool):
            kind, constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            kind = "*" + TYPES[value.dtype]
            aligned.append(name)
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int) and value == 1:
            kind, constants[name] = "constexpr", 1
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            kind = "fp32"
        signature[name] = kind
    pairs = (tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(sorted(options.items())))
    return Launch(kernel, *pairs, case)


def launches(arch: config.Arch, only: str, odd: bool = False) -> list[Launch]:
    """Every distinct launch of the cases on that architecture."""
    found: dict[Any, Launch] = {}
    case = ""

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: int) -> None:
        launch = launch_of(self, case, args, options)
        found.setdefault((id(self), launch.signature, str(launch.constants), launch.aligned, launch.options), launch)

    before, JITFunction.run = JITFunction.run, record
    config.assumed = arch
    try:
        for name, run in cases(odd):
            if only in name:
                case = name
                run()
    finally:
        JITFunction.run, config.assumed = before, None
    return list(found.values())


def target_of(arch: str) -> GPUTarget:
    """Triton's name of it."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def keep(binary: Any, launch: Launch, row: Row, half: bool, folder: Path) -> None:
    """The machine code and its description under one name; of AMD's code what was read from its text."""
    digest = hashlib.sha256(str(replace(launch, case="")).encode()).hexdigest()  # whichever case came to it first
    stem = f"{row.kernel}-{digest[:10]}.{row.arch}"
    constants = ", ".join(f"{name}={value}" for name, value in launch.constants)
    module = launch.kernel.__module__.rpartition(".")[2]
    about = {"kernel": f"{module}.{row.kernel}", "config": f"{row.case}: {constants}", "shared": row.shared}
    if row.arch.startswith("sm_"):
        (folder / f"{stem}.cubin").write_bytes(binary.asm["cubin"])
        about |= {"num_warps": row.warps, "arch": int(row.arch[3:])}
    else:
        wide = re.search(r"(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)", binary.asm["amdgcn"]) is not None
        about |= {"warps": row.warps, "arch": row.arch, "registers": row.registers, "spills": row.spills}
        about |= {"mfma": row.matrix == "mfma", "wide": wide, "half": half}
    (folder / f"{stem}.json").write_text(json.dumps(about))


def compiled(launch: Launch, arch: config.Arch, folder: Path | None = None) -> Row:
    """Compiles and reads what came out."""
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(
        launch.kernel, dict(launch.signature), {(names.index(n),): v for n, v in launch.constants}, attributes
    )
    options = dict(launch.options)
    row = Row(
        launch.case,
        launch.kernel.__name__,
        arch.name,
        options.get("num_warps", 4),
        options.get("num_stages", 3),
        0,
        0,
        0,
        "",
        "",
    )
    try:
        binary = triton.compile(source, target=target_of(arch.name), options=options)
    except Exception as error:
        row.broken = f"does not compile: {type(error).__name__}: {error} {error.__cause__}"
        return row
    row.shared = binary.metadata.shared
    half = not {"*fp32"} & {dict(launch.signature).get(name) for name in ("a_ptr", "q_ptr")}
    if arch.name.startswith("sm_"):
        ptx = binary.asm["ptx"]
        found = [word for word in ("wgmma", "tcgen05.mma", "mma.sync") if word in ptx]
        row.registers, row.spills = _resources(binary.asm["cubin"])
        wanted = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}.get(arch.name, "mma.sync")
        rows = "BN" if launch.kernel.__name__ == "attention_dkv" else "BM"  # of the first operand: these take 64
        small = dict(launch.constants).get(rows, 64) < 64
    else:
        text = binary.asm["amdgcn"]
        found = ["mfma"] if "v_mfma" in text else []
        row.registers = int((re.search(r"\.vgpr_count:\s+(\d+)", text) or [0, "0"])[1])
        row.spills = int((re.search(r"\.vgpr_spill_count:\s+(\d+)", text) or [0, "0"])[1])
        wanted, small = "mfma", False
    row.matrix = ",".join(found)
    if folder is not None:
        keep(binary, launch, row, half, folder)
    if row.spills:
        row.broken = f"spills {row.spills}"
    elif row.shared > arch.shared:
        row.broken = f"needs {row.shared} bytes of shared memory of {arch.shared}"
    elif launch.kernel.__name__ in MATRIX and half and not small and wanted not in found:
        row.broken = f"no {wanted}"
    return row


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (0, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default=",".join(name for name in config.ARCHS if name != "interpreted"))
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the machine code")
    parser.add_argument("--odd", action="store_true", help="shapes whose rows no 16 elements divide")
    parser.add_argument("--every", type=int, default=1, help="only each n-th launch")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.arch.split(","):
        arch = config.ARCHS[name]
        for launch in launches(arch, arguments.only, arguments.odd)[:: arguments.every]:
            row = compiled(launch, arch, arguments.out)
            rows.append(row)
            print(
                f"{row.arch:7} {row.kernel:24} {row.case:34} warps {row.warps:2} stages {row.stages} registers "
                f"{row.registers:3} spills {row.spills:4} shared {row.shared:6} {row.matrix:18} {row.broken}",
                flush=True,
            )
    broken = [row for row in rows if row.broken]
    print(f"{len(rows)} compiled, {len(broken)} break a rule")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
