"""Tables of a stream in Markdown: a summary in a few lines, then time, memory, quality and parts by window."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench.core import machine
from bench.core.timing import quantiles
from bench.e2e.stream.records import RunRecord, StreamRun, WindowRecord
from bench.report.tables import markdown_table, mib

METRICS = ("HR@10", "NDCG@10")
Cell = Callable[[WindowRecord], str]


def report(run: StreamRun) -> str:
    """Return all tables."""
    sections = [[settings_line(run)], headline(run), _times(run), _memory(run), _quality(run), parts(run)]
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
    # Imported here because other commands import this module without xsmoe's dependencies.
    from xsmoe.stream.evaluation.metrics import pool

    lines = [f"- machine: {machine.line(run.machine)}"]
    if len(run.windows) < run.settings["windows"]:
        lines.append(f"- **stopped after {len(run.windows)} of {run.settings['windows']} windows**")
    for name in run.names[1:]:
        done = [w for w in run.windows if w.timed(name)]
        if not done:
            continue
        ends = list({window.window: window for window in (done[0], done[-1])}.values())
        faster = ", ".join(
            f"{_median(w.runs[name])} instead of {_median(w.paper)} ms with {_experts(w.experts)} "
            f"({_ratio(w, name):.1f} x faster)"
            for w in ends
        )
        whole = sum(w.paper.seconds for w in done) / sum(w.runs[name].seconds for w in done)
        lines.append(f"- {name}: a training step {faster}; all windows with their tests {whole:.1f} x faster")
        peaks = ", ".join(
            f"{mib(w.runs[name].peak_bytes)} instead of {mib(w.paper.peak_bytes)} MiB with {_experts(w.experts)}"
            for w in ends
        )
        last = done[-1]
        held = f"{mib(last.runs[name].held_bytes)} instead of {mib(last.paper.held_bytes)} MiB"
        lines.append(f"- {name}: peak of a step {peaks}; weights and optimizer in the last window {held}")
        tested = [w for w in done if w.runs[name].difference]
        if tested:
            difference = pool([w.runs[name].difference or {} for w in tested])
            mine, paper = (
                pool([one.test_scores or {} for one in runs])
                for runs in ([w.runs[name] for w in tested], [w.paper for w in tested])
            )
            scores = ", ".join(
                f"{metric} {_percent(mine, metric)} against {_percent(paper, metric)} %, difference "
                f"{_percent(difference, metric, sign=True)}"
                for metric in METRICS
            )
            users = f"{difference['users']} users of {len(tested)} tests"
            lines.append(f"- {name}: {scores} (± standard error over {users}, without the variance of dropout)")
    return lines


def _times(run: StreamRun) -> list[str]:
    """Return the time of each run's step, epoch and window, and the speed-ups."""
    others = run.names[1:]
    columns: dict[str, Cell] = {"steps": lambda w: str(len(w.paper.steps))}
    columns |= _for_each(run.names, "{} step ms", _step_cell)
    columns |= {f"x {name}": partial(_ratio_cell, name) for name in others}
    columns |= _for_each(run.names, "{} epoch s", lambda one: f"{np.mean(one.epochs):.2f}")
    columns |= _for_each(run.names, "{} window s", lambda one: f"{one.seconds:.2f}")
    columns |= {f"error {name}": partial(_error_cell, name) for name in others}
    caption = (
        "Time. Median (10th-90th percentile) of a window's steps. x: the speed-up over equal batches. A window is its "
        "expansion, epochs and test."
    )
    return _by_window(caption, run.windows, columns)


def _memory(run: StreamRun) -> list[str]:
    """Return the peaks of steps, and the memory between steps."""
    columns = _for_each(run.names, "{} peak MiB", lambda one: mib(one.peak_bytes))
    columns |= {f"x {name}": partial(_peak_ratio_cell, name) for name in run.names[1:]}
    columns |= _for_each(run.names, "{} weights MiB", lambda one: mib(one.weight_bytes))
    columns |= _for_each(run.names, "{} optimizer MiB", lambda one: mib(one.optimizer_bytes))
    columns |= _for_each(run.names, "{} rows", lambda one: str(one.rows))
    caption = (
        "Memory. Peak: growth of the allocator in one forward and backward. Weights include tensors that are derived "
        "from them and kept. rows: rows that a step encodes."
    )
    return _by_window(caption, run.windows, columns)


def _quality(run: StreamRun) -> list[str]:
    """Return HR and NDCG of the windows that were tested."""
    tested = [w for w in run.windows if w.paper.test_scores is not None and w.popularity is not None]
    columns: dict[str, Cell] = {
        "users": lambda w: str((w.paper.test_scores or {})["users"]),
        "items": lambda w: str(w.candidates),
    }
    for metric in METRICS:
        columns |= _for_each(run.names, f"{metric} {{}}", partial(_score_cell, metric))
        columns |= _for_each(run.names[1:], f"{metric} {{}} - published", partial(_difference_cell, metric))
        columns[f"{metric} popular"] = partial(_popularity_cell, metric)
    caption = (
        "Quality of each window's model on the next window, in percent, with standard errors over users. Differences "
        "are paired by user. popular: the most frequent items so far."
    )
    return _by_window(caption, tested, columns) if tested else []


def parts(run: StreamRun) -> list[str]:
    """Return the time of each part of a step in the first and the last timed window."""
    done = [w for w in run.windows if any(w.timed(name) for name in run.names)]
    body = []
    for window in list({w.window: w for w in done[:1] + done[-1:]}.values()):
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
    texts += [f"{name} {_ratio(window, name):.1f} x faster" for name in names[1:] if window.ratio(name)]
    texts += [
        f"HR@10 {name} {_percent(one.test_scores, 'HR@10')} %"
        for name, one in window.runs.items()
        if one.test_scores is not None
    ]
    texts += [f"{name} refused: {one.refused}" for name, one in window.runs.items() if one.refused]
    return f"window {window.window}, {_experts(window.experts)}: {'; '.join(texts)}"


def _by_window(caption: str, windows: Sequence[WindowRecord], columns: Mapping[str, Cell]) -> list[str]:
    head = ["window", "experts", *columns]
    body = [[str(w.window), str(w.experts), *(cell(w) for cell in columns.values())] for w in windows]
    return [caption, "", *markdown_table(head, body)]


def _for_each(names: Sequence[str], title: str, cell: Callable[[RunRecord], str]) -> dict[str, Cell]:
    """Return a column for each run."""

    def column(name: str) -> Cell:
        def of_window(window: WindowRecord) -> str:
            found = window.runs.get(name)
            if found is None:
                return ""
            return "refused" if found.refused else cell(found) if found.steps else ""

        return of_window

    return {title.format(name): column(name) for name in names}


def _step_cell(record: RunRecord) -> str:
    found = quantiles(record.step_seconds)
    return f"{_ms(found.median)} ({_ms(found.p10)}-{_ms(found.p90)})"


def _ratio_cell(name: str, window: WindowRecord) -> str:
    ratio = window.ratio(name)
    return "" if ratio is None else f"{ratio.median:.1f} ({ratio.p10:.1f}-{ratio.p90:.1f})"


def _peak_ratio_cell(name: str, window: WindowRecord) -> str:
    record = window.timed(name)
    if record is None:
        return "refused" if name in window.runs and window.runs[name].refused else ""
    return f"{(window.paper.peak_bytes or 0) / (record.peak_bytes or 1):.1f}"


def _score_cell(metric: str, record: RunRecord) -> str:
    return _percent(record.test_scores or {}, metric)


def _difference_cell(metric: str, record: RunRecord) -> str:
    return _percent(record.difference or {}, metric, sign=True)


def _popularity_cell(metric: str, window: WindowRecord) -> str:
    return f"{100 * (window.popularity or {})[metric]:.2f}"


def _error_cell(name: str, window: WindowRecord) -> str:
    found = window.runs.get(name)
    return "" if found is None or found.error is None else f"{found.error:.2f}"


def _ratio(window: WindowRecord, name: str) -> float:
    found = window.ratio(name)
    return found.median if found else float("nan")


def _median(record: RunRecord) -> str:
    return _ms(quantiles(record.step_seconds).median)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _experts(count: int) -> str:
    return f"{count} expert" + ("" if count == 1 else "s")


def _percent(scores: Mapping[str, Any], metric: str, *, sign: bool = False) -> str:
    value = scores.get(metric)
    if value is None:
        return ""
    shown = f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"
    error = scores["se"][metric]
    return shown if error is None else f"{shown} ± {100 * error:.2f}"
