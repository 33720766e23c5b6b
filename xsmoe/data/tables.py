"""Columns out of CSV and Parquet files, with errors that say where in the file the trouble is."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet


class DataError(ValueError):
    """Data that cannot be used as it is. The message names the file, the place and what to do about it."""


def read_columns(path: Path, columns: Mapping[str, str]) -> dict[str, pa.ChunkedArray]:
    """The named columns of a `.csv` or `.parquet` file; those of a CSV file as strings, where an empty field is null.

    Args:
        path: the file.
        columns: each column's name, with the advice to give where the file lacks it.

    Raises:
        DataError: no such file, another suffix, a file that cannot be parsed, a column that is missing or there twice,
            or no rows.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a table must end in .csv or .parquet; convert it, or rename it if it is one of these")
    try:
        table = readers[path.suffix.lower()](path, columns)
        # Parquet promises UTF-8, which reading does not check.
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows")
    return {name: table.column(name) for name in columns}


def id_strings(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of ids as an object array of str, (rows,): strings stay, integers are written out.

    Raises:
        DataError: another type of column, or a row without an id.
    """
    text = _text(path, name, column, "ids must be strings or integers")
    missing = pc.or_kleene(pc.is_null(text), pc.equal(pc.binary_length(text), 0)).to_numpy()
    if missing.any():
        raise DataError(f"{path}: column '{name}' is empty in {_row(missing)}; fill in the id or remove the row")
    return text.to_numpy()


def optional_strings(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of strings as an object array, (rows,), with None for null and for the empty string.

    Raises:
        DataError: a column of another type.
    """
    if pa.types.is_null(column.type):
        return np.full(len(column), None, dtype=object)
    if pa.types.is_integer(column.type):
        raise DataError(f"{path}: column '{name}' is {column.type}; it must hold strings or nulls")
    values = _text(path, name, column, "it must hold strings or nulls").to_numpy()
    values[values == ""] = None
    return values


def seconds(path: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A column of timestamps, whole seconds since 1970, as int64 (rows,); a CSV file's digits are parsed.

    Raises:
        DataError: a value that is no whole number, or negative; the message names its row and shows it.
    """
    advice = "timestamps must be whole seconds since 1970, as integers"
    text = _text(path, name, column, advice)
    # 18 digits always fit int64; longer ones are no dates.
    bad = ~pc.fill_null(pc.match_substring_regex(text, r"^[0-9]{1,18}$"), False).to_numpy()
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


def _read_csv(path: Path, columns: Mapping[str, str]) -> pa.Table:
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(path, parse_options=parse) as reader:
        _require(path, reader.schema.names, columns)
    convert = pa.csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict.fromkeys(columns, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )
    return pa.csv.read_csv(path, parse_options=parse, convert_options=convert)


def _read_parquet(path: Path, columns: Mapping[str, str]) -> pa.Table:
    with pa.parquet.ParquetFile(path) as file:
        _require(path, file.schema_arrow.names, columns)
        return file.read(columns=list(columns))


def _require(path: Path, present: list[str], columns: Mapping[str, str]) -> None:
    for name, advice in columns.items():
        if name not in present:
            raise DataError(f"{path}: has no column '{name}'; its columns are {', '.join(present)}. {advice}")
        if present.count(name) > 1:
            raise DataError(f"{path}: has {present.count(name)} columns named '{name}'; rename all but one")
