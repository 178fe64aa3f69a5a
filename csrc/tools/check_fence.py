"""Build step: fails where an object compiled for one instruction set shares code with the rest of the program.

The linker keeps one copy of every weak (inline, template) symbol and does not care which object it came from: a
`std::max<float>` compiled for AVX-512 may become the one that the scalar path calls, and an older CPU then dies of an
illegal instruction in code that has nothing to do with AVX-512. So each object

* defines `fastnn_table_*` and no other symbol that the linker can see,
* calls nothing outside itself but a handful of C functions that live in shared libraries,
* runs nothing before main: a static initialiser would execute AVX-512 at import.

Usage: check_fence.py NM STAMP OBJECT...
Writes STAMP where every object is clean, else exits 1 and says what leaked and how to mend it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TABLE = re.compile(r"fastnn_table_\w+")

# What a compiler may call from code without library calls of its own, and the few libm entry points that a kernel may.
ALLOWED_UNDEFINED = re.compile(
    r"(__)?mem(cpy|move|set|cmp)(_chk)?"
    r"|(exp|log|log1p|tanh|erf|sqrt|fma)f?"
    r"|__stack_chk_(fail|guard)"
    r"|_GLOBAL_OFFSET_TABLE_"
)

STATIC_INITIALISER = re.compile(r"_GLOBAL__(sub_)?[ID]_|__cxx_global_var_init|__static_initialization_and_destruction")

# What the leaked name looks like -> how to mend it; the first match is printed.
HINTS = {
    STATIC_INITIALISER: "runs before main: make the object constexpr, or build it in the baseline dispatch file",
    re.compile(r"operator (new|delete)|std::__throw|std::(vector|string|function|map)"): (
        "allocating or throwing std code: use caller-owned scratch and plain arrays"
    ),
    re.compile(r"__cxa_|_Unwind|__gxx_personality|typeinfo|vtable"): (
        "exceptions, RTTI or virtual functions: compile with -fno-exceptions -fno-rtti, use plain functions"
    ),
    re.compile(r"__(asan|ubsan|tsan|sanitizer)"): "a sanitizer build: the fence is for release objects, skip it there",
    re.compile(r"^std::|__gnu_cxx::"): (
        "a std template that was not inlined: compile with -O2 or more, or write the helper in the anonymous namespace"
    ),
    re.compile(r"fastnn"): "put it into the anonymous namespace of the object",
}


def symbols(nm: str, obj: str, *options: str) -> list[tuple[str, str]]:
    """(type letter, demangled name) of each symbol of `obj`."""
    listing = subprocess.run([nm, "-C", *options, obj], check=True, text=True, capture_output=True).stdout
    rows = (re.match(r"[0-9a-fA-F]*\s+(\S)\s+(.+)", line) for line in listing.splitlines())
    return [(row[1], row[2].strip()) for row in rows if row]


def leaks(nm: str, obj: str) -> list[str]:
    """What is wrong with `obj`, one line each; empty for a clean object."""
    found = []
    defined = symbols(nm, obj, "--defined-only")
    for kind, name in defined:
        shared = kind in "uvwVW" or (kind.isupper() and kind != "N" and not TABLE.fullmatch(name))
        if shared:
            found.append(f"defines {name}  [{kind}]")
        elif STATIC_INITIALISER.match(name):
            found.append(f"runs {name} at start  [{kind}]")
    if not any(kind.isupper() and TABLE.fullmatch(name) for kind, name in defined):
        found.append("defines no fastnn_table_*: is this an object of one instruction set?")
    found += [
        f"calls {name}  [{kind}]"
        for kind, name in symbols(nm, obj, "--undefined-only")
        if not ALLOWED_UNDEFINED.fullmatch(name.split("@")[0])
    ]
    return [line + hint(line) for line in found]


def hint(line: str) -> str:
    """How to mend the leak that `line` tells of."""
    name = line.split(" ", 1)[1].split("  [")[0].removesuffix(" at start")
    return next((f"\n        -> {advice}" for pattern, advice in HINTS.items() if pattern.search(name)), "")


def main(arguments: list[str]) -> int:
    """Checks every object named on the command line."""
    if len(arguments) < 3:
        print("usage: check_fence.py NM STAMP OBJECT...", file=sys.stderr)
        return 2
    nm, stamp, *objects = arguments
    broken = {obj: lines for obj in objects if (lines := leaks(nm, obj))}
    if broken:
        print("instruction-set fence broken: the linker could mix code of different instruction sets", file=sys.stderr)
        for obj, lines in broken.items():
            print(f"  {obj}", *(f"      {line}" for line in lines), sep="\n", file=sys.stderr)
        return 1
    Path(stamp).write_text("clean: " + " ".join(Path(obj).name for obj in objects) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
