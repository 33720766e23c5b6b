"""The table of windows, for a terminal and for the HTML report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xsmoe.report.results import Comparison, Groups, WindowResult

NOTHING = "-"
QUALITY = ("HR@10", "NDCG@10")
SHORT = {"all_time": "popular", "last_window": "pop. last"}
MORE = {**SHORT, "decayed": "pop. decayed", "own_inputs": "own inputs"}


@dataclass(frozen=True)
class Column:
    """One column of the table of windows.

    Attributes:
        group: heading over several columns; "" for none.
        title: the column's own heading.
        width: minimum width in characters.
        cell: a function that returns the text for a window.
        rank: a narrow terminal leaves out the columns with the highest rank first.
    """

    group: str
    title: str
    width: int
    cell: Callable[[WindowResult], str]
    rank: int = 0


def columns(modalities: Sequence[str]) -> list[Column]:
    """Return the columns for a run with these modalities. Quality is in percent, on the window after training."""
    first, second = QUALITY
    return [
        Column("", "window", 6, lambda result: str(result.number)),
        Column("", "interactions", 12, lambda result: _trained(result, "interactions"), rank=7),
        Column("", "users", 6, lambda result: _trained(result, "users"), rank=5),
        *(Column("experts", name, 7, _experts(name), rank=2) for name in modalities),
        Column("", "epochs", 6, lambda result: _trained(result, "epochs"), rank=4),
        Column("", "batch", 5, lambda result: _trained(result, "batch_size"), rank=6),
        Column(f"{first} %", "model", 6, _quality("all", metric=first)),
        Column(f"{first} %", SHORT["all_time"], 7, _quality("popularity", "all_time", metric=first)),
        Column(f"{first} %", SHORT["last_window"], 9, _quality("popularity", "last_window", metric=first), rank=5),
        Column(f"{first} %", "cold", 6, _quality("cold", metric=first), rank=3),
        Column(f"{second} %", "model", 6, _quality("all", metric=second), rank=2),
        Column(f"{second} %", SHORT["all_time"], 7, _quality("popularity", "all_time", metric=second), rank=6),
        Column(f"{second} %", SHORT["last_window"], 9, _quality("popularity", "last_window", metric=second), rank=7),
        Column("", "seconds", 8, _seconds, rank=1),
    ]


LEGEND = (
    "quality: on the next window; popular: the most frequent items so far, pop. last: in the last window; "
    "cold: targets that were never trained on; experts: at each level; "
    "batch: the most sequences of a step, fewer in small windows"
)


def fit(table: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit into this width; columns of the highest rank are left out first."""
    kept = list(table)
    while line_width(kept) > width and any(column.rank for column in kept):
        kept.remove(max(reversed(kept), key=lambda column: column.rank))
    return kept


def line_width(table: Sequence[Column]) -> int:
    """Return the width of a line in characters."""
    return sum(_width(column) for column in table) + 2 * (len(table) - 1)


def header(table: Sequence[Column]) -> list[str]:
    """Return the two header lines."""
    groups, place = "", 0
    while place < len(table):
        group = table[place].group
        span = 1
        while group and place + span < len(table) and table[place + span].group == group:
            span += 1
        groups += f"{group:>{line_width(table[place : place + span])}}  "
        place += span
    return [groups.rstrip(), "  ".join(f"{column.title:>{_width(column)}}" for column in table)]


def row(table: Sequence[Column], result: WindowResult) -> str:
    """Format a window's line."""
    return "  ".join(f"{column.cell(result):>{_width(column)}}" for column in table)


def percent(value: float | None, error: float | None = None) -> str:
    """Format a share as a percentage, with its standard error if it is known."""
    if value is None:
        return NOTHING
    return f"{100 * value:.2f}" if error is None else f"{100 * value:.2f} ± {100 * error:.2f}"


def comparison_rows(comparisons: Sequence[Comparison], names: Mapping[str, str] = SHORT) -> list[list[str]]:
    """Return the comparison with popularity on last targets in percent: a heading, and a row for each metric."""
    rows = [["in %", "model", *names.values(), "model - better"]]
    for found in comparisons:
        baselines = [percent(*found.baselines[name]) for name in names]
        lift = f"{100 * found.lift:+.2f} ± {100 * found.lift_se:.2f}"
        rows.append([found.metric, percent(found.model, found.model_se), *baselines, lift])
    return rows


GROUPS_LEGEND = (
    "new: the item is new to the user, repeats: the others; cold: never trained on; masked: a user's "
    "earlier items of the test window are no candidates; pop. decayed: older interactions count less; own inputs: the "
    "user's inputs again, latest first"
)


def group_rows(groups: Groups, metric: str = "HR@10", names: Mapping[str, str] = MORE) -> list[list[str]]:
    """Return model and baselines in percent: a heading, and a row for each group and scoring."""
    rows = [[f"{metric} %", "targets", "model", *names.values()]]
    for scoring, by_group in groups.items():
        for group, found in by_group.items():
            label = f"{group}, masked" if scoring == "masked" else group
            means = [percent(found[name][metric]) for name in ("model", *names)]
            rows.append([label, str(found["targets"]), *means])
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows as lines with aligned columns: the first column left, the others right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _width(column: Column) -> int:
    return max(column.width, len(column.title))


def _trained(result: WindowResult, name: str) -> str:
    # Lines of earlier versions lack some fields.
    return NOTHING if result.trained is None else str(result.trained.get(name, NOTHING))


def _experts(modality: str) -> Callable[[WindowResult], str]:
    def cell(result: WindowResult) -> str:
        return NOTHING if result.trained is None else ",".join(map(str, result.trained["experts"][modality]))

    return cell


def _quality(*path: str, metric: str) -> Callable[[WindowResult], str]:
    def cell(result: WindowResult) -> str:
        if result.test is None:
            return NOTHING
        found: Any = result.test
        for name in path:
            found = found[name]
        return percent(found[metric])

    return cell


def _seconds(result: WindowResult) -> str:
    spent = sum(line["time"]["seconds"] for line in [*result.epochs, *([result.test] if result.test else [])])
    return f"{spent:.1f}"
