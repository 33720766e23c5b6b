"""Growth rules in whole runs: when and how experts change, and that a resumed run does the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stream import tiny
from tests.stream.tiny import Killed
from xsmoe.nn import Recommender
from xsmoe.stream import StreamConfig, StreamingTrainer
from xsmoe.stream.growth import NOVELTY_ERRORS, novelty

RULES: dict[str, Any] = {"new_gate": "copy", "prune_rule": "merge", "grow": "novelty", "prune_threshold": 1.0}


def fit(folder: Path | None = None, listener: Any = None, **options: Any) -> tuple[list[dict], Recommender]:
    model = tiny.model()
    stream = tiny.stream(5)
    with StreamingTrainer(model, stream, tiny.config(**options), folder=folder, listener=listener) as trainer:
        return trainer.fit(), model


def summary(value: float, error: float | None) -> dict[str, Any]:
    return {"users": 9, "NDCG@10": value, "se": {"NDCG@10": error}}


def lines(*validations: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return metrics: epochs of window 4 after lines of another window."""
    other = [{"kind": "epoch", "window": 3, "validation": summary(9.0, 0.1)}, {"kind": "test", "window": 3}]
    return [*other, *({"kind": "epoch", "window": 4, "validation": one} for one in validations)]


def test_window_is_novel_if_the_metric_decreases_by_more_than_the_noise() -> None:
    noise = NOVELTY_ERRORS * 0.05
    validated = lines(None, summary(0.9, 0.1), summary(0.5, 0.03), None)
    for fall, novel in ((1.01, True), (0.99, False), (-1.0, False)):
        found = novelty(summary(0.5 - fall * noise, 0.04), validated, 5)
        assert found["novel"] is novel
        assert (found["before"], found["noise"]) == (0.5, pytest.approx(noise))
    # The weights that a window ends with need not be those of its last epoch.
    kept = [*validated, {"kind": "window", "window": 4, "validation": summary(0.8, 0.03)}]
    assert novelty(summary(0.5, 0.04), kept, 5)["novel"]


@pytest.mark.parametrize(
    "tested, metrics",
    [
        (summary(0.5, 0.04), lines(None)),
        (summary(0.5, 0.04), lines(summary(0.1, None))),
        (summary(0.5, None), lines(summary(0.1, 0.1))),
    ],
)
def test_window_is_novel_without_a_comparison(tested: dict[str, Any], metrics: list[dict]) -> None:
    found = novelty(tested, metrics, 5)
    assert (found["novel"], found["noise"]) == (True, None)


def test_experts_change_in_novel_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = iter([True, False, True, False])
    found = {"before": 1.0, "now": 0.0, "noise": 0.5}
    monkeypatch.setattr("xsmoe.stream.trainer.novelty", lambda *_: {**found, "novel": next(decided)})
    metrics, model = fit(grow="novelty", prune_threshold=0.0)
    tests = [line for line in metrics if line["kind"] == "test"]
    assert [bool(line["expanded"]) for line in tests] == [True, False, True, False]
    assert [bool(line["pruned"]) for line in tests] == [True, False, True, False]
    assert tests[0]["novelty"] == {**found, "novel": True}
    assert model.items.side_networks()["text"].num_experts == [3, 3]


def test_copy_gate_keeps_scores_and_merge_records_its_target() -> None:
    grown: list[tuple[dict, dict]] = []
    before: dict[str, Any] = {}
    model = tiny.model()
    hidden = tiny.features().hidden(torch.arange(tiny.NUM_ITEMS).numpy(), tuple(tiny.DIMS))

    def listener(event: str, line: dict) -> None:
        with torch.no_grad():
            model.eval()
            now = model.items(hidden)
            model.train()
        if event == "begin":
            before["rows"] = now
        elif event == "test" and not any(line["pruned"].values()):
            grown.append(line)
            torch.testing.assert_close(now, before["rows"], rtol=0, atol=1e-6)

    config = tiny.config(new_gate="copy", prune=False)
    StreamingTrainer(model, tiny.stream(), config, listener=listener).fit()
    assert len(grown) == 2
    metrics, _ = fit(**RULES)
    merged = [level for line in metrics if line["kind"] == "test" for level in line["pruned"].get("text", [])]
    assert merged
    assert all(level["into"] not in (None, level["expert"]) for level in merged)


@pytest.mark.parametrize("part", range(4))
def test_run_killed_at_any_event_has_the_same_results(tmp_path: Path, part: int) -> None:
    events: list[str] = []
    uninterrupted, model = fit(listener=lambda event, _: events.append(event), **RULES)
    assert any("gate_offset" in name for name in model.state_dict())
    seen: list[str] = []

    def listener(event: str, fields: dict) -> None:
        seen.append(event)
        if len(seen) == (part + 1) * len(events) // 5:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path, listener, **RULES)
    resumed, again = fit(tmp_path, **RULES)
    assert tiny.without_time(resumed) == tiny.without_time(uninterrupted)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "setting, choices",
    [("new_gate", "random, mean, copy"), ("grow", "every, novelty"), ("prune_rule", "drop, merge")],
)
def test_unknown_rules_are_rejected(setting: str, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be one of {choices}, not 'other'"):
        StreamConfig(**{setting: "other"})


def test_copy_gate_is_rejected_for_sparse_routing_before_training() -> None:
    with pytest.raises(ValueError, match=r"config\.new_gate is 'copy', .* but its top_k is 1; use new_gate"):
        StreamingTrainer(tiny.model(top_k=1), tiny.stream(), tiny.config(new_gate="copy"))
    StreamingTrainer(tiny.model(top_k=1), tiny.stream(), tiny.config(new_gate="copy", expand=False))
