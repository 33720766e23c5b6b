"""Command `xsmoe report`: the report of a run."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xsmoe.cli.display import Display
from xsmoe.cli.run_config import RunConfig
from xsmoe.report import html, plots, results, tables
from xsmoe.report.verdict import BASELINES, Verdict, judge
from xsmoe.stream.state.checkpoints import write_atomically
from xsmoe.stream.state.run_folder import read_metrics
from xsmoe_kernels import __version__, info


def report(folder: Path, display: Display) -> None:
    """Write a run's report again."""
    RunConfig.read(folder)
    metrics = read_metrics(folder)
    if not metrics:
        raise ValueError(f"{folder} has no metrics yet: no epoch is finished; resume it with `xsmoe train`")
    display.say(f"Report: {write_report(folder, metrics)}")


def write_report(folder: Path, metrics: Sequence[dict[str, Any]]) -> Path:
    """Write report/*.png, report/summary.json and report/report.html. Return the path of report.html."""
    config = RunConfig.read(folder)
    windows = results.window_results(metrics)
    tests = [line for line in metrics if line["kind"] == "test"]
    compared, groups, verdict = results.compare(tests), results.groups(tests), judge(tests)
    pictures = plots.write_plots(windows, folder / "report")
    page = html.Page(
        title=f"XSMoE run {folder.resolve().name}",
        about=_about(config, windows),
        verdict=str(verdict),
        clear=verdict.verdict == "above",
        sections=[
            *_groups(groups),
            *_comparison(compared),
            _windows(config, windows, results.left_out(metrics)),
            html.Section("Plots", pictures=[(path, plot.caption) for plot, path in pictures]),
            _growth(windows),
            _cost(metrics),
            html.Section("Settings", table=html.settings_table(config.settings()), folded=True),
            html.Section("Model", table=html.settings_table(config.model["items"] | _users(config)), folded=True),
            html.Section("Versions", table=html.settings_table(_versions()), folded=True),
        ],
    )
    write_atomically(folder / "report" / "summary.json", _summary(config, metrics, verdict))
    path = folder / "report" / "report.html"
    write_atomically(path, html.render(page).encode())
    return path


def _summary(config: RunConfig, metrics: Sequence[dict[str, Any]], verdict: Verdict) -> bytes:
    """Return the results of the run, with versions and devices, as JSON."""
    spent, without = results.cost(metrics), results.left_out(metrics)
    tests = [line for line in metrics if line["kind"] == "test"]
    content = {
        "date": date.today().isoformat(),
        "versions": _versions(),
        "devices": info()["devices"],
        "settings": {name: value for name, value in config.settings().items() if name not in ("dataset", "store")},
        **asdict(verdict),
        "groups": results.groups(tests),
        "quality": [asdict(found) for found in results.compare(tests)],
        "left_out": None if without is None else asdict(without),
        "cost": None if spent is None else asdict(spent),
        "experts": next((line["experts"] for line in reversed(metrics) if line["kind"] == "window"), None),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _about(config: RunConfig, windows: Sequence[results.WindowResult]) -> str:
    done = [result for result in windows if result.trained is not None]
    interactions = sum(result.trained["interactions"] for result in done if result.trained is not None)
    ranked = (
        "all items except the first of each user's sequence"
        if config.stream.targets == "all"
        else "the last item of each user"
    )
    return (
        f"{len(done)} windows trained, {interactions} interactions, modalities {', '.join(config.modalities)}, "
        f"protocol {config.stream.protocol}, seed {config.stream.seed}. A window's model is tested on the next window. "
        f"The targets are {ranked}. The candidates are all items known so far."
    )


def _groups(groups: results.Groups) -> list[html.Section]:
    if not groups:
        return []
    heading, *rows = tables.group_rows(groups, names=BASELINES)
    text = f"Means over targets, in percent. {tables.GROUPS_LEGEND[0].upper()}{tables.GROUPS_LEGEND[1:]}."
    return [html.Section("Against baselines", [text], html.Table(heading, rows))]


def _comparison(compared: Sequence[results.Comparison]) -> list[html.Section]:
    if not compared:
        return []
    heading, *rows = tables.comparison_rows(compared, results.POPULARITY)
    text = (
        f"Targets are the last items of all {compared[0].users} users of all tests. Items that a user has seen in "
        "earlier windows are excluded. In percent, ± one standard error over users."
    )
    return [html.Section("Last items, compared with popularity", [text], html.Table(heading, rows))]


def _windows(
    config: RunConfig, windows: Sequence[results.WindowResult], left_out: results.LeftOut | None
) -> html.Section:
    columns = tables.columns(config.modalities)
    groups = [(group, len(list(members))) for group, members in groupby(column.group for column in columns)]
    table = html.Table(
        [column.title for column in columns],
        [[column.cell(result) for column in columns] for result in windows],
        groups=groups,
    )
    counted = [] if left_out is None else [f"{left_out}."]
    return html.Section("Windows", [f"{tables.LEGEND[0].upper()}{tables.LEGEND[1:]}.", *counted], table)


def _growth(windows: Sequence[results.WindowResult]) -> html.Section:
    rows = []
    for result in windows:
        if result.test is None:
            continue
        for name in result.test["expanded"] | result.test["pruned"]:
            drops = [
                f"level {drop['level'] + 1}: expert {drop['expert']} (share {tables.percent(drop['share'])} %)"
                for drop in result.test["pruned"].get(name, [])
            ]
            added = [f"level {level['level'] + 1}" for level in result.test["expanded"].get(name, [])]
            rows.append([str(result.number), name, "; ".join(drops) or "none", ", ".join(added) or "none"])
    table = html.Table(["after window", "modality", "pruned", "one expert added at"], rows, text=True)
    return html.Section("Growth", [] if rows else ["Nothing yet."], table if rows else None)


def _cost(metrics: Sequence[dict[str, Any]]) -> html.Section:
    spent = results.cost(metrics)
    return html.Section("Time and memory", [f"{spent}." if spent is not None else "No window is finished yet."])


def _users(config: RunConfig) -> dict[str, Any]:
    return {f"user encoder, {name}": value for name, value in config.model["users"].items()}


def _versions() -> dict[str, str]:
    return {
        "xsmoe": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
    }
