"""Result files: whole at any moment, read back as written, and the source of every number in a document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastnn.bench import documents, files
from fastnn.bench.allocators import PLAIN, TUNED
from fastnn.bench.limits import Bound
from fastnn.bench.results import BadResult, Result, case_to_json, load, rows_of
from fastnn.bench.session import Measured, Record
from fastnn.bench.tables import counts, footer, headline, markdown, rows_table, time_text
from fastnn.bench.verdict import Verdict
from fastnn.testing.bench_cases import find_bench_case

ROOT = Path(__file__).resolve().parent.parent
SOFTMAX = find_bench_case("softmax_fwd/fp32 (49152, 512)")  # bars: 1.1, over tuned 1.35, held by onnxruntime
SPARSE = find_bench_case("block_sparse_80/fp32 (16, 768, 3072)")  # bar: 4 over sparse products
LINEAR = find_bench_case("linear+none/fp32 (128, 768, 3072)")  # bar: 1.03 of packed weights, held by openvino


def record(milliseconds: float, setting: str = PLAIN, frozen: bool = False, rounds: int = 21) -> Record:
    """Times that scatter by one per cent."""
    times = [milliseconds * 1e-3 * (1 + 0.01 * (i % 3 - 1)) for i in range(rounds)]
    return Record(setting, frozen, "fresh", 1 << 20, 1, times)


def case_of(case, refused=(), wrong=(), **records: Record) -> dict:
    labels = {name.replace("__", ", ").replace("_packed", " packed"): one for name, one in records.items()}
    return case_to_json(case, Bound(1e-3, "memory"), Measured(labels, dict(refused), dict(wrong)))


def result(*cases: dict, **changes) -> Result:
    fields = {
        "machine": {"cpu": "A", "isa": "avx512_bf16", "cores": 2, "amx": "absent", "key": "A"},
        "versions": {"torch": "2.13.0", "fastnn": "0.1.0"},
        "commit": "abc",
        "date": "2026-01-02 03:04 UTC",
        "method": {"threads": 1, "bars": True, "quick": False, "sweep": False},
        "limits": None,
        "cases": list(cases),
        "complete": True,
    }
    return Result(**{**fields, **changes})


def test_a_row_has_everything():
    (row,) = rows_of(
        case_of(
            SOFTMAX,
            fastnn=record(8),
            eager=record(60),
            onnxruntime=record(10, frozen=True),
            fastnn__tuned=record(8, TUNED),
            eager__tuned=record(11.2, TUNED),
        )
    )
    assert (row.name, row.shape, row.verdict) == ("softmax_fwd/fp32", (49152, 512), Verdict.REACHED)
    assert (row.plain.name, row.plain.bar, round(row.plain.ratio.value, 2)) == ("onnxruntime", 1.1, 1.25)
    assert (row.tuned.name, row.tuned.bar, round(row.tuned.ratio.value, 2)) == ("eager", 1.35, 1.40)
    assert row.share == pytest.approx(1 / 8)
    assert row.gbps == pytest.approx(2 * 49152 * 512 * 4 / 8e-3 / 1e9)
    assert row.gflops == pytest.approx(49152 * 512 * 32 / 8e-3 / 1e9)
    assert dict(row.others) == {"eager": pytest.approx(6.0)}
    assert row.memory == 1 << 20 and not row.holder and not row.problem


def test_ways_without_frozen_weights_compete_with_those_alone():
    plain, packed = rows_of(
        case_of(
            LINEAR,
            fastnn=record(6),
            fastnn_packed=record(5.5),
            eager=record(7),
            openvino=record(5.8, frozen=True),
        )
    )
    assert (plain.name, plain.plain.name, plain.verdict) == ("linear+none/fp32", "eager", Verdict.LEVEL)
    assert (packed.name, packed.plain.name, packed.verdict) == ("linear+none/fp32 packed", "openvino", Verdict.REACHED)


def test_losses_and_wrong_results_show():
    behind, packed = rows_of(case_of(LINEAR, fastnn=record(8), eager=record(7), wrong={"fastnn packed": "error 3"}))
    assert behind.verdict is Verdict.BEHIND
    assert packed.verdict is Verdict.WRONG and packed.problem == "error 3" and packed.ours is None
    text = markdown(result(case_of(LINEAR, fastnn=record(8), eager=record(7), wrong={"fastnn packed": "error 3"})))
    assert "behind the best" in text and "wrong result: error 3" in text
    assert "1 behind the best, 1 wrong result" in text


def test_a_bar_whose_holder_was_not_measured_is_marked():
    (row,) = rows_of(case_of(SOFTMAX, fastnn=record(8), eager=record(60)))
    assert row.verdict is Verdict.REACHED and row.holder == "onnxruntime"
    assert "bar reached (without onnxruntime)" in markdown(result(case_of(SOFTMAX, fastnn=record(8), eager=record(60))))


@pytest.mark.parametrize(
    ("dense", "csr", "verdict"),
    [(2, 4.5, Verdict.REACHED), (2, 3.5, Verdict.NEAR), (2, 3, Verdict.MISSED), (0.9, 4.5, Verdict.BEHIND)],
)
def test_a_bar_counts_against_those_it_names_and_the_floor_against_all(dense, csr, verdict):
    case = case_of(
        SPARSE, fastnn=record(1), eager=record(dense), **{"torch.csr": record(csr), "torch.bsr": record(csr + 1)}
    )
    (row,) = rows_of(case)
    assert row.verdict is verdict and row.plain.name == "eager"
    assert (row.plain.bar_name, round(row.plain.bar_ratio.value, 2)) == ("torch.csr", csr)
    assert f"bar 4.00 torch.csr {csr:.2f}" in markdown(result(case))


def test_elsewhere_no_bars_are_judged():
    (row,) = rows_of(case_of(SOFTMAX, fastnn=record(8), eager=record(8)), bars=False)
    assert row.verdict is Verdict.LEVEL and row.plain.bar is None and not row.holder
    here = result(case_of(SOFTMAX, fastnn=record(8), eager=record(8)), method={**result().method, "bars": False})
    assert "not judged here" in footer(here)


def test_nothing_to_compare_with():
    (alone,) = rows_of(case_of(SOFTMAX, fastnn=record(8)))
    assert alone.verdict is None and alone.ours is not None
    (absent,) = rows_of(case_of(SOFTMAX, eager=record(8), refused={"fastnn": "its process ended with status -9"}))
    assert absent.verdict is None and absent.problem == "its process ended with status -9"
    assert "2 not judged" in counts([alone, absent])


def test_files_come_back_as_written(tmp_path):
    path = tmp_path / "folder" / "one.json"
    made = result(case_of(SOFTMAX, fastnn=record(8), eager=record(9)), case_of(LINEAR, fastnn=record(8)))
    made.save(path)
    assert load(path) == made and load(path).rows() == made.rows()
    assert [entry.name for entry in path.parent.iterdir()] == ["one.json"]
    assert len(path.read_text().splitlines()) >= 4  # a line for each case and row: changes can be read
    assert {row["row"] for row in json.loads(path.read_text())["rows"]} == {
        "softmax_fwd/fp32",
        "linear+none/fp32",
        "linear+none/fp32 packed",
    }


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', "\x00"])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "one.json"
    path.write_text(content)
    with pytest.raises(BadResult, match=r"one\.json"):
        load(path)
    with pytest.raises(BadResult, match="No such file"):
        load(tmp_path / "none.json")


def test_a_file_is_old_or_new_whatever_happens(tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    files.write_atomically(path, "old")

    def fails(*arguments):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["one.json"]


def test_an_unfinished_run_says_so():
    text = footer(result(case_of(SOFTMAX, fastnn=record(8)), complete=False, stopped="interrupted"))
    assert "Not complete: interrupted" in text
    assert "37 %" in footer(result(others_load=0.37))
    assert "pip install onnxruntime" in footer(
        result(missing={"onnxruntime": "not installed: pip install onnxruntime"})
    )


def test_tables_show_every_row():
    pytest.importorskip("rich")
    from rich.console import Console

    made = result(case_of(SOFTMAX, fastnn=record(8), eager=record(60)), case_of(LINEAR, fastnn=record(8)))
    console = Console(width=250, record=True, file=open("/dev/null", "w"))
    console.print(rows_table(made))
    text = console.export_text()
    for word in (
        "softmax_fwd/fp32",
        "49152x512",
        "8 ms",
        "7.50 (",
        "linear+none/fp32 packed",
        "not measured",
        headline(made),
    ):
        assert word in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (755e-6, "755 us"),
        (1.34e-3, "1.34 ms"),
        (0.0675, "67.5 ms"),
        (3.3, "3.3 s"),
        (2e-7, "0.2 us"),
        (0.9996, "1000 ms"),
    ],
)
def test_times_are_readable(seconds, text):
    assert time_text(seconds) == text


def test_documents_are_filled_and_checked(tmp_path):
    results, document = tmp_path / "results", tmp_path / "README.md"
    made = result(case_of(SOFTMAX, fastnn=record(8), eager=record(60)))
    made.save(results / "one.json")
    begin, end = documents.markers("rows")
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert not documents.problem_with(document, results)  # no numbers yet
    documents.write(document, [results / "one.json"])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "softmax_fwd/fp32" in text and "old" not in text
    assert not documents.problem_with(document, results)
    document.write_text(text.replace("8 ms", "7 ms"))
    assert "differs from what one.json gives" in documents.problem_with(document, results)
    made.save(results / "two.json")
    documents.write(document, [results / "one.json", results / "two.json"])
    assert document.read_text().count("softmax_fwd/fp32") == 1  # the last counts
    assert not documents.problem_with(document, results)
    (results / "one.json").unlink()
    assert "No such file" in documents.problem_with(document, results)
    document.write_text(f"{begin}\n| softmax | 3 ms |\n{end}\n")
    assert "name no result file" in documents.problem_with(document, results)


def test_documents_sum_families_up(tmp_path):
    results, document = tmp_path / "results", tmp_path / "README.md"
    other = find_bench_case("softmax_bwd/fp32 (64, 32000)")
    old = case_of(SOFTMAX, fastnn=record(8), eager=record(80))
    result(old, case_of(other, fastnn=record(8), eager=record(4))).save(results / "one.json")
    result(case_of(SOFTMAX, fastnn=record(8), eager=record(36))).save(results / "two.json")
    document.write_text("a\n" + "\nold\n".join(documents.markers("summary")) + "\nb\n")
    documents.write(document, [results / "one.json", results / "two.json"])
    text = document.read_text()
    assert "| `softmax` | 2 | 1.50x (0.50 to 4.50) |" in text and "old" not in text
    assert "| softmax_bwd/fp32 64x32000 |" in text  # is behind
    assert not documents.problem_with(document, results)
    document.write_text(text.replace("1.50x", "2.50x"))
    assert "differs from what one.json and two.json gives" in documents.problem_with(document, results)


def test_documents_take_complete_results_and_have_markers(tmp_path):
    document, source = tmp_path / "README.md", tmp_path / "one.json"
    document.write_text("no markers")
    result(complete=False).save(source)
    with pytest.raises(BadResult, match="not complete"):
        documents.write(document, [source])
    result().save(source)
    with pytest.raises(BadResult, match="no line <!-- rows:begin -->"):
        documents.write(document, [source])


DOCUMENTS = [*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_numbers_in_documents_are_those_of_their_result_file(document):
    assert not documents.problem_with(document, ROOT / "benchmarks" / "results")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_can_be_read(path):
    found = load(path)
    assert found.complete and found.commit and found.rows()
