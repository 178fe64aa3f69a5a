"""Plants the faults of faults.py one by one and demands that the suite catches each.

    python tests/faults/plant.py [--jobs 2] [--only WORDS] [--every N] [--keep FOLDER]

The tree is copied once per worker; in the copy one text is replaced, the C++ objects that depend on the file are
compiled again without optimisation (2 to 8 seconds), linked with the others, which are the build's own, and the tests
that the fault names run with -x. They must fail: an error in collecting them, or no test, does not count. Before that
all of them run on the unchanged copy and must pass. Exit status 0 if every fault was caught.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).resolve().parent))
from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("fastnn", "csrc", "tests", "CMakeLists.txt", "pyproject.toml")
TEST_SECONDS = 240
# An editable install of the package answers `import fastnn` before any path is looked at; not in the copy.
SITE = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'fastnn' not in type(f).__module__]\n"


class PlantError(Exception):
    """The experiment itself went wrong."""


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise PlantError(f"{shlex.join(command)[:300]}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done


# ---- building


@dataclass(frozen=True)
class Unit:
    """One C++ source as the build compiled it; kernels once per instruction set."""

    source: str
    object: Path
    command: tuple[str, ...]
    """Without its output."""
    reads: frozenset[str]
    """The source and every header, as absolute paths."""

    @property
    def isa(self) -> str:
        """The instruction set of a kernel, or nothing."""
        return next((word.split("=")[1] for word in self.command if word.startswith("-DFASTNN_ISA_NAME=")), "")

    def compile(self, root: Path, folder: Path) -> Path:
        """Compiles the source as it is under `root`; no optimisation and no warnings, that is what makes it quick."""
        target = folder / f"{self.source.replace('/', '_')}.{self.isa}.o"
        command = [part.replace(str(ROOT / "csrc"), str(root / "csrc")) for part in self.command]
        run([*command, "-O0", "-w", "-o", str(target)], cwd=root)
        return target


@dataclass(frozen=True)
class Base:
    """The unchanged extension, as objects."""

    units: tuple[Unit, ...]
    link: tuple[str, ...]
    sets: tuple[str, ...]

    @property
    def isa(self) -> str:
        """The set that kernel faults are planted in: the quickest to run that is not the fallback."""
        return "avx2" if "avx2" in self.sets else self.sets[-1]

    def extension(self, to: Path, changed: dict[Path, Path]) -> None:
        """Links the objects, with the changed ones in place of their like."""
        objects = [str(changed.get(unit.object, unit.object)) for unit in self.units]
        temporary = to.with_suffix(".new")
        run([self.link[0], "-shared", "-o", str(temporary), *objects, *self.link[1:]])
        temporary.replace(to)


def supported_sets() -> tuple[str, ...]:
    code = "from fastnn import _extension as e; print(*e.require().isa_supported())"
    found = run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    return tuple(found.stdout.split())


def build_folder() -> Path:
    """The build of the editable install, whose objects are there already; else one of our own."""
    installed = sorted(ROOT.glob("build/cp*/build.ninja"), key=lambda path: path.stat().st_mtime)
    if installed:
        return installed[-1].parent
    folder = ROOT / "build" / "faults"
    pybind = run([sys.executable, "-m", "pybind11", "--cmakedir"]).stdout.strip()
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind}"]
    run(["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options])
    return folder


def build_base(jobs: int) -> Base:
    """The objects of the unchanged tree; what is out of date is compiled."""
    folder = build_folder()
    run(["cmake", "--build", str(folder), "-j", str(jobs)])
    reads: dict[str, set[str]] = {}
    compiled = ""
    for line in run(["ninja", "-C", str(folder), "-t", "deps"]).stdout.splitlines():
        if line.startswith(" "):
            reads[compiled].add(line.strip())
        elif line:
            compiled = line.split(": #deps")[0]
            reads[compiled] = set()
    units = []
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        at = words.index("-o")
        source, target = Path(entry["file"]).relative_to(ROOT), words[at + 1]
        command = (*words[:at], *words[at + 2 :])
        units.append(Unit(str(source), folder / target, command, frozenset({entry["file"], *reads[target]})))
    torch_folder = run([sys.executable, str(ROOT / "csrc/tools/find_torch.py")]).stdout.strip()
    link = (
        units[0].command[0],
        f"{torch_folder}/lib/libtorch_cpu.so",
        f"-Wl,--version-script={folder / 'exports.map'}",
        "-Wl,--allow-shlib-undefined",
        "-pthread",
    )
    return Base(tuple(units), link, supported_sets())


# ---- one worker's copy of the tree


class Copy:
    """A copy of the tree with its own extension."""

    def __init__(self, base: Base, folder: Path) -> None:
        self.base, self.root, self.objects = base, folder / "tree", folder / "objects"
        self.objects.mkdir(parents=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.root / name, ignore=ignore)
            else:
                shutil.copy(source, self.root / name)
        (self.root / "sitecustomize.py").write_text(SITE)
        self.module = self.root / "fastnn" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        self.kept = folder / "unchanged.so"
        base.extension(self.kept, {})
        shutil.copy(self.kept, self.module)

    def python(self, *arguments: str) -> tuple[int, str]:
        """Runs Python on the copy; (status, output)."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTNN_")}
        environment = {**kept, "PYTHONPATH": str(self.root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=self.root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TEST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return 124, f"no end after {TEST_SECONDS} s"
        return done.returncode, done.stdout

    def test(self, selection: list[str]) -> tuple[int, str]:
        return self.python("-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *selection)

    def check_is_used(self) -> None:
        status, output = self.python("-c", "import fastnn; print(fastnn.__file__, fastnn._extension._C.__file__)")
        paths = output.split()
        if status or len(paths) != 2 or not all(path.startswith(str(self.root)) for path in paths):
            raise PlantError(f"the copy is not what Python imports: {output}")

    def plant(self, fault: Fault) -> None:
        """Writes the fault and builds what it needs."""
        self.write(fault.file, mutated(fault))
        if not fault.file.startswith("csrc/"):
            return
        isa = fault.isa or self.base.isa
        changed = {
            unit.object: unit.compile(self.root, self.objects)
            for unit in self.base.units
            if unit.isa in ("", isa) and str(ROOT / fault.file) in unit.reads
        }
        if not changed:
            raise PlantError(f"{fault.name}: nothing is compiled from {fault.file}")
        self.base.extension(self.module, changed)

    def write(self, file: str, text: str) -> None:
        """Writes a source of the copy; byte code of the version before, which may be as long and as old, goes."""
        path = self.root / file
        path.write_text(text)
        for stale in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            stale.unlink()

    def restore(self, fault: Fault) -> None:
        self.write(fault.file, (ROOT / fault.file).read_text())
        if fault.file.startswith("csrc/"):
            temporary = self.module.with_suffix(".new")
            shutil.copy(self.kept, temporary)
            temporary.replace(self.module)


def mutated(fault: Fault) -> str:
    """The file with the fault in it."""
    text = (ROOT / fault.file).read_text()
    if text.count(fault.old) != 1 or fault.old == fault.new:
        raise PlantError(f"{fault.name}: its text occurs {text.count(fault.old)} times in {fault.file}, not once")
    return text.replace(fault.old, fault.new)


# ---- the experiment


@dataclass(frozen=True)
class Result:
    fault: Fault
    caught: bool
    how: str
    seconds: float


def judge(status: int, output: str) -> tuple[bool, str]:
    """Whether the suite failed, and on what."""
    lines = [line for line in output.splitlines() if line.strip()]
    if status == 1:
        failed = [line for line in lines if line.startswith("FAILED")]
        return bool(failed), failed[0][7:] if failed else "failed without a failing test"
    if status < 0:
        return True, f"crashed: signal {-status}"
    return False, f"NOT CAUGHT: pytest's status is {status}: {lines[-1] if lines else ''}"


def plant_one(copies: Queue[Copy], fault: Fault) -> Result:
    copy, start = copies.get(), time.monotonic()
    try:
        copy.plant(fault)
        caught, how = judge(*copy.test([test.format(isa=copy.base.isa) for test in fault.caught_by]))
    except PlantError as error:
        caught, how = False, f"NOT PLANTED: {error}"
    finally:
        copy.restore(fault)
        copies.put(copy)
    result = Result(fault, caught, how, time.monotonic() - start)
    print(f"{'caught' if caught else 'MISSED':>7} {result.seconds:5.0f} s  {fault.name}  <- {how[:150]}", flush=True)
    return result


def control(copies: list[Copy], faults: list[Fault]) -> None:
    """Everything that will have to fail passes without a fault."""
    tests = sorted({test.format(isa=copies[0].base.isa) for fault in faults for test in fault.caught_by})
    shares = [tests[i :: len(copies)] for i in range(min(len(copies), len(tests)))]  # pytest of nothing runs all
    with ThreadPoolExecutor(len(copies)) as pool:
        for status, output in pool.map(lambda pair: pair[0].test(pair[1]), zip(copies, shares, strict=False)):
            if status != 0:
                raise PlantError(f"the unchanged tree fails what must catch the faults:\n{output[-4000:]}")


def experiment(faults: list[Fault], jobs: int, folder: Path) -> bool:
    start = time.monotonic()
    base = build_base(jobs)
    can = [f for f in faults if f.isa in ("", *base.sets) and len(base.sets) >= f.sets]
    for fault in faults:
        if fault not in can:
            print(f"skipped          {fault.name}: this CPU lacks {fault.isa or 'a second instruction set'}")
    copies = [Copy(base, folder / str(i)) for i in range(jobs)]
    for copy in copies:
        copy.check_is_used()
    control(copies, can)
    print(
        f"built and unfaulted in {time.monotonic() - start:.0f} s; instruction sets {', '.join(base.sets)}", flush=True
    )
    waiting: Queue[Copy] = Queue()
    for copy in copies:
        waiting.put(copy)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda fault: plant_one(waiting, fault), can))
    caught = sum(result.caught for result in results)
    print(f"{caught}/{len(can)} faults caught in {time.monotonic() - start:.0f} s")
    return caught == len(can) > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=2, help="workers (2)")
    parser.add_argument("--only", default="", help="only faults with this in their name or file")
    parser.add_argument("--every", type=int, default=1, help="only each n-th of them")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    options = parser.parse_args()
    faults = [replace(f) for f in FAULTS if options.only in f.name or options.only in f.file][:: options.every]
    for fault in faults:
        mutated(fault)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="fastnn-faults-"))
    try:
        return 0 if experiment(faults, options.jobs, folder) else 1
    except PlantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
