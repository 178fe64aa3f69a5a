"""Static audit of the GPU kernels: `python tools/gpu_audit [--write FILE] PATH ...`; status 1 where a rule is broken.

Each PATH is a cubin, an object or library that nvcc made (of any architectures), a folder of such, or a folder that
`tools/triton_aot.py --out` filled. Needs cuobjdump and nvdisasm, no GPU; --cache keeps what was read for the next time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from amd import broken_notes, note_lines, notes  # noqa: E402
from cubins import collect  # noqa: E402
from report import document, kernel_lines  # noqa: E402
from rules import broken  # noqa: E402


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the document (docs/gpu_audit.md)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what each cubin says, by its bytes")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.paths if not path.exists()]
    if missing:
        parser.error(f"no such path: {', '.join(missing)}")
    if arguments.cache:
        arguments.cache.mkdir(parents=True, exist_ok=True)
    found = collect(arguments.paths, arguments.cache, arguments.jobs)
    noted = notes(arguments.paths)
    if not found and not noted:
        parser.error("no kernels in these paths")
    problems = broken(found) + broken_notes(noted)
    if arguments.write:
        arguments.write.write_text(document(found, problems, noted), "utf-8")
    else:
        lines = [*kernel_lines(found, sorted({one.kernel.arch for one in found})), *note_lines(noted)]
        sys.stdout.write("\n".join(lines) + "\n")
    for problem in problems:
        sys.stdout.write(f"RULE BROKEN: {problem}\n")
    sys.stdout.write(f"{len(found) + len(noted)} kernels, {len(problems)} broken rules\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
