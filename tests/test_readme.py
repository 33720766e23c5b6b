"""The README's example runs as it stands there."""

import json
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([256, 768])" in printed
    assert "Expanded(level=1, num_experts=" in printed


def test_example_stays_short() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = [line for line in example.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 20


def test_numbers_are_those_of_the_committed_result() -> None:
    result = json.loads((README.parent / "bench" / "results" / "demo-cpu.json").read_text())
    found, cost = result["quality"][0], result["cost"]
    baseline, error = found["baselines"][found["best"]]
    text = " ".join(README.read_text().split())
    assert f"tests of {found['users']} users in all" in text
    assert f"HR@10 of {100 * found['model']:.1f} ± {100 * found['model_se']:.1f} % against" in text
    assert f"against {100 * baseline:.1f} ± {100 * error:.1f} % for popularity in the last window" in text
    assert found["best"] == "last_window"
    step, users = cost["step_ms"], result["settings"]["batch_size"]
    assert f"{step:.1f} ms a training step of {users} users, {cost['seconds']:.0f} s for training" in text
    assert f"{cost['peak_rss_mib']:.0f} MiB at the peak" in text


def test_table_of_speed_is_that_of_the_committed_result() -> None:
    run = json.loads((README.parent / "bench" / "results" / "side_moe-cpu-float32.json").read_text())
    cases = {case["sizes"]["E"]: case["rows"] for case in run["cases"] if case["sizes"]["N"] == 2816}
    quoted = re.findall(
        r"^\| (\d+) \| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) % \| ([\d.]+) \|$", README.read_text(), re.MULTILINE
    )
    assert len(quoted) >= 12
    for experts, variant, *numbers in quoted:
        (row,) = [row for row in cases[int(experts)] if row["variant"] == variant]
        step = row["passes"]["both"]
        ratio = step["against"]["naive"][0] if variant != "naive" else 1
        found = 1e3 * step["median"], ratio, 100 * step["share"], row["saved_bytes"] / 2**20
        assert [f"{found[0]:.1f}", f"{found[1]:.2f}", f"{found[2]:.0f}", f"{found[3]:.1f}"] == numbers, (
            experts,
            variant,
        )


def test_table_of_steps_is_that_of_the_committed_results() -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        run = json.loads((README.parent / "bench" / "results" / f"step-cpu-{dtype}.json").read_text())
        for case in run["cases"]:
            rows = {row["variant"]: row for row in case["rows"]}
            published, ours = (rows[name]["passes"]["both"] for name in ("published", "ours"))
            times = (
                f"{1e3 * published['median']:.0f} | {1e3 * ours['median']:.0f} | {ours['against']['published'][0]:.2f}"
            )
            peaks = " | ".join(f"{rows[name]['peak_bytes'] / 2**20:.0f}" for name in ("published", "ours"))
            pooling = case["operator"].removeprefix("training_step_")
            found.append(f"| {pooling} | {dtype} | {times} | {100 * ours['share']:.0f} % | {peaks} |")
    assert len(found) == 4
    assert "\n".join(found) in README.read_text()
