"""Tables of a stream in Markdown: a summary in a few lines, then time, memory, quality and parts by window."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bench.core import machine
from bench.core.timing import Quantiles, quantiles
from bench.e2e.stream.records import RunRecord, StreamRun, WindowRecord
from bench.report.tables import markdown_table, mib

T = TypeVar("T")

METRICS = ("HR@10", "NDCG@10")


class Column(NamedTuple):
    """A column of a table with a row for each window.

    Attributes:
        title: "{}" in it is the name of a run.
        cell: returns the text of a window and a run.
        of: "all" or "ours", with a column for each of these runs, or "window", with one column.
    """

    title: str
    cell: Callable[[WindowRecord, str], str]
    of: str = "all"


TIMES = (
    Column("steps", lambda w, _: str(len(w.paper.steps)), "window"),
    Column("{} step ms", lambda w, name: _span(quantiles(w.runs[name].step_seconds), _ms)),
    Column("x {}", lambda w, name: _span(w.ratio(name), "{:.1f}".format), "ours"),
    Column("{} epoch s", lambda w, name: f"{np.mean(w.runs[name].epochs):.2f}"),
    Column("{} window s", lambda w, name: f"{w.runs[name].seconds:.2f}"),
    Column("error {}", lambda w, name: "" if (error := w.runs[name].error) is None else f"{error:.2f}", "ours"),
)
MEMORY = (
    Column("{} peak MiB", lambda w, name: mib(w.runs[name].peak_bytes)),
    Column("x {}", lambda w, name: f"{(w.paper.peak_bytes or 0) / (w.runs[name].peak_bytes or 1):.1f}", "ours"),
    Column("{} weights MiB", lambda w, name: mib(w.runs[name].weight_bytes)),
    Column("{} optimizer MiB", lambda w, name: mib(w.runs[name].optimizer_bytes)),
    Column("{} rows", lambda w, name: str(w.runs[name].rows)),
)


def _quality(metric: str) -> tuple[Column, ...]:
    return (
        Column(f"{metric} {{}}", lambda w, name: _percent(w.runs[name].test_scores, metric)),
        Column(f"{metric} {{}} - published", lambda w, name: _percent(w.runs[name].difference, metric, "+"), "ours"),
        Column(f"{metric} popular", lambda w, _: f"{100 * (w.popularity or {})[metric]:.2f}", "window"),
    )


QUALITY = (
    Column("users", lambda w, _: str((w.paper.test_scores or {})["users"]), "window"),
    Column("items", lambda w, _: str(w.candidates), "window"),
    *_quality(METRICS[0]),
    *_quality(METRICS[1]),
)
TABLES = (
    (
        "Time. Median (10th-90th percentile) of a window's steps. x: the speed-up over equal batches. A window is its "
        "expansion, epochs and test.",
        TIMES,
    ),
    (
        "Memory. Peak: growth of the allocator in one forward and backward. Weights include tensors that are derived "
        "from them and kept. rows: rows that a step encodes.",
        MEMORY,
    ),
    (
        "Quality of each window's model on the next window, in percent, with standard errors over users. Differences "
        "are paired by user. popular: the most frequent items so far.",
        QUALITY,
    ),
)


def report(run: StreamRun) -> str:
    """Return all tables."""
    sections = [[settings_line(run)], headline(run), *(_by_window(run, *table) for table in TABLES), parts(run)]
    refused = [f"- window {window}: {name} refused: {reason}" for window, name, reason in run.refused()]
    return "\n\n".join("\n".join(lines) for lines in [*sections, refused] if lines)


def settings_line(run: StreamRun) -> str:
    """Return the settings of the stream as a heading."""
    s = run.settings
    others = "" if s["top_k"] is None else f", top-k {s['top_k']}"
    others += ", ours as CUDA graphs" if s.get("graph") else ""
    return (
        f"### stream {s['dtype']}, {s['device']}: {s['windows']} windows, {s['users']} users each, batch {s['batch']}, "
        f"{s['epochs']} epochs, D {s['dim']}, R {s['rank']}, {s['pooling']} pooling, dropout {s['dropout']:g}{others}"
    )


def headline(run: StreamRun) -> list[str]:
    """Return the machine, and for each of our runs its speed-up, memory and quality in one line each."""
    lines = [f"- machine: {machine.line(run.machine)}"]
    if len(run.windows) < run.settings["windows"]:
        lines.append(f"- **stopped after {len(run.windows)} of {run.settings['windows']} windows**")
    return lines + [f"- {name}: {line}" for name in run.names[1:] for line in _summary(run, name)]


def _summary(run: StreamRun, name: str) -> list[str]:
    # Imported here because other commands import this module without xsmoe's dependencies.
    from xsmoe.stream.evaluation.metrics import pool

    done = [(window, window.runs[name]) for window in run.windows if window.timed(name)]
    if not done:
        return []
    ends = _first_and_last(done)
    faster = ", ".join(
        f"{_median(mine)} instead of {_median(w.paper)} ms with {_experts(w)} ({_times_faster(w, name)})"
        for w, mine in ends
    )
    whole = sum(w.paper.seconds for w, _ in done) / sum(mine.seconds for _, mine in done)
    peaks = ", ".join(
        f"{mib(mine.peak_bytes)} instead of {mib(w.paper.peak_bytes)} MiB with {_experts(w)}" for w, mine in ends
    )
    last, mine = done[-1]
    held = f"{mib(mine.held_bytes)} instead of {mib(last.paper.held_bytes)} MiB"
    lines = [
        f"a training step {faster}; all windows with their tests {whole:.1f} x faster",
        f"peak of a step {peaks}; weights and optimizer in the last window {held}",
    ]
    tested = [
        (w.paper.test_scores or {}, mine.test_scores or {}, mine.difference) for w, mine in done if mine.difference
    ]
    if tested:
        paper, ours, difference = (pool(list(scores)) for scores in zip(*tested, strict=True))
        scores = ", ".join(
            f"{metric} {_percent(ours, metric)} against {_percent(paper, metric)} %, difference "
            f"{_percent(difference, metric, '+')}"
            for metric in METRICS
        )
        users = f"{difference['users']} users of {len(tested)} tests"
        lines.append(f"{scores} (± standard error over {users}, without the variance of dropout)")
    return lines


def parts(run: StreamRun) -> list[str]:
    """Return the time of each part of a step in the first and the last timed window."""
    done = [w for w in run.windows if any(w.timed(name) for name in run.names)]
    body = []
    for window in _first_and_last(done):
        for name in run.names:
            if (record := window.timed(name)) is not None and record.has_parts:
                medians = [_ms(seconds) for seconds in part_medians(record)]
                body.append([name, str(window.experts), *medians, _median(record)])
    if not body:
        return []
    head = ["run", "experts", *run.parts, "step"]
    return ["Parts of a step, in ms (medians).", "", *markdown_table(head, body)]


def part_medians(record: RunRecord) -> list[float]:
    """Return the median seconds of each part of a step."""
    return [float(value) for value in np.median(np.array(record.steps), axis=0)]


def window_line(window: WindowRecord, names: Sequence[str]) -> str:
    """Return a window in one line, for progress."""
    steps = [f"{name} {_median(one)} ms" for name in names if (one := window.timed(name)) is not None]
    texts = [f"a step of {', '.join(steps)}"] if steps else []
    texts += [f"{name} {_times_faster(window, name)}" for name in names[1:] if window.ratio(name)]
    texts += [f"HR@10 {n} {_percent(one.test_scores, 'HR@10')} %" for n, one in window.runs.items() if one.test_scores]
    texts += [f"{name} refused: {one.refused}" for name, one in window.runs.items() if one.refused]
    return f"window {window.window}, {_experts(window)}: {'; '.join(texts)}"


def _by_window(run: StreamRun, caption: str, columns: Sequence[Column]) -> list[str]:
    """Return a table with a row for each window; for quality, for each window that was tested."""
    windows = run.windows
    if columns is QUALITY:
        windows = [w for w in windows if w.paper.test_scores is not None and w.popularity is not None]
    if not windows:
        return []
    names = {"all": run.names, "ours": run.names[1:], "window": [""]}
    every = [(column, name) for column in columns for name in names[column.of]]
    head = ["window", "experts", *(column.title.format(name) for column, name in every)]
    body = [[str(w.window), str(w.experts), *(_cell(w, column, name) for column, name in every)] for w in windows]
    return [caption, "", *markdown_table(head, body)]


def _cell(window: WindowRecord, column: Column, name: str) -> str:
    if column.of == "window" or window.timed(name):
        return column.cell(window, name)
    return "refused" if name in window.runs and window.runs[name].refused else ""


def _first_and_last(values: Sequence[T]) -> Sequence[T]:
    return values if len(values) < 2 else [values[0], values[-1]]


def _span(found: Quantiles | None, text: Callable[[float], str]) -> str:
    return "" if found is None else f"{text(found.median)} ({text(found.p10)}-{text(found.p90)})"


def _times_faster(window: WindowRecord, name: str) -> str:
    found = window.ratio(name)
    return f"{found.median if found else float('nan'):.1f} x faster"


def _median(record: RunRecord) -> str:
    return _ms(quantiles(record.step_seconds).median)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _experts(window: WindowRecord) -> str:
    return f"{window.experts} expert" + ("" if window.experts == 1 else "s")


def _percent(scores: Mapping[str, Any] | None, metric: str, sign: str = "") -> str:
    value = (scores or {}).get(metric)
    if scores is None or value is None:
        return ""
    error = scores["se"][metric]
    return f"{100 * value:{sign}.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
