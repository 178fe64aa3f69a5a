"""Keeps documents, list of ops and tree true to each other, and the house rules that a grep can check."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import subprocess
from pathlib import Path

import pytest

import fastnn
from fastnn import _extension

ROOT = Path(__file__).resolve().parent.parent
OPS = re.findall(r"^FASTNN_OP\((\w+)\)", (ROOT / "csrc/ops.def").read_text(), re.MULTILINE)
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PACKAGE = sorted(ROOT.glob("fastnn/**/*.py"))
CPP = sorted(path for ending in ("h", "cpp", "cu", "cuh") for path in ROOT.glob(f"csrc/**/*.{ending}"))
BUILD_FILES = (
    sorted(ROOT.glob("csrc/**/*.py")) + sorted(ROOT.glob("csrc/**/CMakeLists.txt")) + [ROOT / "CMakeLists.txt"]
)

# What CONTRIBUTING's checklist asks for, for one op.
FILES_OF_AN_OP = (
    "csrc/params/<op>.h",
    "csrc/cpu/kernels/<op>.h",
    "csrc/cpu/<op>.cpp",
    "csrc/bindings/<op>.cpp",
    "fastnn/ops/<op>.py",
    "docs/ops/<op>.md",
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a document that are marked with this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


# ---- ops


def test_there_are_ops():
    assert OPS


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_files(op):
    missing = [path for pattern in FILES_OF_AN_OP if not (ROOT / (path := pattern.replace("<op>", op))).exists()]
    assert not missing, f"op {op} of csrc/ops.def lacks {missing}"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases(op):
    texts = [path.read_text() for path in ROOT.glob("fastnn/testing/**/*.py")]
    assert any(re.search(rf"[\"']{op}[\"']", text) for text in texts), f"fastnn/testing names no case of {op}"


def test_every_operator_belongs_to_an_op_of_the_list():
    bindings = "".join(path.read_text() for path in ROOT.glob("csrc/bindings/*.cpp"))
    operators = re.findall(r"m\.def\(\s*\"(\w+)\(", bindings)
    assert operators
    strangers = [operator for operator in operators if not operator.startswith(tuple(f"{op}_" for op in OPS))]
    assert not strangers, f"not of an op in csrc/ops.def: {strangers}"
    pages = {path.stem for path in ROOT.glob("docs/ops/*.md")}
    assert pages <= set(OPS), f"pages of ops that do not exist: {sorted(pages - set(OPS))}"


def test_extension_was_built_from_this_list():
    if _extension._C is None:
        pytest.skip(_extension.missing)
    assert _extension._C.ops() == OPS


# ---- documents


def paths_named(path: Path) -> set[str]:
    """Repository paths that a document names: link targets, and code spans that start like a path of this tree."""
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    found = {str((path.parent / link).resolve().relative_to(ROOT)) for link in links if link}
    top = {entry.name for entry in ROOT.iterdir()} | {"csrc", "fastnn", "tests", "docs", "benchmarks", "examples"}
    for span in re.findall(r"`([\w.<>*{},/-]+)`", text):
        first = span.split("/")[0]
        if (first in top and "/" in span) or re.fullmatch(
            r"(Makefile|CMakeLists\.txt|[A-Z][\w.-]*\.md|[\w-]+\.toml)", span
        ):
            found.add(span)
    return found


def expansions(path: str) -> list[str]:
    """`<op>` stands for every op; `{a,b}` for each alternative."""
    if "<op>" in path:
        return [one for op in OPS for one in expansions(path.replace("<op>", op))]
    braces = re.search(r"\{([^}]*)\}", path)
    if braces:
        return [one for part in braces[1].split(",") for one in expansions(path.replace(braces[0], part, 1))]
    return [path]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_path_named_in_a_document_exists(document):
    ignored = ("build", "dist", ".venv")
    missing = [
        path
        for named in sorted(paths_named(document))
        for path in expansions(named)
        if not path.startswith(ignored) and "<" not in path and not list(ROOT.glob(path.rstrip("/")))
    ]
    assert not missing, f"{name(document)} names paths that do not exist: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_make_target_named_in_a_document_exists(document):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", document.read_text("utf-8"), re.MULTILINE))
    assert named <= targets, f"{name(document)} names make targets that do not exist: {sorted(named - targets)}"


def test_every_page_is_reachable_from_the_readme():
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.endswith(".md") and (ROOT / page).exists():
            reached.add(page)
            todo += paths_named(ROOT / page)
    pages = {name(path) for path in ROOT.glob("docs/**/*.md")}
    assert pages <= reached, f"no link leads to {sorted(pages - reached)}"


def test_every_public_name_is_documented():
    text = "".join(path.read_text("utf-8") for path in DOCUMENTS)
    public = [
        name for name in fastnn.__all__ if not name.startswith("_") and not inspect.ismodule(getattr(fastnn, name))
    ]
    missing = [name for name in public if f"fastnn.{name}" not in text]
    assert not missing, f"neither README nor docs mention fastnn.{missing}"


RUNNABLE = [
    pytest.param(code, id=f"{name(path)}-{i}")
    for path in [
        ROOT / "README.md",
        ROOT / "docs/quantization.md",
        ROOT / "docs/pruning.md",
        ROOT / "docs/compress.md",
        ROOT / "docs/sparse.md",
        *sorted(ROOT.glob("docs/ops/*.md")),
    ]
    for i, code in enumerate(blocks(path, "python"))
]


@pytest.mark.parametrize("code", RUNNABLE)
def test_examples_run_as_written(code, tmp_path, monkeypatch):
    source = tmp_path / "example.py"
    source.write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(source), run_name="__main__")


def test_readme_has_an_example():
    assert blocks(ROOT / "README.md", "python")


def test_the_chinese_readme_has_the_same_commands_and_code():
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    for language in ("python", "sh"):
        assert blocks(english, language) == blocks(chinese, language)

    def headings(path):
        return re.findall(r"^#+ ", re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S), re.M)

    assert headings(english) == headings(chinese)


def test_every_environment_variable_is_in_the_readme():
    named = set(re.findall(r"export (FASTNN_[A-Z_]+)", (ROOT / ".ci/run").read_text()))
    for path in [*PACKAGE, *CPP, *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        if path != Path(__file__) and "csrc/tests" not in name(path):
            named |= set(re.findall(r"[\"'](FASTNN_[A-Z_]+)[\"']", path.read_text("utf-8")))
    documented = {}
    for readme in ("README.md", "README.zh-CN.md"):
        documented[readme] = set(
            re.findall(r"^\| `(FASTNN_[A-Z_]+)`", (ROOT / readme).read_text("utf-8"), re.MULTILINE)
        )
        assert named <= documented[readme], f"{readme} does not list {sorted(named - documented[readme])}"
        assert documented[readme] <= named, f"{readme} lists what no code reads: {sorted(documented[readme] - named)}"


def test_stated_errors_are_those_that_are_tested():
    source = (ROOT / "csrc/tests/vector_math_test.cpp").read_text()
    tested = dict(re.findall(r'\{"(\w+)",\s*MathFunction::\w+,.*?;\s*\},\s*([\d.]+),', source, re.DOTALL))
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \|(.*)\|$", (ROOT / "docs/numerics.md").read_text("utf-8"), re.MULTILINE)
    stated = {function: bound for function, bound, found in rows if found}
    assert stated == tested and len(tested) == 5
    for function, bound, found in rows:
        assert max(map(float, found.split("|"))) <= float(bound), f"{function}: found more than is stated"


def test_version_is_the_same_everywhere():
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert fastnn.__version__ == version
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[(Unreleased|{re.escape(version)})\]", changelog, re.MULTILINE)


def test_pre_commit_and_ci_check_the_same():
    makefile = (ROOT / "Makefile").read_text()
    parts = set(re.search(r"^lint: (.*)", makefile, re.MULTILINE)[1].split())
    hooks = set(re.findall(r"entry: make .*?(lint-\w+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE))
    assert hooks == parts
    steps = re.findall(r"^\s*step make .*?([a-z0-9]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert {"lint", "sanitize", "aarch64", "test"} <= set(steps)
    assert steps[-1] == "test", "the suite comes last: its summary closes the log"


@pytest.mark.parametrize("path", [*PACKAGE, *CPP, *BUILD_FILES], ids=name)
def test_files_named_in_comments_exist(path):
    """A file named with its folder, from the root or from csrc; placeholders and generated files apart."""
    folders = r"(?:csrc|cpu|params|bindings|fastnn|tests|docs|tools|benchmarks|examples)"
    named = re.findall(rf"(?<![\w/.<-]){folders}(?:/[\w.]+)*/\w+\.(?:h|cpp|inc|py|md|def)\b", path.read_text("utf-8"))
    missing = [file for file in named if not (ROOT / file).exists() and not (ROOT / "csrc" / file).exists()]
    assert not missing, f"{name(path)} names files that do not exist: {missing}"


# ---- layers


@pytest.mark.parametrize("path", CPP, ids=name)
def test_only_the_bindings_know_torch(path):
    if "bindings" in path.parts:
        return
    included = re.findall(
        r"^\s*#\s*include\s*[<\"]((?:torch|ATen|c10|pybind11)/|Python\.h)", path.read_text(), re.MULTILINE
    )
    assert not included, f"{name(path)} includes {included}: only csrc/bindings may"


@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/cpu/kernels/*.h")), ids=name)
def test_algorithms_name_no_instruction_set(path):
    code = re.sub(r"//.*", "", path.read_text())
    found = re.findall(r"(?i)avx\w*|neon\w*|\bsse\w*|_mm\w+|__m\d+\w*|immintrin|arm_neon", code)
    found += re.findall(r"^\s*#\s*(?:if|elif|ifdef|ifndef).*", code, re.MULTILINE)
    assert not found, f"{name(path)}: {found} belongs into csrc/cpu/simd"


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_library_code_has_no_assert_print_or_broad_except(path):
    broad = {"Exception", "BaseException"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        where = f"{name(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: assert (gone under -O): raise instead"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{where}: print in library code"
        # A test policy that reports whatever a call raised is not hiding it.
        if isinstance(node, ast.ExceptHandler) and "testing" not in path.parts:
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else broad
            assert not caught & broad, f"{where}: catches everything; name what is expected"


@pytest.mark.parametrize("path", [*PACKAGE, *CPP, *BUILD_FILES], ids=name)
def test_files_are_short(path):
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= 400, f"{name(path)} has {lines} lines: a noun is missing"


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= 60, f"{name(path)}: {node.name} has {length} lines without its docstring"


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no git checkout: {error}")
    return [path for line in listing.splitlines() if (path := ROOT / line).is_file()]


def test_nothing_unfinished_and_no_path_of_somebodys_machine():
    marks = re.compile(
        r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b|(?<![\w.])/(work|root|home|Users)/\w"
    )
    found = []
    for path in tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if path != Path(__file__):
            found += [f"{name(path)}: {match[0]}" for match in marks.finditer(text)]
    assert not found, found


def test_nothing_built_is_tracked():
    endings = (".so", ".o", ".a", ".whl", ".pyc")
    assert not [name(path) for path in tracked() if path.name.endswith(endings)]
