"""Prints the folder of the torch package to build against, without importing it; exits 1 where there is none.

Under pip's build isolation the interpreter sees only the build requirements; `-I` (ignore PYTHON* and so pip's
overlay) shows the environment that asked for the build.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path


def torch_folder() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent)
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    outer = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True).stdout.strip()
    return str(Path(outer).parent) if outer else ""


if __name__ == "__main__":
    folder = torch_folder()
    print(folder)
    sys.exit(0 if folder else 1)
