"""Who a rival is, who is fastest, where ours loses, and what becomes of that in docs/kernels.md."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import kernels, losing, standing, steps
from bench.results import Run
from tests.bench.made_up import case, row, run, timing


def test_every_variant_of_every_room_has_a_role() -> None:
    roles = {}
    for rooms in (kernels, steps):
        for name in rooms.ROOMS:
            kind = rooms.room(name)
            workload = kind(dict.fromkeys(kind.letters, 8), torch.float32, torch.device("cpu"))
            roles |= {variant: standing.role(variant) for variant in workload.variants() if variant[:4] != "ours"}
    assert {name for name, role in roles.items() if role == "published"} == {"naive", "published"}
    assert {name for name, role in roles.items() if role == "compiled"} == {"compiled"}
    assert {name for name, role in roles.items() if role == "library"} == {
        "scattermoe", "megablocks", "cut-cross-entropy", "liger", "xformers",
    }  # fmt: skip
    eager = {"eager", "loop", "padded", "torch", "chunked", "tiled", "sdpa", "plain"}
    assert {name for name, role in roles.items() if role == "eager"} == eager
    assert standing.role("compiled-graph") == "compiled"
    assert standing.role("loop-graph") == "eager"


def test_the_best_rival_of_a_role_is_the_fastest_over_the_rounds() -> None:
    mine = row("ours", both=timing(1, 2, 4))
    # Paired: 3, 3 and 3 times; and 8, 2 and 1 times.
    found = case(
        row("loop", both=timing(3, 6, 12)),
        row("torch", both=timing(8, 4, 4)),
        replace(row("compiled"), status="absent"),
        mine,
    )
    best = standing.best(found, mine, "eager")
    assert best is not None
    assert best.row.variant == "torch"
    assert best.ratio.median == 2
    assert standing.best(found, mine, "compiled") is None
    assert standing.best(found, mine, "published") is None


def test_an_easier_problem_is_compared_with_itself_only() -> None:
    easier = "solves another problem: the same without x"
    mine, plain = row("ours", both=timing(4.0)), row("ours-plain", remark=easier, both=timing(3.0))
    liger, eager = row("liger", remark=easier + "; and a note", both=timing(2.0)), row("eager", both=timing(5.0))
    found = case(eager, liger, mine, plain)
    assert [one.variant for one in standing.rivals(found, mine)] == ["eager"]
    assert [one.variant for one in standing.rivals(found, plain)] == ["liger"]
    (loss,) = standing.losses([run(found)], steps=True)
    assert (loss.row.variant, loss.rival.variant) == ("ours-plain", "liger")
    assert "ours-plain* 0.67 times as fast as liger* " in standing.told(loss)


def test_losses_are_of_whole_steps_or_of_passes_of_others() -> None:
    eager = row("eager", forward=timing(1.0), backward=timing(3.0), both=timing(4.0))
    slow = row("ours", forward=timing(3.0), backward=timing(2.0), both=timing(5.0))
    quick = row("ours-recompute", forward=timing(2.0), backward=timing(1.0), both=timing(3.0))
    runs = [run(case(eager, slow, quick))]
    assert [(one.row.variant, one.one_pass) for one in standing.losses(runs, steps=True)] == [("ours", "both")]
    (passing,) = standing.losses(runs, steps=False)
    assert (passing.row.variant, passing.one_pass) == ("ours-recompute", "forward")
    assert standing.told(passing).startswith("side_moe float32 N=5 E=2, forward: ours-recompute 0.50 times as fast as")
    (loss,) = standing.losses(runs, steps=True)
    assert standing.told(loss) == (
        "side_moe float32 N=5 E=2: ours 0.80 times as fast as eager (0.80-0.80), 5000 and 4000 ms; few rounds: 1"
    )


def test_the_section_lists_each_loss_or_says_that_there_is_none() -> None:
    lost = run(case(row("eager", both=timing(1e-3)), row("ours", both=timing(2e-3))))
    won = run(case(row("eager", both=timing(2e-3)), row("ours", both=timing(1e-3))))
    text = losing.section({"a-cpu-float32.json": lost, "b-cpu-float32.json": won})
    assert text.startswith("**Open.**")
    assert text.count("\n- ") == 1
    assert "ours 0.50 times as fast as eager" in text
    assert "(../bench/results/a-cpu-float32.json)" in text
    none = losing.section({"b-cpu-float32.json": won})
    assert none == "In no whole step of the committed results is a rival faster than ours."


def test_committed_losses_are_those_that_the_files_tell() -> None:
    """By the ratios that were saved, which know the baselines only."""
    told = {
        (standing.label(loss.case), loss.row.variant, loss.rival.variant)
        for one in losing.committed().values()
        for loss in standing.losses([one], steps=True)
    }
    saved = {
        (standing.label(of), mine.variant, rival)
        for one in losing.committed().values()
        for of in one.cases
        for mine in filter(standing.ours, of.rows)
        if (step := standing.whole(mine)) is not None
        for rival, ratio in step.against.items()
        if ratio[0] < 1 and not rival.startswith("ours")
    }
    assert saved <= told


@pytest.mark.parametrize("between", ["x\n", "", "\n\nx\n\n"], ids=["line", "nothing", "room"])
def test_writing_replaces_what_stands_between_the_marks(
    between: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "kernels.md"
    page.parent.mkdir()
    page.write_text(f"x before\n\n{losing.BEGIN}\n{between}{losing.END}\n\nx after\n")
    monkeypatch.setattr(losing, "ROOT", page.parents[1])
    monkeypatch.setattr(losing, "PAGE", page)
    won: dict[str, Run] = {"a.json": run(case(row("eager", both=timing(2.0)), row("ours", both=timing(1.0))))}
    monkeypatch.setattr(losing, "committed", lambda: won)
    assert losing.main(["--write"]) == 0
    assert page.read_text() == f"x before\n\n{losing.BEGIN}\n{losing.section(won)}\n{losing.END}\n\nx after\n"
    assert losing.section(won) in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no"):
        losing.found("nothing")


def test_a_row_that_was_not_measured_loses_nothing() -> None:
    refused = replace(row("ours"), status="refused", reason="y: error 1")
    assert standing.losses([run(case(row("eager", both=timing(1.0)), refused))], steps=True) == []
