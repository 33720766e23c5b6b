"""What a comparison of variants prints, in Markdown."""

from collections.abc import Mapping
from typing import Any

from bench.quality.variants import BASE
from bench.results import aligned

Found = Mapping[str, Any]
_KINDS = {
    "own": "own",
    "next": "next",
    "backward": "later less own",
    "last": "last less own",
    "forward": "after next",
}


def report(found: Mapping[str, Found]) -> str:
    """Return all tables that the summaries of some variants allow."""
    parts = [_main(found)]
    if any(one["groups"] for one in found.values()):
        parts.append(_groups(found))
    if any(one["matrix"] for one in found.values()):
        parts.append(_matrix(found))
    commits = sorted({commit for one in found.values() for commit in one["commits"]})
    if len(commits) > 1:
        parts.append(f"**Runs of several commits are compared: {', '.join(commits)}.**")
    return "\n\n".join(parts)


def _main(found: Mapping[str, Found]) -> str:
    head = ["variant", "seeds", "HR@10 %", f"less {BASE}", "± users", "NDCG@10 %", f"less {BASE}", "± users"]
    head += ["experts", "seconds", "MiB", "verdicts"]
    rows = []
    for name, one in found.items():
        difference = one["difference"] or {}
        cells = [name, str(len(one["seeds"]))]
        for metric in ("HR@10", "NDCG@10"):
            cells.append(_percent(one[metric]))
            cells.append(_percent(difference.get(metric), "+"))
            cells.append(_number(difference.get(metric, {}).get("se_users"), 100, 2))
        cells += [
            _number(one["experts"], 1, 1),
            _number(one["train_seconds"], 1, 0),
            _number(one["peak_rss_mib"], 1, 0),
        ]
        cells.append(", ".join(f"{count} {verdict}" for verdict, count in one["verdicts"].items()))
        rows.append(cells)
    return "\n".join(
        [
            "Last items, with what was seen in earlier windows left out; mean ± standard error over seeds, differences "
            'paired by seed. "± users" is the standard error over users of the paired difference.',
            "",
            *aligned(head, rows),
        ]
    )


def _groups(found: Mapping[str, Found]) -> str:
    columns = {
        (scoring, group): None
        for one in found.values()
        for scoring, groups in one["groups"].items()
        for group in groups
    }
    head = ["variant", *(f"{group}, {scoring}" for scoring, group in columns)]
    rows = []
    for name, one in found.items():
        cells = [name]
        for scoring, group in columns:
            cell = one["groups"].get(scoring, {}).get(group)
            cells.append("" if cell is None else _percent(cell))
        rows.append(cells)
    return "\n".join(["HR@10 % of all targets, by group and by what is left out:", "", *aligned(head, rows)])


def _matrix(found: Mapping[str, Found]) -> str:
    rows = [
        [
            name,
            *(_percent(one["matrix"]["HR@10"][kind], "+" if "less" in title else "") for kind, title in _KINDS.items()),
        ]
        for name, one in found.items()
        if one["matrix"]
    ]
    text = (
        "HR@10 % of every window's model on every window, means over windows: on its own window, on the next one, of "
        "later models less the window's own model (negative: forgotten), of the last model less the window's own, and "
        "on windows after the next:"
    )
    return "\n".join([text, "", *aligned(["variant", *_KINDS.values()], rows)])


def _percent(value: Found | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return ""
    error = "" if value["se"] is None else f" ± {100 * value['se']:.2f}"
    return f"{100 * value['mean']:{sign}.2f}{error}"


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"
