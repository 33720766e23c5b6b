"""docs/quality.md has the tables of the committed results."""

import pytest

from bench.quality import page


def test_the_page_is_up_to_date() -> None:
    text = page.PAGE.read_text()
    assert page.renewed(text) == text, "run python -m bench.quality.page --write"
    for part in page.PART.finditer(text):
        assert "| base" in part["text"], part["name"]
        assert f"quality-{part['name']}.json" in part["text"]


def test_a_stale_number_is_replaced() -> None:
    text = page.PAGE.read_text()
    part = next(page.PART.finditer(text))
    stale = text.replace(part["text"], "| base | 99.99 |\n")
    assert stale != text
    assert page.renewed(stale) == text


def test_a_page_without_parts_and_a_part_without_results_are_refused() -> None:
    with pytest.raises(ValueError, match="no part that begins with"):
        page.renewed("# Quality\n")
    with pytest.raises(FileNotFoundError):
        page.renewed("<!-- quality: nothing -->\n<!-- end -->\n")
