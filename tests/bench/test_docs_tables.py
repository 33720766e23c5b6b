"""Generated parts of README.md and docs, and the plot, are those of the committed files."""

import json
import re
from pathlib import Path

import pytest

from bench.report import docs_plot, docs_results, docs_tables, support_matrix
from xsmoe_kernels.runtime import dispatch

ROOT = docs_tables.ROOT


def test_docs_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs_tables.main(["--check"]) == 0, capsys.readouterr()


def test_every_kind_is_used_and_every_result_file_is_shown() -> None:
    text = "\n".join(path.read_text() for path in docs_tables.pages())
    assert {part["kind"] for part in docs_tables.START.finditer(text)} == set(docs_tables.TABLES)
    committed = [*docs_results.RESULTS.glob("*-cpu*"), *docs_results.RESULTS.glob("quality-*.json")]
    missing = [path.name for path in committed if f"bench/results/{path.name}" not in text]
    assert len(committed) > 10
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/quality.md", "docs/getting_started.md"])
def test_every_changed_digit_is_stale(page: str) -> None:
    text = (ROOT / page).read_text()
    root = page == "README.md"
    parts = [
        part for part in docs_tables.TABLE.finditer(text) if part["kind"] in ("speedups", "quality", "demo", "profile")
    ]
    parts = parts or list(docs_tables.TABLE.finditer(text))[:2]
    for part in parts:
        block = part[0]
        assert docs_tables.renewed(block, root=root) == block
        digits = [place for place, letter in enumerate(block) if letter.isdigit() and place > block.index("\n")]
        for place in digits[:: max(1, len(digits) // 5)]:
            changed = block[:place] + str((int(block[place]) + 1) % 10) + block[place + 1 :]
            assert docs_tables.renewed(changed, root=root) == block


def test_a_stale_page_fails_the_check_and_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    part = next(docs_tables.TABLE.finditer(page))
    (tmp_path / "quality.md").write_text(page.replace(part["text"], "| base | 99.99 |\n"))
    monkeypatch.setattr(docs_tables, "ROOT", tmp_path)
    monkeypatch.setattr(docs_tables, "pages", lambda: [tmp_path / "quality.md"])
    monkeypatch.setattr(docs_plot, "up_to_date", lambda: True)
    # The page is in the root folder here, where links in generated parts have another prefix.
    page = docs_tables.renewed(page, root=True)
    assert docs_tables.main(["--check"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "quality.md: stale\n"
    assert "docs_tables --write" in printed.err
    assert docs_tables.main(["--write"]) == 0
    assert (tmp_path / "quality.md").read_text() == page


def test_damaged_markers_and_missing_results_are_refused() -> None:
    with pytest.raises(ValueError, match="no generated part is of kind 'weather'"):
        docs_tables.renewed("<!-- weather: returning -->\n<!-- end -->\n")
    with pytest.raises(FileNotFoundError):
        docs_tables.renewed("<!-- quality: nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="has no case with"):
        docs_tables.renewed("<!-- kernel: side_moe-cpu-float32 E=77 -->\n<!-- end -->\n")
    start = "<!-- quality: returning -->\n"
    for page in (start, start * 2 + "<!-- end -->\n"):
        with pytest.raises(ValueError, match=re.escape("has no <!-- end -->")):
            docs_tables.renewed(page)


def test_few_rounds_are_marked_in_the_headlines() -> None:
    rows = {line.split("|")[1].strip(): line for line in docs_results.speedup_table("cpu").splitlines() if "|" in line}
    assert re.search(r"\(\d+-\d+; 3 rounds\)", rows["rank_of_target"])
    assert "rounds" not in rows["packed_attention"]


def test_a_refused_row_has_a_reason_and_no_time() -> None:
    table = docs_results.kernel_table("step-cpu-float32")
    assert re.search(r"^- compiled refused \(training_step_cls\): .* norm: error", table, re.MULTILINE)
    assert not re.search(r"^\| training_step_cls +\| +compiled", table, re.MULTILINE)


def test_a_stale_plot_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert docs_plot.up_to_date()
    stale = tmp_path / "speedups.svg"
    text = docs_plot.PATH.read_text()
    number = next(iter(docs_plot.data().values()))["paper"]
    stale.write_text(text.replace(f"{number}", "99.5"))
    monkeypatch.setattr(docs_plot, "PATH", stale)
    assert not docs_plot.up_to_date()
    stale.unlink()
    assert not docs_plot.up_to_date()


def test_the_support_matrix_has_every_operator_and_ignores_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    table = support_matrix.table("operators")
    for name in dispatch.operators():
        assert f"| `{name.removesuffix('_backward')}`" in table
    monkeypatch.setattr(dispatch, "_kernels", {name: {} for name in dispatch.operators()})
    assert support_matrix.table("operators") == table


def test_the_native_column_is_that_of_the_library() -> None:
    """The sources name the operators that the loaded library registers."""
    registered = {name for name in dispatch.operators() if "native" in dispatch._kernels.get(name, {})}
    if not registered:
        pytest.skip("no native library")
    assert registered == {name for name in support_matrix.native_operators() if name in dispatch.operators()}


def test_measured_means_that_a_committed_row_has_times() -> None:
    measured = support_matrix.measured()
    assert ("side_moe", "backward", "native", "cpu", "float32") in measured
    gpu = [one for one in measured if one[3] == "cuda"]
    files = [json.loads(path.read_text()) for path in docs_results.RESULTS.glob("*.json")]
    assert bool(gpu) == any(case["device"] == "cuda" for file in files for case in file.get("cases", []))
