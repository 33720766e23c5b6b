"""`bench compare`: noise and a slower machine are no change, a slower kernel is one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.core import machine as machine_facts
from bench.core import results
from bench.core.results import Case, Role, Run, Timing
from bench.report.comparison import compare
from tests.bench.helpers import unmeasured

TIMES = {"eager": 0.030, "compiled": 0.025, "ours": 0.010}


def run(
    seed: int,
    *,
    machine: float = 1.0,
    slower: float = 1.0,
    baselines: bool = True,
    noise: float = 0.03,
    rounds: int = 20,
) -> Run:
    """Return a run of one case, in which a disturbance affects all times of a round."""
    rng = np.random.default_rng(seed)
    common = np.exp(rng.normal(0, 0.1, rounds)) * machine
    rows = []
    for name, base in TIMES.items():
        own = base * (slower if name == "ours" else 1) * np.exp(rng.normal(0, noise, rounds))
        samples = (common * own).tolist()
        timing = Timing(float(np.median(samples)), min(samples), max(samples), samples, {}, 0.008, 0.5, None)
        if baselines or name == "ours":
            rows.append(replace(unmeasured(name, "measured"), passes={"both": timing}))
    case = Case("side_moe", "t", {"N": 67}, "float32", "cpu", 3e11 / machine, 2e10 / machine, {}, {}, rounds, rows)
    return Run(["kernels"], machine_facts.describe(torch.device("cpu")), [case], 1.0)


def verdicts(before: Run, after: Run) -> list[str]:
    return [change.verdict for change in compare(before, after).changes]


@pytest.mark.parametrize("baselines", [True, False])
@pytest.mark.parametrize("machine", [1.0, 1.7, 0.6])
def test_a_slower_machine_is_no_change(machine: float, baselines: bool) -> None:
    found = [
        verdicts(run(seed, baselines=baselines), run(99 + seed, machine=machine, baselines=baselines))
        for seed in range(8)
    ]
    assert found.count(["same"]) >= (8 if baselines else 6)


@pytest.mark.parametrize(("slower", "verdict"), [(1.25, "slower"), (0.8, "faster")])
@pytest.mark.parametrize("machine", [1.0, 1.7])
def test_a_changed_kernel_is_found(slower: float, verdict: str, machine: float) -> None:
    for seed in range(8):
        assert verdicts(run(seed), run(99 + seed, machine=machine, slower=slower)) == [verdict]


def test_a_certain_but_small_change_does_not_count() -> None:
    before, after = run(0, noise=1e-4), run(1, noise=1e-4, slower=1.02)
    (change,) = compare(before, after).changes
    assert change.verdict == "same"
    assert change.change == pytest.approx(1.02, rel=1e-3)
    (change,) = compare(before, after, least=0.01).changes
    assert change.verdict == "slower"


def test_rows_of_one_run_only_are_named() -> None:
    before, after = run(0), run(1)
    (case,) = after.cases
    refused = unmeasured("ours", "refused", "y: error 1")
    after = replace(after, cases=[replace(case, rows=[*case.rows[:1], refused]), replace(case, dtype="bfloat16")])
    found = compare(before, after)
    assert found.changes == []
    gap, new = found.gaps
    assert str(new) == "side_moe bfloat16 cpu N=67: in the second only eager, compiled, ours"
    assert str(gap) == "side_moe float32 cpu N=67: lost ours; in the first only compiled"


def test_a_pass_that_only_one_run_has_is_named() -> None:
    before, after = run(0), run(1)
    (case,) = after.cases
    rows = [replace(row, passes={**row.passes, "forward": row.passes["both"]}) for row in case.rows]
    (gap,) = compare(before, replace(after, cases=[replace(case, rows=rows)])).gaps
    assert str(gap).endswith(": in the second only eager (forward), compiled (forward), ours (forward)")


def test_our_plain_code_does_not_measure_the_machine() -> None:
    before, after = run(0), run(1, slower=1.5)

    def renamed(one: Run) -> Run:
        (case,) = one.cases
        rows = [
            replace(row, variant="plain", role=Role.REFERENCE) if row.variant == "compiled" else row
            for row in case.rows
        ]
        return replace(one, cases=[replace(case, rows=rows)])

    changes = {change.variant: change.verdict for change in compare(renamed(before), renamed(after)).changes}
    assert changes == {"plain": "same", "ours": "slower"}


def test_few_rounds_allow_no_conclusion() -> None:
    assert verdicts(run(0, rounds=5), run(1, slower=2, rounds=5)) == ["few rounds"]


def test_another_machine_is_named() -> None:
    before, after = run(0), run(1)
    assert compare(before, after).differences == []
    after = replace(after, machine={**after.machine, "threads": 64})
    assert compare(before, after).differences == [f"threads: {before.machine['threads']} and 64"]


def verdict(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_each_case_of_one_file_only_has_a_line_and_the_verdict_is_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    (case,) = run(0).cases
    results.save(run(0), Path(paths[0]))
    results.save(replace(run(1), cases=[case, *(replace(case, sizes={"N": n}) for n in range(20))]), Path(paths[1]))
    assert main(["compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" in the second only ") == 20
    assert printed.splitlines()[-1].startswith("**0 slower")
    results.save(replace(run(1), cases=[replace(case, sizes={"N": 5})]), Path(paths[1]))
    assert main(["compare", *paths]) == 1
    assert verdict(capsys) == "**The two files have none of our rows in common; 1 lost.**"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("a.json", "b.json", "slow.json")]
    for path, made in zip(paths, (run(0), run(1), run(2, slower=1.5)), strict=True):
        results.save(made, Path(path))
    assert main(["compare", *paths[:2]]) == 0
    assert verdict(capsys) == "**0 slower, 0 faster, 1 the same, 0 with too few rounds to tell; 0 lost.**"
    assert main(["compare", paths[0], paths[2]]) == 1
    assert verdict(capsys) == "**1 slower, 0 faster, 0 the same, 0 with too few rounds to tell; 0 lost.**"
    assert main(["compare", paths[0], str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    results.save(replace(run(0), command=["memory"]), tmp_path / "memory.json")
    assert main(["compare", paths[0], str(tmp_path / "memory.json")]) == 2
    assert "memory.json is of `bench memory` and has no times" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 1}', '{"schema": 1, "cases": [], "machine": {}}', "no JSON"])
def test_a_file_of_something_else(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["compare", str(path), str(path)]) == 2
    assert "other.json" in capsys.readouterr().err
