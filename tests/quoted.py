"""Measured numbers in Markdown: which there are, and whether committed results have them.

A measured number has a unit of time, speed, share or memory (MiB; KB and MB are arithmetic). It must stand in a table
whose columns say what of which variant they are, in a sentence that `CLAIMS` of the test makes from results, in a table
of `python -m bench.report.docs_tables`, or in a text that is named as no measurement of ours. A ratio in a table has
its spread, and the number of rounds if these are few.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from bench.core import results
from bench.core.results import Case, Row
from bench.report import docs_tables, slowdowns
from bench.report.comparison import speedup

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
UNITS = r"(?:ms|us|µs|s|%|times|MiB|GiB|GFLOP/s|TFLOP/s|GB/s|TB/s|minutes|seconds)"
MEASURED = re.compile(rf"\d(?:[\d.,]*\d)?(?:\s±\s[\d.]+|\s\(\d[^()]*\))?\s?{UNITS}(?![\w/])")
LINK = re.compile(r"\]\((?:\.\./)?bench/results/([\w.-]+\.json)\)")
SIZES = {"experts": "E", "users": "B", "rows": "N"}
OURS = "ours"
COLUMN = re.compile(r"(?:(?P<variant>[\w-]+) )?(?P<what>ms|peak MiB|error)|(?P<times>times)(?: (?P<rival>[\w-]+))?")


def problems(text: str, *, claims: Sequence[str], constants: Sequence[str], history: Sequence[str]) -> list[str]:
    """What a page quotes that nothing stands behind.

    Args:
        text: the page.
        claims: sentences that must be in it, made from results; line breaks do not matter.
        constants: what looks like a measurement of ours and is none: snippets, or with "..." openings of paragraphs.
        history: headings whose sections tell of measurements that nobody keeps.
    """
    blocks, found = list(_blocks(text, history)), []
    flat = "\n\n".join(" ".join(block.split()) for block in blocks)
    for claim in claims:
        if claim not in flat:
            found.append(f"it does not say: {claim}")
    for snippet in constants:
        if snippet.removesuffix("...") not in flat:
            found.append(f"it does not say, and need not be excused for: {snippet}")
    links: list[str] = []
    for block in blocks:
        # A section links to its own results.
        links = LINK.findall(block) or ([] if block.startswith("#") else links)
        if block.startswith("|"):
            for known in constants:
                block = block.replace(known, "")
            found += table_problems(block, [_load(name) for name in links])
            continue
        said = " ".join(block.split())
        if any(one.endswith("...") and said.startswith(one.removesuffix("...")) for one in constants):
            continue
        for known in (*claims, *constants):
            said = said.replace(known, " ")
        found += [f"nothing stands behind {number.group()!r} in: {block[:80]}" for number in MEASURED.finditer(said)]
    return found


def table_problems(table: str, runs: Sequence[results.Run]) -> list[str]:
    """What a table quotes that no case has; tables without measured columns are none of ours."""
    lines = [line for line in table.splitlines() if line]
    head, _, *rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    if not any(_measured(name) for name in head):
        # Prose in cells.
        return [f"nothing stands behind {one.group()!r} in a table" for one in MEASURED.finditer(table)]
    found = []
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        cases = [case for run in runs for case in run.cases if _meant(case, cells)]
        if len(cases) != 1:
            found.append(f"{len(cases)} cases of the linked results are meant by {row}")
            continue
        for name, cell in cells.items():
            if _measured(name) and (expected := _quoted(cases[0], cells, name, cell)) != cell:
                found.append(f"{name} of {row} is {cell}, and the result {expected}")
    return found


@cache
def _load(name: str) -> results.Run:
    return results.load(RESULTS / name)


def _measured(name: str) -> bool:
    return bool(COLUMN.fullmatch(name)) or name in ("of the floor", "MiB saved for backward")


def _meant(case: Case, cells: Mapping[str, str]) -> bool:
    """Whether all that a row says of its case, and does not measure, is so."""
    for name, cell in cells.items():
        if _measured(name) or name == "variant":
            continue
        letter = SIZES.get(name, name)
        if letter in case.sizes:
            if str(case.sizes[letter]) != cell.replace(",", ""):
                return False
        elif name == "dtype":
            if case.dtype != cell:
                return False
        elif not case.operator.endswith(cell):
            return False
    return True


def _quoted(case: Case, cells: Mapping[str, str], name: str, cell: str) -> str:
    """A cell as the result has it, with as many digits as are quoted."""
    rows = {row.variant: row for row in case.rows}
    variant = cells.get("variant", OURS)
    unit = " %" if cell.endswith("%") else ""
    digits = len(cell.removesuffix(unit).partition(".")[2])
    column = COLUMN.fullmatch(name)
    if column and column["variant"]:
        variant = column["variant"]
    if variant not in rows:
        return f"no variant {variant}"
    if column and column["times"]:
        timing = rows[variant].step
        rival = column["rival"] or next(iter(timing.against if timing else ()), "")
        return times(case, variant, rival)
    value = _value(rows[variant], name, column)
    return "not measured" if value is None else f"{value:.{digits}f}{unit}"


def times(case: Case, variant: str, rival: str) -> str:
    """How many times faster than a rival, with the spread over the rounds, as a page must quote it."""
    rows = {row.variant: row for row in case.rows}
    if variant == rival:
        return "1.00"
    ratio = speedup(rows[variant], rows[rival], rows[variant].step_pass) if rival in rows else None
    if ratio is None:
        return "not measured"
    few = slowdowns.few_rounds_note(rows[variant].passes[rows[variant].step_pass].samples)
    return f"{ratio.median:.2f} ({ratio.p10:.2f}-{ratio.p90:.2f}{few})"


def _value(row: Row, name: str, column: re.Match[str] | None) -> float | None:
    timing = row.step
    if timing is None:
        return None
    if name == "of the floor":
        return 100 * timing.of_bound
    if name == "MiB saved for backward":
        return None if row.saved_bytes is None else row.saved_bytes / 2**20
    assert column is not None
    if column["what"] == "ms":
        return 1e3 * timing.median
    if column["what"] == "peak MiB":
        return None if row.peak_bytes is None else row.peak_bytes / 2**20
    return row.error


def _blocks(text: str, history: Sequence[str]) -> Iterator[str]:
    """Paragraphs, tables and list items, without code, without history, and without what has a test of its own."""
    text = docs_tables.TABLE.sub("", text)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    kept = True
    for block in re.split(r"\n\s*\n", text):
        if heading := re.match(r"#+ (.*)", block):
            kept = heading[1] not in history
        if kept and block.strip():
            yield block.strip()
