"""Prints requirements named in pyproject.toml, one a line, for `pip install -r`.

Usage: requirements.py GROUP...   where GROUP is `build`, `run` or the name of an extra.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip carries the same parser
    from pip._vendor import tomli as tomllib


def main(groups: list[str]) -> int:
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text("utf-8"))
    known = {
        "build": project["build-system"]["requires"],
        "run": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
    }
    unknown = [group for group in groups if group not in known]
    if unknown or not groups:
        print(f"requirements.py: groups are {', '.join(known)}; got {' '.join(groups) or 'none'}", file=sys.stderr)
        return 2
    print(*dict.fromkeys(line for group in groups for line in known[group]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
