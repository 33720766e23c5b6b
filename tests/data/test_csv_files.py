"""Tests of the CSV readers: for any quotes and line ends, no row is lost without an error or a note."""

import csv
import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xsmoe.cli.commands.prepare import read_items
from xsmoe.data import DataError, csv_files, prepare_movielens, read_interactions
from xsmoe.data.csv_files import read_csv

HEADER = "user,item,timestamp\n"


def write(folder: Path, content: str | bytes, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(first: int, last: int) -> str:
    return "".join(f"u{number},i{number},{1_600_000_000 + number}\n" for number in range(first, last))


def test_an_open_quote_at_the_end_loses_nothing(tmp_path: Path) -> None:
    """An earlier version lost 600 of 1,201 rows, with exit code 0."""
    content = HEADER + lines(0, 600) + f'u600,i600,"{1_600_000_600}\n' + lines(601, 1201)
    with pytest.raises(DataError, match="line 602 opens a quoted field that no quote closes"):
        read_interactions(write(tmp_path, content))
    for last in ('u,i,"5', 'u,i,"5\n', 'u,"i,5\n', '"u,i,5'):
        with pytest.raises(DataError, match="line 5 opens a quoted field that no quote closes"):
            read_interactions(write(tmp_path, HEADER + lines(0, 3) + last))


@pytest.mark.parametrize("column, row", [("user", '"{0},i,5'), ("item", 'u,"{0},5'), ("timestamp", 'u,i,"5')])
def test_a_pair_of_stray_quotes_is_refused_with_its_line(tmp_path: Path, column: str, row: str) -> None:
    closing = {"user": 'x",i,5\n', "item": 'x",5\n', "timestamp": '5"\n'}[column]
    content = HEADER + lines(0, 300) + row.format("u") + "\n" + lines(301, 900) + closing + lines(900, 1000)
    opened = f"line 302 opens a quoted field of column '{column}' that ends in line 902"
    found = f"{opened}, but only text fields may span lines, and they must not contain rows"
    with pytest.raises(DataError, match=found):
        read_interactions(write(tmp_path, content))


@pytest.mark.parametrize(
    "header, rows, line",
    [
        ("user,item,timestamp,rating", ["a,x,1,3.5", 'b,y,2,"3', "c,z,3,4", 'd,w,4,5"', "e,v,5,2.5"], 3),
        ("user,item,timestamp,label", ["a,x,1,good", 'b,y,2,"fair', "c,z,3,good", 'd,w,4,bad"', "e,v,5,bad"], 3),
        ("label,user,item,timestamp", ["good,a,x,1", '"fair,b,y,2', 'bad",c,z,3', "bad,d,w,4"], 3),
        ("user,item,label,timestamp", ["a,x,good,1", 'b,y,"fair,2', 'c,z,bad",3', "d,w,bad,4"], 3),
    ],
)
def test_columns_that_are_not_read_hide_no_rows(tmp_path: Path, header: str, rows: list[str], line: int) -> None:
    path = write(tmp_path, "\n".join([header, *rows, ""]))
    with pytest.raises(DataError, match=rf"line {line} opens a quoted field of column '(rating|label)'"):
        read_interactions(path)


def test_texts_that_are_not_read_may_span_lines_and_are_counted(tmp_path: Path) -> None:
    content = 'user,review,item,timestamp\na,"good,\nbut 5, 7\nlong",x,1\nb,fine,y,2\nc,"so\r\nso",z,3\n'
    log = read_interactions(write(tmp_path, content))
    assert log.users.tolist() == ["a", "b", "c"]
    assert "2 fields of column 'review' span lines, with 3 newlines inside" in log.notes[0]
    assert "the longest begins in line 2 and spans 3 lines" in log.notes[0]


def test_a_text_in_every_row_may_span_lines(tmp_path: Path) -> None:
    log = read_interactions(write(tmp_path, 'user,review,item,timestamp\na,"very\ngood",x,1\nb,"very\nbad",y,2\n'))
    assert "2 fields of column 'review' span lines" in log.notes[0]


def test_characters_after_the_closing_quote_of_a_field_with_many_lines_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 'item,text\n1,"a 5\n2,b 6" pipe\n3,c\n', "items.csv")
    with pytest.raises(
        DataError, match=r"line 2 opens .*'text' that ends in line 3, but its closing quote is followed"
    ):
        read_items(path, tmp_path)


def test_items_count_texts_that_span_lines_and_refuse_other_columns(tmp_path: Path) -> None:
    items = read_items(write(tmp_path, 'item,text\n1,"two\nlines"\n2,"say ""hi"", please"\n', "items.csv"), tmp_path)
    assert items.texts.tolist() == ["two\nlines", 'say "hi", please']
    assert "1 fields of column 'text' span lines, with 1 newlines inside" in items.notes[0]
    for header in ("item,text,image", "text,item,image", "item,image,price", "text,image,item"):
        for column in set(header.split(",")) - {"text"}:
            row = ",".join('"4\n5"' if name == column else "6" for name in header.split(","))
            path = write(tmp_path, f"{header}\n1,2,3\n{row}\n", "items.csv")
            with pytest.raises(DataError, match=f"line 3 opens a quoted field of column '{column}'"):
                read_items(path, tmp_path)


def test_titles_of_movies_may_span_lines_and_nothing_else_may(tmp_path: Path) -> None:
    write(tmp_path, "userId,movieId,rating,timestamp\n1,1,5.0,964982703\n", "ratings.csv")
    title = '"Postman, The\n""Il Postino"" (1994)"'
    write(tmp_path, f"movieId,title,genres\n1,{title},Drama\n", "movies.csv")
    dataset = prepare_movielens(tmp_path, tmp_path / "out")
    assert dataset.items.texts.tolist() == ['Postman, The\n"Il Postino" (1994): Drama']
    assert "1 fields of column 'title' span lines" in dataset.items.notes[0]
    write(tmp_path, 'movieId,title,genres\n1,A,"Drama\n2,B,Comedy"\n', "movies.csv")
    with pytest.raises(DataError, match=r"movies\.csv: line 2 opens a quoted field of column 'genres'"):
        prepare_movielens(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("final", [True, False])
def test_line_ends(tmp_path: Path, newline: str, final: bool) -> None:
    content = (HEADER + lines(0, 50)).replace("\n", newline)
    log = read_interactions(write(tmp_path, content if final else content.removesuffix(newline)))
    assert (len(log), log.notes) == (50, ())


def test_mixed_line_ends_marks_and_blank_lines(tmp_path: Path) -> None:
    content = "\ufeff\nuser,item,timestamp\r\n\r\n1,2,1600000003\r1,2,1600000004\n\n\r\n1,2,1600000005\n\n"
    log = read_interactions(write(tmp_path, content))
    assert log.timestamps.tolist() == [1600000003, 1600000004, 1600000005]
    assert "5 blank lines are skipped" in log.notes[0]


def test_quotes_inside_of_fields_are_part_of_them(tmp_path: Path) -> None:
    log = read_interactions(
        write(tmp_path, HEADER + '5" a,6"" b,1600000000\n"x""y","","1600000001"\n'.replace('"",', "z,"))
    )
    assert log.users.tolist() == ['5" a', 'x"y']
    assert log.items[0] == '6"" b'


@pytest.mark.parametrize("row, fields", [("a,x", 2), ("a,x,1,2", 4), (" ", 1), ('"a,x,1"', 1)])
def test_rows_of_another_length_are_named(tmp_path: Path, row: str, fields: int) -> None:
    content = HEADER + lines(0, 5) + "\n" + row + "\n" + lines(5, 9)
    found = rf"cannot be read as csv: data row 6 \(line 8\) has {fields} fields, but the header has 3: "
    with pytest.raises(DataError, match=found):
        read_interactions(write(tmp_path, content))


@pytest.mark.parametrize("content", [HEADER, HEADER.strip(), HEADER + "\n\n"])
def test_a_header_alone_has_no_rows(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_interactions(write(tmp_path, content))


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_files_without_a_header_are_empty(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="cannot be read as csv: it is empty"):
        read_interactions(write(tmp_path, content))


def test_a_header_that_spans_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1 opens a quoted column name and does not close it"):
        read_interactions(write(tmp_path, 'user,item,"timestamp\n1,2,3\n4,5",6\n'))


def test_a_nul_byte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3 holds a NUL byte"):
        read_interactions(write(tmp_path, HEADER + "a,x,1\nb\0,y,2\n"))


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_field_longer_than_a_block_is_read(tmp_path: Path, quote: str) -> None:
    """The csv module refuses fields of more than 131,072 characters; pyarrow refuses rows longer than its block."""
    limit = csv.field_size_limit()
    long = "x" * 3_000_000
    log = write(tmp_path, f"user,item,timestamp,note\nu,i,1600000000,{quote}{long}{quote}\nv,i,1600000001,b\n")
    assert read_interactions(log).users.tolist() == ["u", "v"]
    items = read_items(write(tmp_path, f"item,text\ni,{quote}{long}{quote}\n", "items.csv"), tmp_path)
    assert items.texts.tolist() == [long]
    with pytest.raises(DataError, match=r"data row 2 \(line 3\) has 2 fields, but the header has 4: 'v,i'"):
        read_interactions(write(tmp_path, f"user,item,timestamp,note\nu,i,1600000000,{long}\nv,i\n"))
    assert csv.field_size_limit() == limit


def test_other_encodings_and_delimiters_are_named(tmp_path: Path) -> None:
    for text in (HEADER + "\xe9,x,1600000000\n", HEADER + lines(0, 2) + "\xe9,x,1600000000\n"):
        path = write(tmp_path, text.encode("latin-1"))
        with pytest.raises(DataError, match=rf"line {len(text.splitlines())} is not UTF-8: .*; save the file as UTF-8"):
            read_interactions(path)
    with pytest.raises(DataError, match="line 1 holds a NUL byte; the file is damaged, or is UTF-16: save it as UTF-8"):
        read_interactions(write(tmp_path, (HEADER + lines(0, 2)).encode("utf-16")))
    for mark in ";\t|":
        with pytest.raises(DataError, match="has no column 'user'; .*: separate fields with commas"):
            read_interactions(write(tmp_path, (HEADER + lines(0, 2)).replace(",", mark)))


def test_rows_that_the_parser_loses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, HEADER + lines(0, 9))
    parse = csv_files._parse
    monkeypatch.setattr(csv_files, "_parse", lambda *given: pa.concat_tables([(t := parse(*given))[:4], t[5:]]))
    with pytest.raises(DataError, match=r"8 rows were parsed, but 10 lines hold 9 rows .* differ from line 6 on"):
        read_csv(path, ["user", "item", "timestamp"], ["user", "item"], text=(), digits=None)
    monkeypatch.setattr(csv_files, "_parse", lambda *given: parse(*given)[:8])
    with pytest.raises(DataError, match=r"8 rows were parsed, .* differ from line 10 on"):
        read_interactions(path)


@pytest.mark.parametrize("column", ["user", "item", "timestamp"])
def test_nulls_in_parquet_are_refused(tmp_path: Path, column: str) -> None:
    columns = {"user": ["a", "b"], "item": ["x", "y"], "timestamp": ["1600000000", "1600000001"]}
    columns[column][1] = None  # type: ignore[call-overload]
    path = tmp_path / "log.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=rf"'{column}' (is empty|holds nothing) in data row 2"):
        read_interactions(path)


cells = st.sampled_from(["a", "b", '"c"', '"d', 'e"', '""', '"f"g', '"h,i"', "", "7"])
numbers = st.sampled_from(["1600000000", '"1600000001"', '"1600000002', '1600000003"'])
newlines = st.sampled_from(["\n", "\n", "\r\n", "\n\n"])


@settings(max_examples=150)
@given(st.lists(st.tuples(cells, cells, numbers, newlines), max_size=12))
def test_rows_of_a_log_are_counted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, str]]
) -> None:
    """In an accepted log without text columns, every line that is not blank is a row."""
    text = HEADER + "".join(f"{user},{item},{time}{end}" for user, item, time, end in rows)
    path = write(tmp_path_factory.getbasetemp(), text, "random_log.csv")
    try:
        log = read_interactions(path)
    except DataError:
        return
    records = [record for record in csv.reader(io.StringIO(text, newline="")) if record][1:]
    assert len(log) == len(records) == len(re.findall(r"[^\r\n]+", text)) - 1
    order = log.rows.argsort()
    triples = zip(log.users[order], log.items[order], log.timestamps[order].astype(str), strict=True)
    assert [list(triple) for triple in triples] == records


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 99), cells, newlines), min_size=1, max_size=12, unique_by=lambda row: row[0]))
def test_rows_of_items_are_counted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str, str]]
) -> None:
    """Every line is the header, a row, blank, or inside a text field that a note counts."""
    text = "item,text\n" + "".join(f"{item},{cell}{end}" for item, cell, end in rows)
    path = write(tmp_path_factory.getbasetemp(), text, "random_items.csv")
    try:
        items = read_items(path, path.parent)
    except DataError:
        return
    records = [record for record in csv.reader(io.StringIO(text, newline="")) if record][1:]
    assert [[item, found or ""] for item, found in zip(items.ids, items.texts, strict=True)] == records
    counted = {"newlines": 0, "blank": 0}
    for number, kind in re.findall(r"(\d+) (newlines|blank)", "".join(items.notes)):
        counted[kind] = int(number)
    assert len(items) + 1 + sum(counted.values()) == len(re.findall(r"\r\n|\n", text))
