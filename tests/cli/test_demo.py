"""Command `xsmoe demo`, small."""

import re
from pathlib import Path

import pytest

from tests.cli.helpers import run, succeed
from xsmoe.cli.commands import demo
from xsmoe.stream.state.run_folder import read_metrics

pytestmark = pytest.mark.usefixtures("one_plot")

SMALL = ["--windows", "3", "--epochs", "2", "--users", "40", "--items", "60"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "runs" / "demo"


@pytest.fixture(scope="module")
def shown(folder: Path) -> str:
    return succeed("demo", "--folder", folder, *SMALL)


def test_demo_ends_with_a_comparison_and_the_path_of_the_report(folder: Path, shown: str) -> None:
    assert "All tests: 2 windows, 80 users tested" in shown
    assert re.search(r"HR@10 +\d+\.\d\d ± ", shown)
    assert re.search(r"Verdict: (above|not_above)\. The model is (NOT )?above the strongest baseline", shown)
    assert f"Report: {folder / 'report' / 'report.html'}" in shown
    assert "\x1b" not in shown
    assert "\r" not in shown


def test_both_modalities_are_used(folder: Path, shown: str) -> None:
    assert set(read_metrics(folder)[-1]["experts"]) == {"image", "text"}


def test_demo_folder_is_a_run(folder: Path, shown: str) -> None:
    assert "Recommended" in succeed("recommend", folder, "user-00001")


def test_finished_demo_is_shown_again_without_work(folder: Path, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("train", "_encode", "_catalogue"):
        monkeypatch.setattr(demo, stage, None)
    again = succeed("demo", "--folder", folder, *SMALL)
    assert "use --fresh to start again" in again
    table = [line for line in shown.splitlines() if re.match(r"\s+[0-2] ", line)]
    assert len(table) == 3
    assert [line for line in again.splitlines() if line in table] == table


def test_demo_with_other_settings_is_rejected(folder: Path, shown: str) -> None:
    outcome = run("demo", "--folder", folder, *SMALL, "--seed", "5")
    assert outcome.code == 2
    assert "seed 0, not 5" in outcome.err


def test_interrupted_demo_is_resumed_and_fresh_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "demo"
    with monkeypatch.context() as patch:

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(demo, "train", interrupt)
        assert run("demo", "--folder", folder, *SMALL).code == 130
    store = (folder / "store" / "manifest.json").stat().st_mtime_ns
    stages: list[str] = []
    monkeypatch.setattr(demo, "train", lambda *_: stages.append("train"))
    assert "0 items encoded" in succeed("demo", "--folder", folder, *SMALL)
    assert (folder / "store" / "manifest.json").stat().st_mtime_ns == store
    succeed("demo", "--folder", folder, *SMALL[:-1], "70", "--fresh")
    assert (folder / "store" / "manifest.json").stat().st_mtime_ns > store
    assert stages == ["train", "train"]
