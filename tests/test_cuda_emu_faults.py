"""Each checker of tests/cuda_emu catches what it is for: faults planted into small kernels and into the real ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))
import emulated_ops as emulated

pytestmark = pytest.mark.skipif(shutil.which(emulated.COMPILER) is None, reason="needs a C++ compiler")
SANITIZERS = {"plain": (), "address": ("-fsanitize=address",), "thread": ("-fsanitize=thread",)}
ORDERS = [("forward", "late"), ("reverse", "early"), ("random:5", "late")]
MATRIX = ("linear", "attention")
KERNELS = {
    "rows": [path for path in emulated.KERNELS if not path.stem.startswith(MATRIX)],
    "matrix": [path for path in emulated.KERNELS if path.stem.startswith(MATRIX)],
}
WORDS = {
    "wrong": "wrong",
    "race": "ThreadSanitizer: data race",
    "shared": "AddressSanitizer: use-after-poison",
    "global": "AddressSanitizer: heap-buffer-overflow",
    "barrier": "cuda_emu: ",
}


def build(folder: Path, name: str, sources: list[Path], kind: str, root: Path = emulated.ROOT) -> Path:
    flags = [*emulated.EMULATE, "-O1", *SANITIZERS[kind], f"-I{root / 'csrc'}", *emulated.includes()]
    objects = folder / kind
    objects.mkdir(parents=True, exist_ok=True)
    made = emulated.compile_all([(source, flags) for source in sources], objects)
    out = folder / f"{name}_{kind}_{made[0].stem}"
    if len(made) > 1 or not out.exists():
        subprocess.run([emulated.COMPILER, *map(str, made), "-o", str(out), *SANITIZERS[kind]], check=True)
    return out


def run(program: Path, *arguments: str, order: str = "forward", copies: str = "late") -> str:
    environment = {
        **os.environ,
        "EMU_ORDER": order,
        "EMU_COPIES": copies,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",  # what follows the first race takes minutes
    }
    # ThreadSanitizer's shadow memory wants the layout that address randomization takes away.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*fixed, str(program), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def selftest():
    def one(kind):
        return build(emulated.FOLDER, "selftest", [emulated.HERE / "selftest.cpp"], kind)

    with emulated.alone("selftest"), ThreadPoolExecutor(2) as pool:
        return dict(zip(SANITIZERS, pool.map(one, SANITIZERS), strict=True))


@pytest.mark.parametrize("kernel", ["neighbours", "lanes", "pipeline", "far_row"])
@pytest.mark.parametrize("kind", SANITIZERS)
def test_nothing_is_found_in_right_kernels(selftest, kind, kernel):
    if (kind, kernel) == ("thread", "far_row"):
        pytest.skip("16 GiB of address space are more than ThreadSanitizer gives")
    for order, copies in ORDERS:
        assert run(selftest[kind], kernel, "none", order=order, copies=copies) == "right\n"


@pytest.mark.parametrize(
    ("kernel", "fault", "kind", "copies", "found"),
    [
        ("neighbours", "no_barrier", "plain", "late", "wrong"),
        ("neighbours", "no_barrier", "thread", "late", "race"),
        ("neighbours", "past_shared", "address", "late", "shared"),
        ("neighbours", "past_global", "address", "late", "global"),
        ("neighbours", "half_barrier", "plain", "late", "barrier"),
        ("lanes", "diverges", "plain", "late", "barrier"),
        ("lanes", "wrong_lane", "plain", "late", "barrier"),
        ("pipeline", "no_wait", "plain", "late", "wrong"),
        ("pipeline", "early_reuse", "plain", "early", "wrong"),
        ("far_row", "int32_offset", "plain", "late", "wrong"),
    ],
)
def test_planted_fault_is_found(selftest, kernel, fault, kind, copies, found):
    assert WORDS[found] in run(selftest[kind], kernel, fault, copies=copies)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SANITIZERS)
@pytest.mark.parametrize("program", KERNELS)
def test_kernels_under_sanitizers(tmp_path, program, kind):
    built = build(tmp_path, program, [emulated.HERE / f"{program}.cpp", *KERNELS[program]], kind)
    for order, copies in ORDERS[:1] if kind == "thread" else ORDERS:
        assert run(built, order=order, copies=copies) == "right\n"
    if kind == "plain":  # 16 GiB of address space: see above
        assert run(built, "far") == "right\n"


# Planted into the real kernels: program (and the one op that it runs), file of csrc/cuda, what stands there, what is
# planted, who must find it
# ("far": the plain build, on rows more than 2^31 elements apart).
REAL_FAULTS = {
    "reduction without its barrier":
        ("rows", "common.cuh", "  __syncthreads();\n#pragma unroll", "#pragma unroll", "plain", "wrong"),
    "reductions in one buffer":
        ("rows norm", "common.cuh", "spare + turn * (kReduceSpare / 2)", "spare", "thread", "race"),
    "an element past the row":
        ("rows", "common.cuh", "const bool inside = first + i >= 0 && first + i < n;",
         "const bool inside = first + i >= 0 && first + i <= n;", "address", "global"),
    "a warp too many":
        ("rows", "common.cuh", "lane < warps ? slots", "lane <= warps ? slots", "plain", "wrong"),
    "column sums without their barrier":
        ("rows", "norm_bwd.cu", "    __syncthreads();\n    }\n    for (int j", "    }\n    for (int j",
         "plain", "wrong"),
    "wrong lanes":
        ("rows", "rows.cuh", "(threadIdx.x) % kLanes", "(threadIdx.x) % (kLanes + 1)", "plain", "wrong"),
    "product without its wait":
        ("matrix", "gemm.cuh", "        cp_async_wait<kStages - 2>();\n        __syncthreads();\n        stage",
         "        __syncthreads();\n        stage", "plain", "wrong"),
    "product without its barrier":
        ("matrix", "gemm.cuh", "        cp_async_wait<kStages - 2>();\n        __syncthreads();\n        stage",
         "        cp_async_wait<kStages - 2>();\n        stage", "thread", "race"),
    "a copy past the operand":
        ("matrix", "gemm.cuh", "return n <= 0 ? 0 : n < 8 ? static_cast<int>(n) : 8;", "return n <= 0 ? 0 : 8;",
         "address", "global"),
    "keys copied past their buffer":
        ("matrix", "attention_tile.cuh", "for (int i = 0; i < kRows / kStep; ++i, from += kStep * stride)\n",
         "for (int i = 0; i <= kRows / kStep; ++i, from += kStep * stride)\n", "address", "shared"),
    "keys reused while they are read":
        ("matrix", "attention_fwd.cuh", "    cp_async_wait<0>();\n    __syncthreads();  // this tile",
         "    cp_async_wait<0>();  // this tile", "thread", "race"),
    "the wrong lanes of a shuffle":
        ("matrix", "attention_fwd.cuh", "fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1))",
         "fmaxf(most, __shfl_xor_sync(0xfffffffeu, most, 1))", "plain", "barrier"),
    "the mask of the next key":
        ("matrix", "attention_tile.cuh", "mask_strides[2] +\n         key *", "mask_strides[2] +\n         (key ^ 1) *",
         "plain", "wrong"),
    "rows' offsets in 32 bits":
        ("rows", "softmax.cu", "static_cast<const TX*>(p.x) + (mine ? r : 0) * p.x_row_stride",
         "static_cast<const TX*>(p.x) + static_cast<int>((mine ? r : 0) * p.x_row_stride)", "far", "wrong"),
    "an operand's offsets in 32 bits":
        ("matrix", "gemm.cuh", "(w0 + first_row) * stride", "static_cast<int>((w0 + first_row) * stride)",
         "far", "wrong"),
    "keys' offsets in 32 bits":
        ("matrix", "attention_tile.cuh", "from += first * stride + chunk * 8;",
         "from += static_cast<int>(first * stride) + chunk * 8;", "far", "wrong"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_FAULTS)
def test_fault_planted_into_a_kernel_is_found(tmp_path, name):
    run_as, file, was, planted, kind, found = REAL_FAULTS[name]
    program, *only = run_as.split()
    root = tmp_path / "copy"
    shutil.copytree(emulated.ROOT / "csrc/cuda", root / "csrc/cuda")
    shutil.copytree(emulated.ROOT / "csrc/params", root / "csrc/params")
    path = root / "csrc/cuda" / file
    text = path.read_text()
    assert text.count(was) == 1, f"{file} has changed: this fault can no longer be planted"
    path.write_text(text.replace(was, planted))
    kernels = [root / "csrc/cuda" / source.name for source in KERNELS[program]]
    if kind == "far":
        kind, only = "plain", ["far"]
    built = build(tmp_path, program, [emulated.HERE / f"{program}.cpp", *kernels], kind, root)
    said = []
    for order, copies in ORDERS:
        said.append(run(built, *only, order=order, copies=copies))
        if WORDS[found] in said[-1] or WORDS["barrier"] in said[-1]:
            return
    pytest.fail(f"{name} was not found: {said}")
