"""Tests of the scan of a CSV file's physical lines, against Python's csv module and a count of newlines."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmoe.data import DataError
from xsmoe.data.csv_lines import CsvLines, scan_csv

PIECES = ["a", "b", ",", '"', '""', "\n", "\r", "\r\n", ',"', '",', '"\n', "é"]
contents = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
# Mostly complete quoted fields, which the scan processes 64 bytes at once.
fields = st.sampled_from(["a", '"a"', '"a,b"', '"say ""hi"""', '""', 'b"', '"c\nd"', '"e"f'])
rows = st.lists(fields, min_size=1, max_size=4).map(",".join)
tables = st.lists(rows, max_size=30).map(lambda lines: "".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines") / "table.csv"


def spanning(text: str) -> list[tuple[int, int, int, bool]] | None:
    """Return line, column, newlines and malformed end of each quoted field that spans lines; None if one never ends."""
    found, line, column, place = [], 1, 0, 0
    while place < len(text):
        # This is the start of a field.
        begin, newlines, malformed = line, 0, False
        if text[place] == '"':
            end = re.compile(r'"(?:[^"]|"")*"(?!")').match(text, place)
            if end is None:
                return None
            newlines = len(re.findall(r"\r\n|\r|\n", end[0]))
            place = end.end()
            malformed = place < len(text) and text[place] not in ",\r\n"
        rest = re.compile(r"[^,\r\n]*(,|\r\n|\r|\n|$)").match(text, place)
        assert rest is not None
        if newlines:
            found.append((begin, column, newlines, malformed))
        line += newlines + (rest[1] not in ("", ","))
        column = column + 1 if rest[1] == "," else 0
        place = rest.end()
    return found


def check(file: Path, text: str, chunk_bytes: int) -> None:
    file.write_bytes(text.encode())
    expected = spanning(text)
    if expected is None:
        with pytest.raises(DataError, match=r"line \d+ opens a quoted field that no quote closes"):
            scan_csv(file, chunk_bytes)
        return
    found = scan_csv(file, chunk_bytes)
    columns = (found.fields.lines, found.fields.columns, found.fields.newlines, found.fields.malformed)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    records = list(csv.reader(io.StringIO(text, newline="")))
    assert found.rows == sum(bool(record) for record in records)
    assert found.blank == sum(not record for record in records)
    assert found.embedded == sum(newlines for _, _, newlines, _ in expected)
    ended = len(re.findall(r"\r\n|\r|\n", text))
    assert found.lines == ended + (text[-1:] not in ("", "\r", "\n"))
    assert found.lines == found.rows + found.blank + found.embedded


@settings(max_examples=150)
@given(contents, st.sampled_from([1, 2, 5, 64, 1000]))
def test_any_content_against_the_csv_module(file: Path, text: str, chunk_bytes: int) -> None:
    check(file, text, chunk_bytes)


@settings(max_examples=150)
@given(tables, st.sampled_from([7, 64, 100, 10_000]), st.booleans())
def test_tables_against_the_csv_module(file: Path, text: str, chunk_bytes: int, windows: bool) -> None:
    check(file, text.replace("\n", "\r\n") if windows else text, chunk_bytes)


def counts(lines: CsvLines) -> tuple[int, int, int, int]:
    return lines.lines, lines.rows, lines.blank, lines.embedded


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", (0, 0, 0, 0)),
        (b"a,b", (1, 1, 0, 0)),
        (b"a,b\n", (1, 1, 0, 0)),
        (b"\xef\xbb\xbf", (0, 0, 0, 0)),
        (b'\xef\xbb\xbf"a\nb",c\n1,2\n', (3, 2, 0, 1)),
        (b"a,b\n\n1,2\n\n\n", (5, 2, 3, 0)),
        (b"a,b\r1,2\r\r\n3,4", (4, 3, 1, 0)),
        (b'a,b\r\n"1\r\n\r\n2",3\r\n', (4, 2, 0, 2)),
        (b'a,b\n5" pipe,"6"" pipe"\n', (2, 2, 0, 0)),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 3, 1 << 20])
def test_line_ends_marks_and_quotes(
    tmp_path: Path, content: bytes, expected: tuple[int, int, int, int], chunk_bytes: int
) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    assert counts(scan_csv(path, chunk_bytes)) == expected


@pytest.mark.parametrize("chunk_bytes", [5, 1 << 20])
def test_nul_bytes_are_refused_with_their_line(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"a,b\r\n1,2\r\n3,\0\r\n")
    with pytest.raises(DataError, match="line 3 holds a NUL byte"):
        scan_csv(path, chunk_bytes)
    path.write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(DataError, match="line 1 holds a NUL byte; .* UTF-16"):
        scan_csv(path, chunk_bytes)


def test_a_field_across_many_chunks(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('a,b\n1,2\n3,"' + "x\n" * 1000 + '"\n4,5\n')
    found = scan_csv(path, 64)
    assert counts(found) == (1004, 4, 0, 1000)
    fields = found.fields
    assert (fields.lines.tolist(), fields.columns.tolist(), fields.newlines.tolist()) == ([3], [1], [1000])
