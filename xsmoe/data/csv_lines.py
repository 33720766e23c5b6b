"""A scan of a CSV file's physical lines: lines that end a row, blank lines, and lines inside quoted fields.

pyarrow.csv parses the file; this scan counts the rows that it must find. Both follow the same rules. A quote opens a
quoted field only at the start of the field. Two quotes inside a quoted field mean one quote. Characters after the
closing quote belong to the field.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xsmoe.data.errors import DataError

CHUNK_BYTES = 1 << 20
_QUOTE, _DELIMITER, _CR, _LF = b'",\r\n'
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SpanningFields:
    """The S quoted fields of a file that span lines, in the file's order.

    Attributes:
        lines: (S,) int64, the physical line that a field begins in, from 1.
        columns: (S,) int64, its column, from 0.
        newlines: (S,) int64, newlines inside it.
        malformed: (S,) bool, whether more characters of the field follow its closing quote.
    """

    lines: np.ndarray
    columns: np.ndarray
    newlines: np.ndarray
    malformed: np.ndarray

    def __len__(self) -> int:
        return len(self.lines)


@dataclass(frozen=True)
class CsvLines:
    """Counts of physical lines: `lines == rows + blank + embedded`.

    Attributes:
        lines: physical lines; LF, CR, CRLF and the end of the file each end one.
        rows: records, including the header.
        blank: lines without a character outside quoted fields.
        embedded: newlines inside quoted fields.
        fields: the fields that contain these newlines.
    """

    lines: int
    rows: int
    blank: int
    embedded: int
    fields: SpanningFields


def scan_csv(path: Path, chunk_bytes: int = CHUNK_BYTES) -> CsvLines:
    """Count the physical lines of a CSV file with commas as delimiters.

    Args:
        path: the file.
        chunk_bytes: bytes to scan at once.

    Raises:
        DataError: a quote is never closed, or the file contains a NUL byte. The message names the line.
    """
    scan = _Scan(path)
    with open(path, "rb") as file:
        rest = file.read(len(_BYTE_ORDER_MARK))
        rest = b"" if rest == _BYTE_ORDER_MARK else rest
        while chunk := file.read(chunk_bytes):
            chunk = rest + chunk
            # The end of a chunk must not split a run of quotes or a CR LF pair.
            whole = chunk.rfind(b"\n") + 1 or len(chunk.rstrip(b'"\r'))
            rest = chunk[whole:]
            scan.add(chunk[:whole])
        scan.add(rest)
    return scan.finish()


def nul_byte(path: Path, line: int) -> str:
    """Return the error message for a line that contains a NUL byte."""
    return f"{path}: line {line} holds a NUL byte; the file is damaged, or is UTF-16: save it as UTF-8"


class _Scan:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.newlines = self.blank = self.embedded = 0
        self.last = _LF
        self.row_delimiters = 0
        """Number of delimiters so far of the record that continues in the next chunk."""
        self.quoted = False
        self.open_line = self.open_column = self.open_newlines = 0
        """Where the quoted field began that continues in the next chunk, and how many newlines it contained so far."""
        self.fields: list[tuple[np.ndarray, ...]] = []

    def add(self, chunk: bytes) -> None:
        if not chunk:
            return
        if (nul := chunk.find(b"\0")) >= 0:
            line = self.newlines + _count(chunk[:nul]) + 1
            raise DataError(nul_byte(self.path, line))
        if not self.quoted and chunk.endswith(b"\n") and (count := _simple(chunk, self.last)) is not None:
            self.newlines += count
            self.row_delimiters = 0
        else:
            self._parse(np.frombuffer(chunk, np.uint8))
        self.last = chunk[-1]

    def _parse(self, chunk: np.ndarray) -> None:
        runs = _Runs(chunk, self.last, self.quoted)
        begins, ends = _newlines(chunk)
        before = runs.before(ends)
        inside = runs.quoted_after(before)
        blank = begins == np.concatenate([[0 if self.last in (_CR, _LF) else -1], ends[:-1] + 1])
        self.blank += int((blank & ~inside).sum())
        self.embedded += int(inside.sum())
        row_ends = ends[~inside]

        opening, newlines = np.unique(before[inside], return_counts=True)
        if self.quoted:
            if len(opening) and opening[0] == -1:
                self.open_newlines += int(newlines[0])
                opening, newlines = opening[1:], newlines[1:]
            if len(runs.begins) and self.open_newlines:
                carried = (self.open_line, self.open_column, self.open_newlines, runs.malformed(np.array([0]))[0])
                self.fields.append(tuple(np.array([value]) for value in carried))
        closed = opening + 1 < len(runs.begins)
        if closed.any():
            places = opening[closed]
            self.fields.append(
                (
                    self._lines(ends, runs.begins[places]),
                    self._columns(chunk, runs, row_ends, runs.begins[places]),
                    newlines[closed],
                    runs.malformed(places + 1),
                )
            )
        if runs.open_at_end and len(runs.begins):
            last = runs.begins[-1:]
            self.open_line = int(self._lines(ends, last)[0])
            self.open_column = int(self._columns(chunk, runs, row_ends, last)[0])
            self.open_newlines = int(newlines[~closed].sum())
        tail = int(row_ends[-1]) + 1 if len(row_ends) else 0
        delimiters = runs.unquoted(np.flatnonzero(chunk[tail:] == _DELIMITER) + tail)
        self.row_delimiters = len(delimiters) + (0 if len(row_ends) else self.row_delimiters)
        self.quoted = runs.open_at_end
        self.newlines += len(ends)

    def _lines(self, ends: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the physical lines of these positions of the chunk."""
        return self.newlines + np.searchsorted(ends, places) + 1

    def _columns(self, chunk: np.ndarray, runs: "_Runs", row_ends: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the columns of these positions of the chunk."""
        first = int(np.searchsorted(row_ends, places[0])) - 1
        start = int(row_ends[first]) if first >= 0 else 0
        delimiters = runs.unquoted(np.flatnonzero(chunk[start : int(places[-1])] == _DELIMITER) + start)
        row = np.searchsorted(row_ends, places) - 1
        row_begins = np.where(row >= 0, row_ends[row], -1) if len(row_ends) else np.full(len(places), -1)
        columns = np.searchsorted(delimiters, places) - np.searchsorted(delimiters, row_begins)
        return columns + np.where(row >= 0, 0, self.row_delimiters)

    def finish(self) -> CsvLines:
        if self.quoted:
            raise DataError(
                f"{self.path}: line {self.open_line} opens a quoted field that no quote closes; close it, or double "
                "the quote and put the whole field in quotes"
            )
        lines = self.newlines + (self.last not in (_CR, _LF))
        columns = [np.concatenate(arrays) for arrays in zip(*self.fields, strict=True)]
        where = columns or [np.empty(0, np.int64)] * 4
        fields = SpanningFields(where[0], where[1], where[2], where[3].astype(bool))
        return CsvLines(lines, lines - self.blank - self.embedded, self.blank, self.embedded, fields)


class _Runs:
    """Runs of quotes of odd length. Only these change whether the following characters are quoted.

    In a quoted field, each of these runs ends the field. At the start of a field, it begins a quoted field. Elsewhere
    it has no effect.
    """

    def __init__(self, chunk: np.ndarray, last: int, quoted: bool) -> None:
        quotes = np.flatnonzero(chunk == _QUOTE)
        first = np.flatnonzero(np.diff(quotes, prepend=-2) != 1)
        lengths = np.diff(first, append=len(quotes))
        odd = (lengths & 1).astype(bool)
        self._chunk = chunk
        self._at_start = quoted
        self.begins = quotes[first[odd]]
        self._ends = self.begins + lengths[odd] - 1
        preceding = np.where(self.begins > 0, chunk[self.begins - 1], last)
        starts_field = (preceding == _DELIMITER) | (preceding == _LF) | (preceding == _CR)
        # A run at the start of a field flips the state. Any other run clears it.
        flips = np.cumsum(starts_field) + quoted
        self._state = ((flips - np.maximum.accumulate(np.where(starts_field, 0, flips))) & 1).astype(bool)

    @property
    def open_at_end(self) -> bool:
        """Return whether the end of the chunk is quoted."""
        return bool(self._state[-1]) if len(self._state) else self._at_start

    def before(self, places: np.ndarray) -> np.ndarray:
        """Return the last run before each position, -1 for none."""
        return np.searchsorted(self.begins, places) - 1

    def quoted_after(self, runs: np.ndarray) -> np.ndarray:
        """Return whether the characters after these runs are quoted; -1 means the start of the chunk."""
        return np.concatenate([self._state, [self._at_start]])[runs]

    def unquoted(self, places: np.ndarray) -> np.ndarray:
        """Return the positions that are not quoted."""
        return places[~self.quoted_after(self.before(places))]

    def malformed(self, closing: np.ndarray) -> np.ndarray:
        """Return whether the field continues after these runs, which close its quotes."""
        after = self._ends[closing] + 1
        inside = after < len(self._chunk)
        following = self._chunk[np.where(inside, after, 0)]
        return inside & (following != _DELIMITER) & (following != _LF) & (following != _CR)


def _newlines(chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last byte of every newline: LF, CR, or CR LF."""
    line_feeds = np.flatnonzero(chunk == _LF)
    returns = np.flatnonzero(chunk == _CR)
    if not len(returns):
        return line_feeds, line_feeds
    paired = np.zeros(len(returns), bool)
    inside = returns + 1 < len(chunk)
    paired[inside] = chunk[returns[inside] + 1] == _LF
    ends = np.sort(np.concatenate([line_feeds, returns[~paired]]))
    return ends - ((chunk[ends] == _LF) & (ends > 0) & (chunk[ends - 1] == _CR)), ends


def _count(chunk: bytes) -> int:
    return chunk.count(b"\n") + chunk.count(b"\r") - chunk.count(b"\r\n")


def _simple(chunk: bytes, last: int) -> int | None:
    """Return the newlines of a chunk if each row is one line and neither end is quoted; None if that is not certain."""
    if last in (_CR, _LF) and chunk[0] in (_CR, _LF):
        return None
    count = chunk.count(b"\n")
    if b"\r" not in chunk:
        if b"\n\n" in chunk:
            return None
    elif not chunk.count(b"\r\n") == count == chunk.count(b"\r") or b"\n\r" in chunk:
        return None
    return count if b'"' not in chunk or _plainly_quoted(chunk, last) else None


def _plainly_quoted(chunk: bytes, last: int) -> bool:
    """Return whether every quote of a chunk belongs to a pair around a field within a line, or doubles another quote.

    The function processes 64 bytes at once, one bit each. A byte is quoted if the number of quotes before it is odd.
    This holds unless a quote that makes the number odd is neither at the start of a field nor after another quote.
    """
    padded = np.zeros(-(-len(chunk) // 64) * 64, np.uint8)
    padded[: len(chunk)] = np.frombuffer(chunk, np.uint8)
    quotes = _bits(padded == _QUOTE)
    newlines = _bits(padded == _LF)
    starts = quotes | newlines | _bits(padded == _DELIMITER)
    parity = quotes.copy()
    for step in (1, 2, 4, 8, 16, 32):
        parity ^= parity << np.uint64(step)
    odd = np.bitwise_xor.accumulate(parity >> np.uint64(63))
    # If the words before a word contain an odd number of quotes, all bits of the word flip.
    parity[1:] ^= np.uint64(0) - odd[:-1]
    if odd[-1] or (newlines & parity).any():
        return False
    after = starts << np.uint64(1)
    after[1:] |= starts[:-1] >> np.uint64(63)
    after[0] |= np.uint64(last in (_DELIMITER, _CR, _LF))
    return not (quotes & parity & ~after).any()


def _bits(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little").view("<u8")
