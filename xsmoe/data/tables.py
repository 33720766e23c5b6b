"""A reader of columns of CSV and Parquet files. Its errors name the position in the file."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from xsmoe.data.csv_files import csv_header, read_csv
from xsmoe.data.errors import DataError


@dataclass(frozen=True)
class Table:
    """Columns of a file, and notes: sentences about its unusual content."""

    columns: Mapping[str, pa.ChunkedArray]
    notes: tuple[str, ...]


def column_names(path: Path) -> list[str]:
    """Return the names of the columns of a `.csv` or `.parquet` file.

    Raises:
        DataError: the file is missing, has another suffix, or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise DataError(f"{path}: a table must end in .csv or .parquet; convert it, or rename it if it is one of these")
    try:
        return csv_header(path) if suffix == ".csv" else list(pa.parquet.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {error}") from error


def read_table(
    path: Path, columns: Mapping[str, str], *, text: Collection[str] = (), digits: str | None = None
) -> Table:
    """Read the named columns of a `.csv` or `.parquet` file. Columns of a CSV file are strings; empty fields are null.

    Args:
        path: the file.
        columns: each column's name, with the advice for the error message if the file lacks it.
        text: the names among these of columns whose quoted fields may span lines in a CSV file.
        digits: the name among these of a column that holds digits in every row, or None.

    Raises:
        DataError: the file is missing, has another suffix or cannot be parsed; a column is missing or occurs twice;
            there are no rows; or rows would be lost (see `csv_files.read_csv`).
    """
    names = column_names(path)
    _require(path, names, columns)
    suffix = path.suffix.lower()
    notes: list[str] = []
    try:
        if suffix == ".csv":
            table, notes = read_csv(path, names, list(columns), text=text, digits=digits)
        else:
            table = _read_parquet(path, list(columns))
        # Parquet strings must be UTF-8, but pyarrow does not check this when it reads.
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows")
    return Table({name: table.column(name) for name in columns}, tuple(notes))


def id_strings(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of ids as an object array of str, (rows,). Integers become decimal strings.

    Raises:
        DataError: the column has another type, or a row has no id.
    """
    text = _text(path, name, column, "ids must be strings or integers")
    missing = pc.or_kleene(pc.is_null(text), pc.equal(pc.binary_length(text), 0)).to_numpy()
    if missing.any():
        raise DataError(f"{path}: column '{name}' is empty in {_row(missing)}; fill in the id or remove the row")
    return text.to_numpy()


def optional_strings(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of strings as an object array, (rows,), with None for null and for the empty string.

    Raises:
        DataError: the column has another type.
    """
    if pa.types.is_null(column.type):
        return np.full(len(column), None, dtype=object)
    if pa.types.is_integer(column.type):
        raise DataError(f"{path}: column '{name}' is {column.type}; it must hold strings or nulls")
    values = _text(path, name, column, "it must hold strings or nulls").to_numpy()
    values[values == ""] = None
    return values


def whole_numbers(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of timestamps as int64 (rows,). Digits in a CSV file are parsed.

    Raises:
        DataError: a value is not a whole number or is negative. The message contains the row and the value.
    """
    advice = "timestamps must be whole seconds since 1970, as integers"
    text = _text(path, name, column, advice)
    fits = pc.or_(pc.less(pc.binary_length(text), 19), pc.less_equal(text, str(np.iinfo(np.int64).max)))
    digits = pc.and_(pc.match_substring_regex(text, r"^[0-9]{1,19}$"), fits)
    bad = ~pc.fill_null(digits, False).to_numpy()
    if bad.any():
        value = text[int(np.argmax(bad))].as_py()
        found = "nothing" if value is None else repr(value)
        raise DataError(
            f"{path}: column '{name}' holds {found} in {_row(bad)}; {advice}, zero or more: convert dates first"
        )
    return text.cast(pa.int64()).to_numpy()


def _text(path: Path, name: str, column: pa.ChunkedArray, rule: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    if not any(kind(column.type) for kind in kinds):
        raise DataError(f"{path}: column '{name}' is {column.type}; {rule}")
    return column.cast(pa.large_string())


def _row(bad: np.ndarray) -> str:
    return f"data row {int(np.argmax(bad)) + 1}"


def _read_parquet(path: Path, columns: list[str]) -> pa.Table:
    with pa.parquet.ParquetFile(path) as file:
        table = file.read(columns=columns)
        if table.num_rows != file.metadata.num_rows:
            raise DataError(
                f"{path}: only {table.num_rows} of {file.metadata.num_rows} rows could be read; write the file again"
            )
        return table


def _require(path: Path, present: list[str], columns: Mapping[str, str]) -> None:
    for name, advice in columns.items():
        if name not in present:
            other = next((mark for mark in ";\t|" if len(present) == 1 and mark in present[0]), None)
            raise DataError(
                f"{path}: has no column '{name}'; its columns are {', '.join(present)}. "
                + (advice if other is None else f"Its header holds {other!r}: separate fields with commas.")
            )
        if present.count(name) > 1:
            raise DataError(f"{path}: has {present.count(name)} columns named '{name}'; rename all but one")
