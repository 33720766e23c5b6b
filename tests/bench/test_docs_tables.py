"""Tables of the docs are those of the committed results."""

import re
from pathlib import Path

import pytest

from bench.report import docs_tables


def test_docs_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs_tables.main(["--check"]) == 0, capsys.readouterr().err
    tables = list(docs_tables.TABLE.finditer((docs_tables.DOCS / "quality.md").read_text()))
    assert {table["name"] for table in tables} == {"ml-latest-small", "returning", "catalogue"}
    for table in tables:
        assert "| base" in table["text"]
        assert f"quality-{table['name']}.json" in table["text"]


def test_a_stale_number_fails_the_check_and_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (docs_tables.DOCS / "quality.md").read_text()
    table = next(docs_tables.TABLE.finditer(page))
    stale = page.replace(table["text"], "| base | 99.99 |\n")
    assert stale != page
    (tmp_path / "quality.md").write_text(stale)
    monkeypatch.setattr(docs_tables, "ROOT", tmp_path)
    monkeypatch.setattr(docs_tables.stale_pages, "__defaults__", (tmp_path,))
    assert docs_tables.main(["--check"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "quality.md: stale\n"
    assert "docs_tables --write" in printed.err
    assert docs_tables.main(["--write"]) == 0
    assert (tmp_path / "quality.md").read_text() == page


def test_damaged_markers_and_missing_results_are_refused() -> None:
    with pytest.raises(ValueError, match="no table is of kind 'weather'"):
        docs_tables.renewed("<!-- weather: returning -->\n<!-- end -->\n")
    with pytest.raises(FileNotFoundError):
        docs_tables.renewed("<!-- quality: nothing -->\n<!-- end -->\n")
    start = "<!-- quality: returning -->\n"
    for page in (start, start * 2 + "<!-- end -->\n"):
        with pytest.raises(ValueError, match=re.escape("has no <!-- end -->")):
            docs_tables.renewed(page)


def test_slowdowns_are_in_the_docs() -> None:
    tables = list(docs_tables.TABLE.finditer((docs_tables.DOCS / "kernels.md").read_text()))
    assert [(table["kind"], table["name"]) for table in tables] == [("slowdowns", "cpu")]
