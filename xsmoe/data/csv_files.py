"""A reader of columns of CSV files that loses no row: pyarrow parses, and a scan of the lines checks the row count."""

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from xsmoe.data.csv_lines import CsvLines, nul_byte, scan_csv
from xsmoe.data.errors import DataError

_PARSE = pa.csv.ParseOptions(newlines_in_values=True)
_BLOCK_BYTES = 1 << 20
_LONGEST = (1 << 31) - 1


def csv_header(path: Path) -> list[str]:
    """Return the names of a CSV file's columns.

    Raises:
        DataError: the file is empty, or its header cannot be read or spans several lines.
    """
    for line, names in _records(path):
        if any("\0" in name for name in names):
            raise DataError(nul_byte(path, line))
        if any(newline in name for name in names for newline in "\r\n"):
            raise DataError(f"{path}: line {line} opens a quoted column name and does not close it; remove the quote")
        return names
    raise DataError(f"{path}: cannot be read as csv: it is empty")


def read_csv(
    path: Path, names: Sequence[str], wanted: Sequence[str], *, text: Collection[str], digits: str | None
) -> tuple[pa.Table, list[str]]:
    """Read columns of a CSV file as strings, with null for an empty field.

    Args:
        path: the file.
        names: its columns, from `csv_header`.
        wanted: the columns to read.
        text: the columns whose fields may span lines.
        digits: a column that holds digits in every row, or None. It serves to find rows that a stray quote has turned
            into text.

    Returns:
        The columns, and notes: sentences about unusual content of the file.

    Raises:
        DataError: a quote is never closed, a field outside the text columns spans lines, a row has another number of
            fields than the header, or pyarrow missed rows. The message names the line.
        pa.ArrowException, UnicodeError: the file cannot be parsed for another reason.
    """
    lines = scan_csv(path)
    notes = _check_spanning(path, names, lines, wanted, text, digits)
    if lines.blank:
        notes.append(f"{path}: {lines.blank} blank lines are skipped")
    if lines.rows <= 1:
        return pa.table({name: pa.array([], pa.string()) for name in wanted}), notes
    table = _parse(path, names, wanted)
    if table.num_rows != lines.rows - 1:
        _refuse_lost(path, table, lines)
    return table, notes


def _parse(path: Path, names: Sequence[str], wanted: Sequence[str]) -> pa.Table:
    convert = pa.csv.ConvertOptions(
        include_columns=list(wanted),
        column_types=dict.fromkeys(wanted, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )

    def read(block_bytes: int) -> pa.Table:
        options = pa.csv.ReadOptions(block_size=block_bytes)
        return pa.csv.read_csv(path, read_options=options, parse_options=_PARSE, convert_options=convert)

    try:
        return read(_BLOCK_BYTES)
    except pa.ArrowInvalid:
        _refuse_lengths(path, len(names))
        _refuse_encoding(path)
        size = path.stat().st_size
        if not _BLOCK_BYTES < size < _LONGEST:
            raise
        # pyarrow refuses a row that is longer than a block, but such a row is valid.
        return read(size)


def _check_spanning(
    path: Path, names: Sequence[str], lines: CsvLines, wanted: Sequence[str], text: Collection[str], digits: str | None
) -> list[str]:
    """Raise DataError for fields outside text columns that span lines. Return notes that count those in text columns.

    A column that is not read may span lines too, if `_check_unread` accepts it.
    """
    fields = lines.fields
    notes: list[str] = []
    if not len(fields):
        return notes
    allowed = np.zeros(len(names) + 1, bool)
    for place in np.unique(fields.columns[fields.columns < len(names)]).tolist():
        # A column whose name occurs twice cannot be read by name, so it cannot be checked.
        if names[place] in text or (names.count(names[place]) == 1 and names[place] not in wanted):
            allowed[place] = True
    refused = fields.malformed | ~allowed[np.minimum(fields.columns, len(names))]
    if refused.any():
        _refuse_spanning(path, names, lines, int(np.argmax(refused)))
    for place in np.flatnonzero(allowed).tolist():
        mine = np.flatnonzero(fields.columns == place)
        if names[place] not in text:
            _check_unread(path, names, lines, place, digits)
        longest = mine[np.argmax(fields.newlines[mine])]
        notes.append(
            f"{path}: {len(mine)} fields of column '{names[place]}' span lines, with {fields.newlines[mine].sum()} "
            f"newlines inside; the longest begins in line {fields.lines[longest]} and spans "
            f"{fields.newlines[longest] + 1} lines"
        )
    return notes


def _check_unread(path: Path, names: Sequence[str], lines: CsvLines, place: int, digits: str | None) -> None:
    """Raise DataError for fields that span lines in an unread column, unless they are text and contain no rows."""
    values = _parse(path, names, [names[place]]).column(0).drop_null()
    spanning = pc.match_substring_regex(values, r"[\r\n]")
    first = int(np.flatnonzero(lines.fields.columns == place)[0])
    single = values.filter(pc.invert(spanning))
    judged = single if len(single) else values
    if 2 * pc.sum(pc.match_substring_regex(judged, r"\p{L}")).as_py() <= len(judged):
        _refuse_spanning(path, names, lines, first)
    if digits is None:
        return
    rows = _rows_inside(len(names), place, list(names).index(digits))
    swallowed = pc.match_substring_regex(values.filter(spanning), rows).to_numpy()
    if swallowed.any():
        found = np.flatnonzero(lines.fields.columns == place)[int(np.argmax(swallowed))]
        _refuse_spanning(path, names, lines, int(found))


def _rows_inside(num_columns: int, place: int, digits: int) -> str:
    """Return a pattern that matches values that contain rows of the file.

    A row is a line with as many fields as the header, and with digits in the column of digits.

    Args:
        num_columns: number of columns of the file.
        place: index of the value's column.
        digits: index of the column that holds digits.
    """
    field, number, newline = r"[^,\r\n]*", r"\"?[0-9]+\"?", r"[\r\n]"

    def fields(first: int, last: int) -> str:
        return ",".join(number if column == digits else field for column in range(first, last))

    whole = f"{newline}{fields(0, num_columns)}{newline}"
    # The value begins in the middle of one row and ends in the middle of another row.
    partial = f"{newline}{fields(0, place + 1)}$" if digits < place else f"^{fields(place, num_columns)}{newline}"
    return f"{whole}|{partial}"


def _refuse_spanning(path: Path, names: Sequence[str], lines: CsvLines, field: int) -> None:
    place, begin = int(lines.fields.columns[field]), int(lines.fields.lines[field])
    column = f"column '{names[place]}'" if place < len(names) else f"column {place + 1}, beyond the header's"
    reason = "only text fields may span lines, and they must not contain rows of the file"
    if lines.fields.malformed[field]:
        reason = "its closing quote is followed by neither a comma nor the end of the line"
    raise DataError(
        f"{path}: line {begin} opens a quoted field of {column} that ends in line "
        f"{begin + int(lines.fields.newlines[field])}, but {reason}; if the quote is a mistake, remove it, or double "
        "it and put the whole field in quotes"
    )


def _refuse_lengths(path: Path, num_columns: int) -> None:
    """Raise DataError for the first row whose number of fields differs from the header's, if there is one."""
    for row, (line, record) in enumerate(_records(path)):
        if len(record) != num_columns:
            raise DataError(
                f"{path}: cannot be read as csv: data row {row} (line {line}) has {len(record)} fields, but the header "
                f"has {num_columns}: {','.join(record)[:80]!r}"
            )


def _refuse_encoding(path: Path) -> None:
    """Raise DataError for the first line that is not UTF-8, if there is one."""
    with open(path, "rb") as file:
        for line, content in enumerate(file, start=1):
            try:
                content.decode()
            except UnicodeDecodeError:
                raise DataError(f"{path}: line {line} is not UTF-8: {content[:80]!r}; save the file as UTF-8") from None


def _refuse_lost(path: Path, table: pa.Table, lines: CsvLines) -> None:
    """Raise DataError that names the first line where the parsed rows differ from the lines of the file."""
    records = _records(path)
    _, names = next(records)
    places = [names.index(name) for name in table.column_names]
    parsed = zip(*(column.to_pylist() for column in table.columns), strict=True)
    differs = (line for line, record in records if tuple(record[at] or None for at in places) != next(parsed, None))
    raise DataError(
        f"{path}: {table.num_rows} rows were parsed, but {lines.lines} lines hold {lines.rows - 1} rows after the "
        f"header, {lines.blank} blank lines and {lines.embedded} newlines inside fields; they differ from line "
        f"{next(differs, lines.lines)} on; correct the file from that line on"
    )


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a CSV file that are not blank, each with the physical line that it begins in."""
    with open(path, encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
        reader = csv.reader(file)
        line, limit = 1, csv.field_size_limit(_LONGEST)
        try:
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}: cannot be read as csv: line {line}: {error}") from error
        finally:
            csv.field_size_limit(limit)
