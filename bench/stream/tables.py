"""A stream's run in Markdown: what came out in a few lines, then time, memory, quality and parts, window by window."""

from collections.abc import Callable, Sequence

import numpy as np

from bench import machine
from bench.measure import quantiles
from bench.results import aligned
from bench.stream.records import RunRecord, StreamRun, WindowRecord

METRICS = ("HR@10", "NDCG@10")


def report(run: StreamRun) -> str:
    """All of it."""
    sections = [[setting(run)], headline(run), times(run), memory(run), quality(run), parts(run)]
    refused = [f"- window {window}: {name} refused: {reason}" for window, name, reason in run.refused()]
    return "\n\n".join("\n".join(lines) for lines in [*sections, refused] if lines)


def setting(run: StreamRun) -> str:
    """What was streamed."""
    s = run.settings
    others = "" if s["top_k"] is None else f", top-k {s['top_k']}"
    others += ", ours as CUDA graphs" if s.get("graph") else ""
    return (
        f"### stream {s['dtype']}, {s['device']}: {s['windows']} windows, {s['users']} users each, batch {s['batch']}, "
        f"{s['epochs']} epochs, D {s['dim']}, R {s['rank']}, {s['pooling']} pooling, dropout {s['dropout']:g}{others}"
    )


def headline(run: StreamRun) -> list[str]:
    """How much faster, how much less memory, at what quality, on which machine."""
    # Only here: it needs what `xsmoe` depends on, and the bench's other commands import this file too.
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
            f"{_median(w.runs[name])} instead of {_median(_theirs(w))} ms with {_experts(w.experts)} "
            f"({_times(_ratio(w, name))} faster)"
            for w in ends
        )
        whole = sum(_theirs(w).seconds for w in done) / sum(w.runs[name].seconds for w in done)
        lines.append(f"- {name}: a training step {faster}; all windows with their tests {_times(whole)} faster")
        peaks = ", ".join(
            f"{_mib(w.runs[name].peak_bytes)} instead of {_mib(_theirs(w).peak_bytes)} MiB with {_experts(w.experts)}"
            for w in ends
        )
        held = f"{_mib(_held(done[-1].runs[name]))} instead of {_mib(_held(_theirs(done[-1])))} MiB"
        lines.append(f"- {name}: at its peak a step takes {peaks}; weights and optimizer are {held} in the end")
        tested = [w for w in done if w.runs[name].difference]
        if tested:
            difference = pool([w.runs[name].difference or {} for w in tested])
            told = ", ".join(
                f"{metric} {_percent(pool([w.runs[name].test_scores or {} for w in tested]), metric)} against "
                f"{_percent(pool([_theirs(w).test_scores or {} for w in tested]), metric)} %, difference "
                f"{_percent(difference, metric, sign=True)}"
                for metric in METRICS
            )
            counted = f"{difference['users']} users of {len(tested)} tests; dropout draws come on top"
            lines.append(f"- {name}: {told} (± standard error over {counted})")
    return lines


def times(run: StreamRun) -> list[str]:
    """A row a window: each run's step, epoch and window, and the ratios."""
    head = ["window", "experts", "steps"]
    head += [f"{name} step ms" for name in run.names] + [f"x {name}" for name in run.names[1:]]
    head += [f"{name} epoch s" for name in run.names] + [f"{name} window s" for name in run.names]
    head += [f"error {name}" for name in run.names[1:]]
    body = []
    for window in run.windows:
        cells = [str(window.window), str(window.experts), str(len(_theirs(window).steps))]
        cells += [_each(window, name, _span) for name in run.names]
        cells += [_spread(window.ratio(name)) for name in run.names[1:]]
        cells += [_each(window, name, lambda one: f"{np.mean(one.epochs):.2f}") for name in run.names]
        cells += [_each(window, name, lambda one: f"{one.seconds:.2f}") for name in run.names]
        cells += [_error(window, name) for name in run.names[1:]]
        body.append(cells)
    return [
        "Time. Median (10th-90th percentile) of a window's steps; x: the ratios of equal batches; a window is its "
        "expansion, epochs and test.",
        "",
        *aligned(head, body),
    ]


def memory(run: StreamRun) -> list[str]:
    """A row a window: peaks, and what is held between steps."""
    head = ["window", "experts", *(f"{name} peak MiB" for name in run.names), *(f"x {n}" for n in run.names[1:])]
    head += [f"{name} weights MiB" for name in run.names] + [f"{name} optimizer MiB" for name in run.names]
    head += [f"{name} rows" for name in run.names]
    body = []
    for window in run.windows:
        cells = [str(window.window), str(window.experts)]
        cells += [_each(window, name, lambda one: _mib(one.peak_bytes)) for name in run.names]
        cells += [_less(window, name) for name in run.names[1:]]
        cells += [_each(window, name, lambda one: _mib(one.weight_bytes)) for name in run.names]
        cells += [_each(window, name, lambda one: _mib(one.optimizer_bytes)) for name in run.names]
        cells += [_each(window, name, lambda one: str(one.rows)) for name in run.names]
        body.append(cells)
    return [
        "Memory. Peak: the allocator's growth in one forward and backward; weights with what is derived from them and "
        "kept; rows: what a step encodes.",
        "",
        *aligned(head, body),
    ]


def quality(run: StreamRun) -> list[str]:
    """A row a window that was tested: HR and NDCG side by side."""
    head = ["window", "users", "items"]
    for metric in METRICS:
        head += [f"{metric} {name}" for name in run.names] + [f"{n} - published" for n in run.names[1:]] + ["popular"]
    body = []
    for window in run.windows:
        scores = _theirs(window).test_scores
        if scores is None or window.popularity is None:
            continue
        cells = [str(window.window), str(scores["users"]), str(window.candidates)]
        for metric in METRICS:
            score, change = _shower("test_scores", metric), _shower("difference", metric, sign=True)
            cells += [_each(window, name, score) for name in run.names]
            cells += [_each(window, name, change) for name in run.names[1:]]
            cells += [f"{100 * window.popularity[metric]:.2f}"]
        body.append(cells)
    if not body:
        return []
    return [
        "Quality of each window's model on the next window, in percent, with standard errors over users; differences "
        "are user by user. popular: the items most taken so far.",
        "",
        *aligned(head, body),
    ]


def parts(run: StreamRun) -> list[str]:
    """Where a step's time goes, in the first and the last window that was timed."""
    done = [w for w in run.windows if any(w.timed(name) for name in run.names)]
    body = []
    for window in list({w.window: w for w in done[:1] + done[-1:]}.values()):
        for name in run.names:
            if (record := window.timed(name)) is not None and parted(record):
                spent = [f"{_ms(seconds)}" for seconds in medians(record)]
                body.append([name, str(window.experts), *spent, _median(record)])
    if not body:
        return []
    return ["Parts of a step, in ms (medians).", "", *aligned(["run", "experts", *run.parts, "step"], body)]


def parted(record: RunRecord) -> bool:
    """Whether the parts of its steps are told apart, which those of CUDA graphs are not."""
    return len(record.steps[0]) > 1


def medians(record: RunRecord) -> list[float]:
    """The median seconds of each part."""
    return [float(value) for value in np.median(np.array(record.steps), axis=0)]


def summary(window: WindowRecord, names: Sequence[str]) -> str:
    """A window in a line, for who watches."""
    told = [f"{name} {_median(one)} ms" for name in names if (one := window.timed(name)) is not None]
    faster = [f"{name} {_times(_ratio(window, name))} faster" for name in names[1:] if window.ratio(name)]
    scores = [
        f"HR@10 {name} {_percent(one.test_scores, 'HR@10')} %"
        for name, one in window.runs.items()
        if one.test_scores is not None
    ]
    wrong = [f"{name} refused: {one.refused}" for name, one in window.runs.items() if one.refused]
    steps = [f"a step of {', '.join(told)}"] if told else []
    return f"window {window.window}, {_experts(window.experts)}: {'; '.join([*steps, *faster, *scores, *wrong])}"


def _theirs(window: WindowRecord) -> RunRecord:
    return window.runs["published"]


def _held(record: RunRecord) -> int:
    return record.weight_bytes + record.optimizer_bytes


def _each(window: WindowRecord, name: str, cell: Callable[[RunRecord], str]) -> str:
    found = window.runs.get(name)
    if found is None:
        return ""
    if found.refused:
        return "refused"
    return cell(found) if found.steps else ""


def _less(window: WindowRecord, name: str) -> str:
    most = _theirs(window).peak_bytes
    return _each(window, name, lambda one: f"{(most or 0) / (one.peak_bytes or 1):.1f}")


def _shower(scores: str, metric: str, *, sign: bool = False) -> Callable[[RunRecord], str]:
    return lambda one: _percent(getattr(one, scores) or {}, metric, sign=sign)


def _error(window: WindowRecord, name: str) -> str:
    found = window.runs.get(name)
    return "" if found is None or found.error is None else f"{found.error:.2f}"


def _ratio(window: WindowRecord, name: str) -> float:
    found = window.ratio(name)
    return found[0] if found else float("nan")


def _spread(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.1f} ({ratio[1]:.1f}-{ratio[2]:.1f})"


def _span(record: RunRecord) -> str:
    found = quantiles(record.step_seconds)
    return f"{_ms(found.median)} ({_ms(found.p10)}-{_ms(found.p90)})"


def _median(record: RunRecord) -> str:
    return _ms(quantiles(record.step_seconds).median)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} x"


def _experts(count: int) -> str:
    return f"{count} expert" + ("" if count == 1 else "s")


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


def _percent(scores: dict[str, object], metric: str, *, sign: bool = False) -> str:
    value = scores.get(metric)
    if not isinstance(value, float):
        return ""
    errors = scores["se"]
    assert isinstance(errors, dict)
    shown = f"{100 * value:+.2f}" if sign else f"{100 * value:.2f}"
    return shown if errors[metric] is None else f"{shown} ± {100 * errors[metric]:.2f}"
