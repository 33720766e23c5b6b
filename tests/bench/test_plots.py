"""Plots of cases: their content, their paths, and the message without matplotlib."""

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.report import plots
from tests.bench.helpers import case, row, run, timing, unmeasured


def test_a_bar_for_each_variant_in_each_panel() -> None:
    pytest.importorskip("matplotlib")
    eager = row("eager", 3 << 20, both=timing(4e-3, 4e-3, 4e-3, against=("eager",)))
    found = case(
        eager,
        unmeasured("compiled", "absent", "no compiler"),
        row("ours", 2 << 20, both=timing(1e-3, 2e-3, 2e-3, against=("eager",))),
    )
    drawn = plots.case(run(found), found)
    times, of_bound, memory = drawn.axes
    assert [label.get_text() for label in times.get_yticklabels()] == ["eager", "ours"]
    assert [bar.get_width() for bar in times.patches] == pytest.approx([4, 2])
    assert [text.get_text() for text in times.texts] == ["4.00", "2.00  (x 2.00)"]
    assert [text.get_text() for text in of_bound.texts] == ["25 %", "50 %"]
    assert [text.get_text() for text in memory.texts] == ["3.0", "2.0"]
    assert times.get_title() == "A whole step; x: times as fast as eager"


def test_an_easier_problem_has_an_asterisk_and_no_speedup() -> None:
    pytest.importorskip("matplotlib")
    found = case(
        row("eager", both=timing(4e-3, against=("eager",))),
        row("liger", problem="no x", both=timing(1e-3)),
        row("ours", both=timing(2e-3, against=("eager",))),
    )
    drawn = plots.case(run(found), found)
    times = drawn.axes[0]
    assert [label.get_text() for label in times.get_yticklabels()] == ["eager", "liger*", "ours"]
    assert [text.get_text() for text in times.texts] == ["4.00", "1.00", "2.00  (x 2.00)"]
    assert drawn.get_supxlabel() == "* liger: solves another problem: no x; compared with each other only"


def test_without_peaks_saved_activations_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    found = case(row("ours", forward=timing(4e-3)))
    assert plots.case(run(found), found).axes[2].get_title() == "Saved activations"


def test_a_case_without_times_has_no_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plots.write_cases(run(case(unmeasured("ours", "refused", "y: error 1"))), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", [False, True])
def test_kernels_draw_where_matplotlib_is(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing:
        monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    else:
        pytest.importorskip("matplotlib")
    given = ["--sizes", "N=5", "E=3", "--variants", "eager,ours", "--seconds", "0.01", "--plot", str(tmp_path / "new")]
    assert main(["kernels", "route_topk", *given]) == 0
    printed = capsys.readouterr().out
    plot = tmp_path / "new" / "route_topk-float32-N5-E3-k2.png"
    assert plot.exists() is not missing
    assert ("--plot: no plots, because matplotlib is not installed" if missing else str(plot)) in printed


def test_a_folder_that_cannot_be_made_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").touch()
    assert main(["kernels", "route_topk", "--plot", str(tmp_path / "taken")]) == 2
    assert "--plot: cannot make" in capsys.readouterr().err
