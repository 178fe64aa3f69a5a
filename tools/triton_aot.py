"""Compiles the Triton kernels for GPUs that need not be here, and holds what comes out to rules.

    python tools/triton_aot.py [--arch sm_90,gfx942] [--only WORDS] [--json FILE] [--out FOLDER]

The operators run on tensors without memory; every launch is recorded instead of made and compiled as the launch would
have been (types, alignment, configuration of that architecture). Rules: it compiles; nothing spills; shared memory
fits; products in half precision use wgmma on sm_90 and tcgen05 on sm_100. Exit status 1 where one is broken. `--out`
keeps the machine code of NVIDIA's targets, each with what tools/gpu_audit needs to know of it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastnn import kernels
from fastnn.kernels import config

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float64: "fp64",
}
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


def launches(arch: config.Arch, only: str) -> list[Launch]:
    """Every distinct launch of the cases on that architecture."""
    found: dict[Any, Launch] = {}
    case = ""

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: int) -> None:
        launch = launch_of(self, case, args, options)
        found.setdefault((id(self), launch.signature, str(launch.constants), launch.options), launch)

    before, JITFunction.run = JITFunction.run, record
    config.assumed = arch
    try:
        for name, run in cases():
            if only in name:
                case = name
                run()
    finally:
        JITFunction.run, config.assumed = before, None
    return list(found.values())


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that reach every kernel in every configuration, in float32, TF32 and bfloat16 (float16 is cut alike)."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from ((f"{name} {TYPES[dtype]}", run) for name, run in _row_cases(dtype))
        yield from ((f"{name} {TYPES[dtype]}", run) for name, run in _matrix_cases(dtype))
    for name, run in _matrix_cases(torch.float32):
        if not name.startswith("attention") or name in ("attention 64 ", "attention 256 "):
            yield f"{name} tf32", functools.partial(_with_tf32, run)


def _with_tf32(run: Callable[[], Any]) -> None:
    allowed = [patch.object(module, "precision_of", lambda x: "tf32") for module in (kernels.matmul, kernels.attention)]
    with allowed[0], allowed[1]:
        run()


def _row_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    def x(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    float32 = torch.float32
    for n in (64, 1024, 4096, 16384, 50000):
        yield f"softmax {n}", lambda n=n: kernels.softmax.softmax_fwd(x(4096, n), 1, False, None)
        yield f"softmax {n}", lambda n=n: kernels.softmax.softmax_bwd(x(4096, n), x(4096, n), 1, False, dtype)
        for rms in (False, True):
            options = (1, 1e-5, rms, True)
            w, b = x(n), None if rms else x(n)
            yield f"norm {n}", lambda n=n, w=w, b=b, o=options: kernels.norm.norm_fwd(x(4096, n), None, w, b, *o)
            yield f"norm {n}", lambda n=n, w=w, b=b, o=options: kernels.norm.norm_fwd(x(4096, n), x(4096, n), w, b, *o)
            mask = [True, True, not rms]
            yield (
                f"norm {n}",
                lambda n=n, w=w, rms=rms, mask=mask: kernels.norm.norm_bwd(
                    x(4096, n), None, x(4096, n), w, x(4096, 2, of=float32), 1, rms, dtype, mask
                ),
            )
    yield from _elementwise_cases(x)
    yield "softmax columns", lambda: kernels.softmax.softmax_fwd(x(64, 128, 64), 1, True, None)
    yield "softmax columns", lambda: kernels.softmax.softmax_bwd(x(64, 128, 64), x(64, 128, 64), 1, True, dtype)
    for smoothing, softcap, classes in ((0.0, 0.0, 32000), (0.1, 0.0, 32000), (0.0, 30.0, 1000)):
        target = x(4096, of=torch.int64)
        o = (1, -100, smoothing, 0.0, softcap)
        yield (
            f"cross_entropy {classes}",
            lambda c=classes, t=target, o=o: kernels.cross_entropy.cross_entropy_fwd(x(4096, c), t, None, *o),
        )
        yield (
            f"cross_entropy {classes}",
            lambda c=classes, t=target, o=o: kernels.cross_entropy.cross_entropy_bwd(
                x(of=dtype), x(4096, c), t, None, x(4096, 2, of=float32), x(2, of=float32), *o
            ),
        )


def _elementwise_cases(x: Callable[..., torch.Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every activation alone, and one of them in the other forms."""
    fwd, bwd = kernels.elementwise.activation_fwd, kernels.elementwise.activation_bwd
    t, b = x(4096, 1024), x(1024)
    for code in range(1, 9):
        yield f"activation {code}", lambda code=code: fwd(t, None, None, code, False)
        yield f"activation {code}", lambda code=code: bwd(t, t, None, None, code, False, [True, False, False])
    for name, operands, mask in (
        ("bias", (t, None, b, 4, False), [True, False, True]),
        ("product", (t, t, None, 4, False), [True, True, False]),
        ("packed", (x(4096, 2048), None, None, 4, True), [True, False, False]),
    ):
        yield f"activation {name}", lambda o=operands: fwd(*o)
        yield f"activation {name}", lambda o=operands, m=mask: bwd(t, *o, m)


def _matrix_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    def x(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for m, n, k in ((4096, 4096, 4096), (512, 768, 768), (8, 4096, 4096), (32, 1024, 1024)):
        for activation in (0, 2):
            yield (
                f"linear {m}x{n}x{k}",
                lambda m=m, n=n, k=k, a=activation: kernels.linear.linear_fwd(x(m, k), x(n, k), x(n), a, a == 2),
            )
        yield (
            f"linear {m}x{n}x{k}",
            lambda m=m, n=n, k=k: kernels.linear.linear_bwd(x(m, n), x(m, k), x(n, k), x(m, n), 2, [m, k], [True] * 3),
        )
    plain = (0.0, 0.125, 0.0, -1, -1)
    options = {"": plain, "causal": (0.0, 0.125, 0.0, -1, 0), "softcap dropout window": (0.1, 0.1, 9.0, 128, 0)}
    options["mask"] = plain
    for d in (16, 64, 128, 256):
        for name, o in options.items():
            mask = x(1024) if name == "mask" else None
            seed = torch.zeros((), dtype=torch.int64)
            lse = torch.empty((2, 8, 1024), dtype=torch.float32, device="meta")
            for length in (1, 1024) if name == "causal" else (1024,):
                q, k = x(2, 8, length, d), x(2, 8, 1024, d)
                yield (
                    f"attention {d} {name}",
                    lambda q=q, k=k, m=mask, o=o, s=seed: kernels.attention.attention_fwd(q, k, k, m, s, *o),
                )
            q = x(2, 8, 1024, d)
            yield (
                f"attention {d} {name}",
                lambda q=q, m=mask, o=o, s=seed, lse=lse: kernels.attention.attention_bwd(q, q, q, q, m, s, q, lse, *o),
            )


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
    parser.add_argument("--every", type=int, default=1, help="only each n-th launch")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.arch.split(","):
        arch = config.ARCHS[name]
        for launch in launches(arch, arguments.only)[:: arguments.every]:
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
