"""The audit of GPU kernels: occupancy as NVIDIA computes it, rules that fail, tables. Needs neither GPU nor nvcc."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parent.parent / "tools" / "gpu_audit"


@pytest.fixture(scope="module")
def audit():
    names = ("sass", "occupancy", "cubins", "rules", "amd", "report")
    sys.path.insert(0, str(AUDIT))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(AUDIT))
        for name in names:
            sys.modules.pop(name, None)


# By NVIDIA's cuda_occupancy.h: architecture, threads, registers, bytes of shared memory, blocks of a multiprocessor.
KNOWN = [
    (80, 256, 32, 0, 8),
    (80, 128, 255, 0, 2),
    (86, 130, 66, 7728, 5),
    (89, 223, 65, 0, 4),
    (90, 150, 98, 0, 3),
    (90, 256, 25, 1280, 8),
    (90, 128, 128, 98304, 2),
    (100, 139, 127, 76254, 3),
    (120, 307, 43, 0, 4),
    (120, 128, 64, 101376 - 1024, 1),
]


@pytest.mark.parametrize(("arch", "threads", "registers", "shared", "blocks"), KNOWN)
def test_occupancy_is_nvidias(audit, arch, threads, registers, shared, blocks):
    assert audit["occupancy"].occupancy(arch, threads, registers, shared).blocks == blocks


def test_what_does_not_fit_says_why(audit):
    occupancy = audit["occupancy"].occupancy
    assert "shared memory" in occupancy(89, 128, 32, 120 << 10).limiter
    assert "registers" in occupancy(90, 1024, 128, 0).limiter


DISASSEMBLY = """
	.target	sm_90
	.section	.nv.info._Z1kv,"",@"SHT_CUDA_INFO"
	//----- nvinfo : EIATTR_KPARAM_INFO
        /*0010*/ 	.word	0x00000000
	//----- nvinfo : EIATTR_MAX_THREADS
        /*0048*/ 	.byte	0x04, 0x05
        /*004c*/ 	.word	0x00000100
        /*0050*/ 	.word	0x00000001
        /*0054*/ 	.word	0x00000002
//--------------------- .text._Z1kv --------------------------
_Z1kv:
.text._Z1kv:
        /*0000*/                   LDG.E.U16 R1, desc[UR8][R4.64] ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R4.64] ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/                   STG.E desc[UR6][R4.64], R8 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   STL [R1], R2 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
//--------------------- .nv.shared --------------------------
"""
RESOURCES = " Function _Z1kv:\n  REG:40 STACK:8 SHARED:1280 LOCAL:0 CONSTANT[0]:552\n"


@pytest.fixture
def kernel(audit, monkeypatch):
    monkeypatch.setattr(audit["sass"], "run", lambda name, *a: DISASSEMBLY if name == "nvdisasm" else RESOURCES)
    (found,) = audit["sass"].kernels(Path("k.cubin"))
    return found


def test_the_machine_code_is_read(kernel):
    assert (kernel.arch, kernel.registers, kernel.stack, kernel.static_shared) == (90, 40, 8, 256)
    assert kernel.max_threads == 512
    assert kernel.counts["tensor"] == 1 and kernel.counts["spill"] == 1
    assert [i.opcode.split(".")[0] for i in kernel.hot] == ["LDG", "HMMA", "STG", "BRA"]
    assert kernel.wide_share == 16 / 20 and kernel.has_wide


def test_rules_name_who_breaks_them(audit, kernel):
    found = audit["cubins"].Found(kernel, "CUDA", "attention_fwd_kernel", "Half, 64", 512, 0)
    assert [text.split(": ")[1] for text in audit["rules"].broken([found])] == ["no spills"]
    kernel.code = [i for i in kernel.code if i.kind not in ("spill", "tensor")]
    (problem,) = audit["rules"].broken([found])
    assert problem.startswith("sm_90 CUDA attention_fwd_kernel<Half, 64>: tensor cores") and "no tensor-core" in problem
    kernel.code = [i for i in kernel.code if i.bytes != 16]
    kernel.max_threads = 0
    found.name, found.dynamic_shared = "softmax_held", 1 << 20
    assert [text.split(": ")[1] for text in audit["rules"].broken([found])] == [
        "can be launched",
        "a path of 128-bit accesses",
        "launch bounds",
    ]
    kernel.max_threads, found.dynamic_shared, found.name = 512, 0, "softmax_parts"
    assert audit["rules"].broken([found]) == []


@pytest.mark.parametrize(
    ("demangled", "name", "variant"),
    [
        (
            "void fastnn::(anonymous namespace)::softmax_held<float, 4>(fastnn::SoftmaxParams)",
            "softmax_held",
            "float, 4",
        ),
        ("plain(int)", "plain", ""),
        ("void fastnn::cuda::k<fastnn::Half, S{3, 4}>(X<int>)", "k", "Half, S{3, 4}>(X<int"),
    ],
)
def test_names_are_short(audit, demangled, name, variant):
    assert audit["cubins"].short(demangled)[0] == name
    assert audit["cubins"].short(demangled)[1].startswith(variant[:10])


def test_amd_kernels_are_noted(audit, kernel, tmp_path):
    amd = audit["amd"]
    good = {"kernel": "attention.attention_dq", "config": "64", "arch": "gfx942", "warps": 4, "registers": 128}
    good |= {"spills": 0, "shared": 4096, "mfma": True, "wide": True, "half": True}
    bad = {**good, "spills": 3, "shared": 1 << 17, "mfma": False, "wide": False}
    for name, one in (("a", good), ("b", bad)):
        (tmp_path / f"{name}.gfx942.json").write_text(json.dumps(one))
    (tmp_path / "c.sm_90.json").write_text("{}")
    found = amd.notes([tmp_path, tmp_path / "libc.so"])
    assert [note.spills for note in found] == [0, 3]
    assert [text.split(": ")[1].split(" ")[0] for text in amd.broken_notes(found)] == ["no", "can", "matrix", "a"]
    page = audit["report"].document([audit["cubins"].Found(kernel, "CUDA", "x", "", 512, 0)], [], found)
    assert "3 kernels and variants, for sm_90, gfx942" in page
    assert "| attention.attention_dq | 2 | 256 | 128 | 3 | 4-128 | 1 of 2 | 1 of 2 |" in page


def test_the_document_has_kernels_and_bounds(audit, kernel):
    kernel.code = [i for i in kernel.code if i.kind != "spill"]
    found = [audit["cubins"].Found(kernel, "CUDA", "gemm_kernel", "Half", 512, 0)]
    text = audit["report"].document(found, [])
    assert "| gemm_kernel (CUDA) | 1 | 512 | 40 | 0 | 0.2 | 80 % | HMMA | 75 % (registers) |" in text
    assert "no rule is broken" in text and "## Bounds" in text
    line = next(line for line in text.splitlines() if line.startswith("| softmax_fwd/bf16 | 49152x512 |"))
    assert "| 101 | 0.805 | 49.4 us, memory | 30.0 us, memory |" in line
    rows = text[text.index("## Bounds") :].count("\n| ")
    from fastnn.testing.bench_cases import bench_cases, families

    assert rows - 2 == sum(len(bench_cases(family, "cuda")) for family in families())
