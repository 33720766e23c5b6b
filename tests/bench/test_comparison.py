"""Baselines of a row, the fastest of them, slowdowns, and their list in docs/results.md."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.core.benchmark import load_benchmark
from bench.core.results import Role, load
from bench.e2e.step import STEPS
from bench.ops import OPERATORS
from bench.report import comparison, slowdowns
from tests.bench.helpers import case, row, run, timing, unmeasured


def test_roles_of_all_variants() -> None:
    roles: dict[Role, set[str]] = {role: set() for role in Role}
    for registry in (OPERATORS, STEPS):
        for name in registry:
            benchmark = load_benchmark(registry, name).smallest(torch.float32, torch.device("cpu"))
            for variant in benchmark.variants():
                roles[variant.role].add(variant.name)
                assert (variant.role == Role.COMPILED) == variant.compiled, variant.name
                assert not variant.cuda_graph, variant.name
    assert all(name.startswith("ours") for name in roles[Role.OURS])
    assert roles[Role.REFERENCE] == {"reference", "plain"}
    assert roles[Role.PAPER] == {"naive", "published"}
    assert roles[Role.COMPILED] == {"compiled", "compiled-graph", "compiled-eager", "compiled-loop"}
    assert roles[Role.LIBRARY] == {"scattermoe", "megablocks", "cut-cross-entropy", "liger", "xformers"}
    assert roles[Role.EAGER] == {"eager", "loop", "padded", "torch", "chunked", "tiled", "sdpa"}


def test_the_fastest_baseline_is_that_of_paired_rounds() -> None:
    mine = row("ours", both=timing(1, 2, 4))
    # Paired: 3, 3 and 3 times; and 8, 2 and 1 times.
    found = case(
        row("loop", both=timing(3, 6, 12)),
        row("torch", both=timing(8, 4, 4)),
        unmeasured("compiled", "absent"),
        mine,
    )
    best = comparison.fastest(found, mine, Role.EAGER)
    assert best is not None
    assert best.row.variant == "torch"
    assert best.speedup.median == 2
    assert comparison.fastest(found, mine, Role.COMPILED) is None
    assert comparison.fastest(found, mine, Role.PAPER) is None


def test_an_easier_problem_is_compared_with_itself_only() -> None:
    easier = "the same without x"
    mine, plain = row("ours", both=timing(4.0)), row("ours-plain", problem=easier, both=timing(3.0))
    liger, eager = row("liger", problem=easier, both=timing(2.0)), row("eager", both=timing(5.0))
    found = case(eager, liger, mine, plain)
    assert [one.variant for one in comparison.baselines(found, mine)] == ["eager"]
    assert [one.variant for one in comparison.baselines(found, plain)] == ["liger"]
    (slow,) = slowdowns.slowdowns([run(found)], steps=True)
    assert (slow.row.variant, slow.baseline.variant) == ("ours-plain", "liger")
    assert "ours-plain* 0.67 times as fast as liger* " in str(slow)


def test_slowdowns_of_whole_steps_and_of_passes() -> None:
    eager = row("eager", forward=timing(1.0), backward=timing(3.0), both=timing(4.0))
    slow = row("ours", forward=timing(3.0), backward=timing(2.0), both=timing(5.0))
    quick = row("ours-recompute", forward=timing(2.0), backward=timing(1.0), both=timing(3.0))
    runs = [run(case(eager, slow, quick))]
    assert [(one.row.variant, one.one_pass) for one in slowdowns.slowdowns(runs, steps=True)] == [("ours", "both")]
    (passing,) = slowdowns.slowdowns(runs, steps=False)
    assert (passing.row.variant, passing.one_pass) == ("ours-recompute", "forward")
    assert str(passing).startswith("side_moe float32 N=5 E=2, forward: ours-recompute 0.50 times as fast as")
    (slow,) = slowdowns.slowdowns(runs, steps=True)
    assert str(slow) == (
        "side_moe float32 N=5 E=2: ours 0.80 times as fast as eager (0.80-0.80), 5000 and 4000 ms; few rounds: 1"
    )


def test_the_section_lists_each_slowdown_or_has_a_sentence() -> None:
    slower = run(case(row("eager", both=timing(1e-3)), row("ours", both=timing(2e-3))))
    faster = run(case(row("eager", both=timing(2e-3)), row("ours", both=timing(1e-3))))
    text = slowdowns.section({"a-cpu-float32.json": slower, "b-cpu-float32.json": faster})
    assert text.startswith("**Open.**")
    assert text.count("\n- ") == 1
    assert "ours 0.50 times as fast as eager" in text
    assert "(../bench/results/a-cpu-float32.json)" in text
    none = slowdowns.section({"b-cpu-float32.json": faster})
    assert none == "In no whole step of the committed results is a baseline faster than ours."


def test_committed_slowdowns_include_those_of_saved_ratios() -> None:
    """Compare with the saved ratios, which exist for default baselines only."""
    found = {
        (slow.case.label, slow.row.variant, slow.baseline.variant)
        for one in slowdowns.committed().values()
        for slow in slowdowns.slowdowns([one], steps=True)
    }
    saved = {
        (of.label, mine.variant, name)
        for one in slowdowns.committed().values()
        for of in one.cases
        for mine in of.rows
        if mine.ours and mine.step is not None
        for name, ratio in mine.step.against.items()
        if ratio[0] < 1 and not name.startswith("ours")
    }
    assert saved <= found


def test_a_refused_row_has_no_slowdown() -> None:
    refused = replace(row("ours"), status="refused", reason="y: error 1")
    assert slowdowns.slowdowns([run(case(row("eager", both=timing(1.0)), refused))], steps=True) == []


def test_old_files_get_roles_from_names(tmp_path: Path) -> None:
    names = {
        "naive-autocast": Role.PAPER, "published": Role.PAPER, "loop-graph": Role.EAGER,
        "compiled-graph": Role.COMPILED, "plain": Role.REFERENCE, "ours-graph": Role.OURS, "liger": Role.LIBRARY,
    }  # fmt: skip
    old = {"median": 2.0, "p10": 1.0, "p90": 3.0, "samples": [2.0], "against": {}, "flop": None}
    rows = [
        {"variant": name, "status": "measured", "passes": {"both": {**old, "floor": 1.0, "share": 0.5}}}
        for name in names
    ]
    rows[-1]["remark"] = "solves another problem: the same without x; and a note"
    data = asdict(run(case())) | {"schema": 1}
    data["cases"][0]["rows"] = rows
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    (loaded,) = load(path).cases
    assert {row.variant: row.role for row in loaded.rows} == names
    assert [row.variant for row in loaded.rows if row.cuda_graph] == ["loop-graph", "compiled-graph", "ours-graph"]
    assert [row.variant for row in loaded.rows if row.compiled] == ["compiled-graph"]
    assert (loaded.rows[-1].problem, loaded.rows[-1].remark) == ("the same without x", "and a note")
    assert loaded.rows[0].problem is None
    step = loaded.rows[0].step
    assert step is not None
    assert (step.bound, step.of_bound) == (1.0, 0.5)
