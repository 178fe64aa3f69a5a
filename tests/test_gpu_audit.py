"""The audit of GPU kernels: occupancy as NVIDIA computes it, rules that fail, tables. Needs neither GPU nor nvcc."""

from __future__ import annotations

import importlib
import importlib.util
import json
import struct
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


# What nvdisasm says of two pieces of code, of 128 and of 32 bytes, one after the other.
DISASSEMBLY = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDG.E.U16 R1, desc[UR8][R4.64] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R4.64] ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/                   STG.E desc[UR6][R4.64], R8 ;
        /*0040*/              @!P0 BRA 0x10;
        /*0050*/                   STL [R1], R2 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""
RESOURCES = " Function _Z1kv:\n  REG:40 STACK:8 SHARED:1280 LOCAL:0 CONSTANT[0]:552\n"


def cubin(arch, sections, version):
    """An ELF file with these sections, as far as the audit reads it; the architecture where that version has it."""
    names, table, at = b"\0", [(0, 0, 0, 0)], 64
    for name, contents in sections.items():
        table.append((len(names), 1, at, len(contents)))
        names, at = names + name.encode() + b"\0", at + len(contents)
    table.append((0, 3, at, len(names)))
    header = bytearray(64)
    header[:9] = b"\x7fELF\x02\x01\x01\x41" + bytes([version])
    struct.pack_into("<Q", header, 0x28, at + len(names))
    struct.pack_into("<I", header, 0x30, arch << 8 | 4 if version >= 8 else 0x500500 | arch)
    struct.pack_into("<HH", header, 0x3C, len(table), len(table) - 1)
    headers = [struct.pack("<II16xQQ24x", *entry) for entry in table]
    return bytes(header) + b"".join(sections.values()) + names + b"".join(headers)


# A parameter's attribute, then threads of 256 x 1 x 2.
INFO = struct.pack("<BBHIBBHBBH3I", 4, 0x17, 4, 7, 3, 0x1B, 255, 4, 5, 12, 256, 1, 2)


@pytest.fixture(params=[7, 8], ids="version {}".format)
def kernel(audit, monkeypatch, tmp_path, request):
    monkeypatch.setattr(audit["sass"], "run", lambda name, *a: DISASSEMBLY if name == "nvdisasm" else RESOURCES)
    files = []
    for name, size, info in (("a", 128, INFO), ("b", 32, b"")):
        files.append(tmp_path / f"{name}.cubin")
        sections = {".nv.info._Z1kv": info, ".text._Z1kv": bytes(size)}
        files[-1].write_bytes(cubin(90, sections, request.param))
    (found,), (other,) = audit["sass"].kernels(files)
    assert [i.opcode for i in other.code] == ["EXIT", "BRA"] and other.max_threads == 0
    return found


def test_what_is_no_cubin_is_refused(audit, tmp_path):
    (tmp_path / "k.cubin").write_bytes(b"\x7fELF\x01")
    with pytest.raises(ValueError, match="not a cubin"):
        audit["sass"].kernels([tmp_path / "k.cubin"])


def test_a_broken_rule_fails_the_command(audit, monkeypatch, tmp_path, capsys):
    """Of AMD's notes, which need no tool: status 1 and the rule's words; 0 where all are kept."""
    spec = importlib.util.spec_from_file_location("gpu_audit_command", AUDIT / "__main__.py")
    command = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(command)
    note = {"kernel": "attention.attention_dq", "config": "64", "arch": "gfx942", "warps": 4, "registers": 128}
    note |= {"spills": 0, "shared": 4096, "mfma": True, "wide": True, "half": True}
    monkeypatch.setattr(sys, "argv", ["gpu_audit", str(tmp_path)])
    for spills in (0, 3):
        (tmp_path / "a.gfx942.json").write_text(json.dumps({**note, "spills": spills}))
        assert command.main() == (1 if spills else 0)
        said = capsys.readouterr().out
        assert ("RULE BROKEN: gfx942 Triton attention.attention_dq<64>: no spills: 3" in said) == bool(spills)
        assert f"1 kernels, {1 if spills else 0} broken rules" in said


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
