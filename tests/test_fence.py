"""The build's instruction-set fence: clean objects pass, each kind of leak is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parent.parent / "csrc" / "tools" / "check_fence.py"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
FLAGS = ["-std=c++20", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-lto", "-fvisibility=hidden", "-c"]

TABLE = """
struct T { float (*f)(const float*, long); };
extern "C" { extern const T fastnn_table_x; }
"""
CLEAN = (
    TABLE
    + """
namespace {
float sum(const float* x, long n) {
  float s = 0;
  for (long i = 0; i < n; ++i) s += x[i];
  return s;
}
}
const T fastnn_table_x{&sum};
"""
)


def kernel(body: str, before: str = "") -> str:
    """A source whose table's one function has this body."""
    return (
        f"{before}{TABLE}namespace {{ float f(const float* x, long n) {{ {body} }} }}\nconst T fastnn_table_x{{&f}};\n"
    )


# What leaked -> (source, optimisation, text that the message must hold).
LEAKS = {
    "weak_template": (kernel("return std::max(x[0], x[n]);", "#include <algorithm>\n"), "-O0", "std::max<float>"),
    "inline_function": (
        kernel("return twice(x[n]);", "inline __attribute__((noinline)) float twice(float x) { return 2 * x; }\n"),
        "-O2",
        "defines twice(float)",
    ),
    "global": (CLEAN + "float helper(float x) { return x; }\n", "-O2", "defines helper(float)"),
    "variable": (CLEAN + "int counter = 1;\n", "-O2", "defines counter"),
    "allocation": (kernel("return std::vector<float>(x, x + n)[1];", "#include <vector>\n"), "-O2", "operator"),
    "call": (kernel("return elsewhere(x[n]);", "float elsewhere(float);\n"), "-O2", "calls elsewhere(float)"),
    "static_initialiser": (
        CLEAN
        + 'extern "C" float expf(float);\nnamespace { volatile float y = 1; const volatile float z = expf(y); }\n',
        "-O2",
        "at start",
    ),
    "no_table": ("namespace { int unused [[maybe_unused]] = 1; }\n", "-O2", "defines no fastnn_table_*"),
}

pytestmark = pytest.mark.skipif(
    not COMPILERS or not shutil.which("nm"), reason="needs a C++ compiler (g++ or clang++) and nm on PATH"
)


def run_check(folder: Path, compiler: str, source: str, optimisation: str) -> tuple[subprocess.CompletedProcess, Path]:
    (folder / "sample.cpp").write_text(source)
    obj, stamp = folder / "sample.o", folder / "stamp"
    environment = {k: v for k, v in os.environ.items() if k not in ("CPATH", "CPLUS_INCLUDE_PATH")}
    command = [compiler, *FLAGS, optimisation, str(folder / "sample.cpp"), "-o", str(obj)]
    subprocess.run(command, check=True, env=environment)
    command = [sys.executable, str(CHECK), "nm", str(stamp), str(obj)]
    return subprocess.run(command, text=True, capture_output=True), stamp


@pytest.mark.parametrize("compiler", COMPILERS)
def test_clean_object_passes(compiler, tmp_path):
    result, stamp = run_check(tmp_path, compiler, CLEAN, "-O2")
    assert result.returncode == 0, result.stderr
    assert stamp.exists()


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("leak", LEAKS)
def test_leak_fails_the_build_and_is_named(compiler, leak, tmp_path):
    source, optimisation, text = LEAKS[leak]
    result, stamp = run_check(tmp_path, compiler, source, optimisation)
    assert result.returncode == 1
    assert text in result.stderr
    assert "sample.o" in result.stderr
    assert not stamp.exists(), "a broken fence must not leave a stamp: the next build would take it for clean"


def test_wrong_usage_is_refused():
    result = subprocess.run([sys.executable, str(CHECK), "nm"], text=True, capture_output=True)
    assert result.returncode == 2
    assert "usage" in result.stderr
