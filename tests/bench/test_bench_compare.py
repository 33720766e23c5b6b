"""`bench compare`: noise and a slower machine change nothing, a slower kernel does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import machine as machine_facts
from bench import results
from bench.__main__ import main
from bench.compare import compare
from bench.results import Case, Row, Run, Timing

TIMES = {"eager": 0.030, "compiled": 0.025, "ours": 0.010}


def run(seed: int, *, machine: float = 1.0, slower: float = 1.0, rivals: bool = True, noise: float = 0.03) -> Run:
    """A run of one case, in which all times of a round share what disturbs them."""
    rng, rounds = np.random.default_rng(seed), 20
    common = np.exp(rng.normal(0, 0.1, rounds)) * machine
    rows = []
    for name, base in TIMES.items():
        own = base * (slower if name == "ours" else 1) * np.exp(rng.normal(0, noise, rounds))
        samples = (common * own).tolist()
        timing = Timing(float(np.median(samples)), min(samples), max(samples), samples, {}, 0.008, 0.5, None)
        if rivals or name == "ours":
            rows.append(Row(name, "measured", passes={"both": timing}))
    case = Case("side_moe", "t", {"N": 67}, "float32", "cpu", 3e11 / machine, 2e10 / machine, {}, {}, rounds, rows)
    return Run(["kernels"], machine_facts.describe(torch.device("cpu")), [case], 1.0)


def verdicts(before: Run, after: Run) -> list[str]:
    return [change.verdict for change in compare(before, after).changes]


@pytest.mark.parametrize("rivals", [True, False])
@pytest.mark.parametrize("machine", [1.0, 1.7, 0.6])
def test_another_day_is_no_change(machine: float, rivals: bool) -> None:
    found = [verdicts(run(seed, rivals=rivals), run(99 + seed, machine=machine, rivals=rivals)) for seed in range(8)]
    assert found.count(["same"]) >= (8 if rivals else 6)


@pytest.mark.parametrize(("slower", "verdict"), [(1.25, "slower"), (0.8, "faster")])
@pytest.mark.parametrize("machine", [1.0, 1.7])
def test_a_changed_kernel_shows(slower: float, verdict: str, machine: float) -> None:
    for seed in range(8):
        assert verdicts(run(seed), run(99 + seed, machine=machine, slower=slower)) == [verdict]


def test_a_change_that_is_certain_but_small_is_none() -> None:
    before, after = run(0, noise=1e-4), run(1, noise=1e-4, slower=1.02)
    (change,) = compare(before, after).changes
    assert change.verdict == "same"
    assert change.change == pytest.approx(1.02, rel=1e-3)
    (change,) = compare(before, after, least=0.01).changes
    assert change.verdict == "slower"


def test_what_only_one_run_has_is_named() -> None:
    before, after = run(0), run(1)
    (case,) = after.cases
    refused = Row("ours", "refused", "y: error 1")
    after = replace(after, cases=[replace(case, rows=[*case.rows[:1], refused]), replace(case, dtype="bfloat16")])
    found = compare(before, after)
    assert found.changes == []
    assert found.unmatched == [
        "side_moe float32 cpu N=67, compiled: only in the first",
        "side_moe float32 cpu N=67, ours: measured in the first, refused then",
        "side_moe bfloat16 cpu N=67: only in the second",
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json", "slow.json")]
    for path, made in zip(paths, (run(0), run(1), run(2, slower=1.5)), strict=True):
        results.save(made, Path(path))
    assert main(["compare", *paths[:2]]) == 0
    assert "0 slower, 0 faster, of 1" in capsys.readouterr().out
    assert main(["compare", paths[0], paths[2]]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["compare", paths[0], str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
