"""The report of a run: its contents, and that the page is self-contained."""

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.helpers import Place, run, succeed, write_log
from xsmoe.cli.run_config import RunConfig
from xsmoe.report import plots, results
from xsmoe.report.verdict import judge
from xsmoe.stream.evaluation.metrics import per_user, summarize
from xsmoe.stream.state.run_folder import read_metrics, read_window

PLOTS = {"quality", "baselines", "experts", "utilization", "cost", "training"}
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Parser that collects references and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def close(self) -> None:
        super().close()
        assert not self._open


def test_page_is_self_contained(trained: Place) -> None:
    succeed("report", trained.run)
    text = (trained.run / "report" / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert len(page.references) == len(PLOTS)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "<script" not in text
    said = " ".join(page.text)
    sections = ("Against baselines", "Last items, compared with popularity", "Windows", "Growth", "Time and memory")
    for part in (*sections, "Settings", "Versions", "batch_size"):
        assert part in said
    tests = [line for line in read_metrics(trained.run) if line["kind"] == "test"]
    assert f"{100 * tests[-1]['all']['HR@10']:.2f}" in said


def test_summary_equals_the_metrics(trained: Place) -> None:
    succeed("report", trained.run)
    summary = json.loads((trained.run / "report" / "summary.json").read_text())
    tests = [line for line in read_metrics(trained.run) if line["kind"] == "test"]
    users = [line["all"]["users"] for line in tests]
    mean = sum(n * line["all"]["HR@10"] for n, line in zip(users, tests, strict=True)) / sum(users)
    assert (summary["quality"][0]["metric"], summary["quality"][0]["users"]) == ("HR@10", sum(users))
    assert summary["quality"][0]["model"] == pytest.approx(mean)
    assert summary["settings"]["batch_size"] == 8
    verdict = judge(tests)
    for name in ("verdict", "baseline", "difference", "standard_error", "metric", "targets", "users"):
        assert summary[name] == getattr(verdict, name)
    assert str(verdict) in html.unescape((trained.run / "report" / "report.html").read_text())
    parts = [line["groups"]["masked"]["new"] for line in tests]
    counts = [part["model"]["targets"] for part in parts]
    found = summary["groups"]["masked"]["new"]
    assert found["targets"] == sum(counts) == summary["targets"]
    for name in ("model", "decayed"):
        hits = sum(n * part[name]["HR@10"] for n, part in zip(counts, parts, strict=True))
        assert found[name]["HR@10"] == pytest.approx(hits / sum(counts))
    assert str(trained.root) not in json.dumps(summary)


def test_interactions_left_out_of_windows_are_counted_and_reported(trained: Place) -> None:
    config = RunConfig.read(trained.run)
    k_core = config.stream.k_core
    few = single = 0
    for number in range(config.windows):
        window = read_window(trained.run, number)
        counts = Counter(window.users.tolist())
        kept = [user for user in window.users.tolist() if counts[user] >= k_core]
        few += len(window) - len(kept)
        training = Counter(kept[: int(len(kept) * config.stream.train_fraction)])
        single += sum(count == 1 for count in training.values())
    assert few > 0
    succeed("report", trained.run)
    summary = json.loads((trained.run / "report" / "summary.json").read_text())
    assert summary["left_out"] == {"interactions": 900, "k_core": few, "no_sequence": single}
    said = f"Of the 900 interactions in windows, {few} are left out because their users have fewer than k_core"
    assert said in (trained.run / "report" / "report.html").read_text()
    assert said in " ".join(succeed("evaluate", trained.run).split())


def test_evaluate_reports_dropped_interactions(trained: Place, tmp_path: Path) -> None:
    users = np.array(["u1"] * 6 + ["u2"] * 2)
    write_log(tmp_path / "log.csv", users, np.array([f"i{number}" for number in range(8)]), start=1_700_000_000)
    outcome = run("evaluate", trained.run, "--interactions", tmp_path / "log.csv")
    assert outcome.code == 0, outcome
    assert (
        "2 interactions are left out: their users have fewer than 5 in the file (k_core)" in outcome.out + outcome.err
    )


def test_plots_are_written_and_show_something(trained: Place) -> None:
    succeed("report", trained.run)
    paths = sorted((trained.run / "report").glob("*.png"))
    assert {path.stem for path in paths} == PLOTS
    for path in paths:
        image = Image.open(path).convert("RGB")
        assert min(image.size) > 300
        # A frame and its labels alone have fewer colours.
        assert len(image.getcolors(image.width * image.height)) > 100


def test_report_of_a_run_without_tests(trained: Place, tmp_path: Path) -> None:
    metrics = [line for line in read_metrics(trained.run) if line["kind"] == "epoch" and line["window"] == 0]
    written = plots.write_plots(results.window_results(metrics), tmp_path)
    assert {plot.name for plot, _ in written} == {"cost", "training"}
    assert results.compare([]) == []
    assert results.cost(metrics) is None
    assert results.groups([]) == {}


def ranked(model: list[float], all_time: list[float], last_window: list[float]) -> dict[str, Any]:
    mine, baselines = per_user(np.array(model)), {"all_time": all_time, "last_window": last_window}
    popular = {name: per_user(np.array(ranks)) for name, ranks in baselines.items()}
    return {
        "all": summarize(mine),
        "popularity": {name: summarize(values) for name, values in popular.items()},
        "lift": {name: summarize({m: mine[m] - values[m] for m in mine}) for name, values in popular.items()},
    }


def test_comparison_uses_the_better_baseline_user_by_user() -> None:
    first = ranked([1, 1, 50, 50], [1, 50, 50, 50], [50, 50, 50, 50])
    second = ranked([1, 1], [50, 50], [1, 50])
    found = results.compare([first, second])[0]
    assert (found.metric, found.users) == ("HR@10", 6)
    assert found.model == pytest.approx(4 / 6)
    assert found.baselines["all_time"][0] == pytest.approx(1 / 6)
    # Both baselines have one hit. The first of two equal baselines is selected.
    assert found.best == "all_time"
    assert found.lift == pytest.approx(3 / 6)
    differences = [np.array([0.0, 1, 0, 0]), np.array([1.0, 1])]
    variance = sum((len(d) / 6) ** 2 * d.var(ddof=1) / len(d) for d in differences)
    assert found.lift_se == pytest.approx(variance**0.5)


def test_lines_of_an_earlier_version_are_shown_and_reported(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    file = place.run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    later = ("targets", "half_life", "groups", "by_user", "left_out")
    file.write_text("".join(json.dumps({n: v for n, v in ln.items() if n not in later}) + "\n" for ln in lines))
    out = succeed("evaluate", place.run)
    assert "Verdict: unknown. Nothing can be said about quality: the tests were recorded by a version" in out
    assert re.search(r"HR@10 +\d+\.\d\d ± ", out)
    succeed("report", place.run)
    summary = json.loads((place.run / "report" / "summary.json").read_text())
    assert (summary["verdict"], summary["baseline"], summary["difference"]) == ("unknown", None, None)
    assert "version that ranked last targets only" in summary["reason"]
    assert summary["quality"][0]["users"] > 0
    assert (summary["groups"], summary["left_out"]) == ({}, None)
    assert "Against baselines" not in (place.run / "report" / "report.html").read_text()
    assert not (place.run / "report" / "baselines.png").exists()


def test_experts_keep_their_identity_when_others_are_pruned() -> None:
    def window(number: int, count: int) -> dict[str, Any]:
        return {"kind": "window", "window": number, "experts": {"text": [count]}}

    def test(number: int, dropped: int | None) -> dict[str, Any]:
        drops = [] if dropped is None else [{"level": 0, "expert": dropped}]
        return {"kind": "test", "window": number, "pruned": {"text": drops}, "expanded": {"text": [{"level": 0}]}}

    metrics = [window(0, 1), test(0, None), window(1, 2), test(1, 0), window(2, 2), test(2, 1), window(3, 2)]
    assert results.expert_births(results.window_results(metrics)) == {"text": [[[0], [0, 1], [1, 2], [1, 3]]]}


def test_creation_windows_of_experts_agree_with_the_counts_of_a_run(trained: Place) -> None:
    windows = results.window_results(read_metrics(trained.run))
    births = results.expert_births(windows)
    for place, result in enumerate(windows):
        assert result.trained is not None
        counts = {name: [len(level[place]) for level in levels] for name, levels in births.items()}
        assert counts == result.trained["experts"]


@pytest.mark.parametrize(
    "kept, best_epoch, star", [("best", 1, (1, 30.0)), ("last", None, (2, 20.0)), ("ema", None, (2, 20.0))]
)
def test_a_star_marks_the_weights_that_were_kept(kept: str, best_epoch: int | None, star: tuple[int, float]) -> None:
    validation = [None, {"NDCG@10": 0.3}, {"NDCG@10": 0.2} if kept == "last" else None]
    epochs = [
        {"kind": "epoch", "window": 0, "epoch": place, "loss": 1.0, "validation": found, "best": place == 1}
        for place, found in enumerate(validation)
    ]
    line = {"kept": kept, "best_epoch": best_epoch, "validation": {"NDCG@10": star[1] / 100}}
    figure = plots.draw_training([results.WindowResult(0, trained=line, epochs=epochs)])
    stars = [drawn for drawn in figure.axes[1].lines if drawn.get_marker() == "*"]
    assert [(x, pytest.approx(y)) for drawn in stars for x, y in drawn.get_xydata()] == [star]
