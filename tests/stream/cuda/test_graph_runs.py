"""Runs with graphed steps and a fake capture: warnings, results and memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import FailingCapture, FakeCapture
from tests.stream.cuda.graph_runs import OUT_OF_MEMORY, Window, fit, kill_and_resume
from xsmoe.stream import StreamConfig, epoch, trainer
from xsmoe.stream.cuda import graph_steps
from xsmoe.stream.cuda.graph_steps import no_graphs_reason
from xsmoe.stream.epoch import load_optimizer


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeCapture]:
    """Make trainers on a CPU capture their steps with fakes, and return the list of these fakes."""
    made: list[FakeCapture] = []

    def make(device: torch.device) -> FakeCapture:
        made.append(FakeCapture(device))
        return made[-1]

    monkeypatch.setattr(graph_steps, "CudaCapture", make)
    for module in (trainer, epoch):
        monkeypatch.setattr(module, "graphs_requested", lambda config: config.graph)
    monkeypatch.setattr(
        trainer,
        "no_graphs_reason",
        lambda config: no_graphs_reason(StreamConfig.from_dict(config.to_dict() | {"device": "cuda"})),
    )
    return made


@pytest.mark.usefixtures("fakes")
def test_killed_run_has_the_same_results(tmp_path: Path) -> None:
    lines = fit(graph=True)
    assert {line["without_graphs"] for line in lines if line["kind"] == "window"} == {None}
    for after in (2, 17, 30):
        assert kill_and_resume(tmp_path / str(after), after, graph=True) == lines


def warnings_of(work: Callable[..., Any], **options: Any) -> list[str]:
    warnings = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "warning":
            warnings.append(fields["message"])

    work(listener=listener, **options)
    return [message for message in warnings if "CUDA graphs" in message]


def reasons_of(lines: list[dict[str, Any]]) -> set[str | None]:
    return {line["without_graphs"] for line in lines if line["kind"] == "window"}


def test_unavailable_graphs_cause_one_warning() -> None:
    assert reasons_of(fit(graph=True)) == {"CUDA graphs need a GPU, and device is cpu"}
    (message,) = warnings_of(fit, graph=True)
    assert message.endswith("without CUDA graphs: CUDA graphs need a GPU, and device is cpu")
    assert reasons_of(fit()) == {"graph is off"}
    assert warnings_of(fit) == []


def test_debug_checks_disable_graphs_and_do_not_change_results(
    fakes: list[FakeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured_lines = fit(graph=True)
    assert fakes
    fakes.clear()
    monkeypatch.setenv("XSMOE_DEBUG", "1")
    lines = fit(graph=True)
    assert not fakes
    assert reasons_of(lines) == {"XSMOE_DEBUG=1 enables checks that read values on the host"}
    for line in (*lines, *captured_lines):
        line.pop("without_graphs", None)
    assert lines == captured_lines


def test_every_window_frees_the_memory_of_its_graphs(fakes: list[FakeCapture]) -> None:
    lines = fit(graph=True)
    windows = sum(line["kind"] == "window" for line in lines)
    assert windows == len(fakes) > 1
    assert all(one.captures > 0 and one.freed > 0 for one in fakes)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FailingCapture.error, "operation not permitted when stream is capturing"),
        (OUT_OF_MEMORY, "not enough memory for CUDA graphs (CUDA out of memory. Tried to allocate 2.50 GiB)"),
    ],
)
def test_run_that_cannot_capture_tries_once_and_warns_once(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fit(graph=True)
    made = []

    class Failing(FailingCapture):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.error = error
            made.append(self)

    monkeypatch.setattr(graph_steps, "CudaCapture", Failing)
    lines: list[dict[str, Any]] = []
    (message,) = warnings_of(lambda **options: lines.extend(fit(**options)), graph=True)
    assert message.endswith(reason)
    assert sum(one.captures for one in made) == 1
    assert reasons_of(lines) == {reason}
    for line in (*lines, *expected):
        line.pop("without_graphs", None)
    assert lines == expected


@pytest.mark.usefixtures("fakes")
def test_learning_rate_of_graphed_steps_is_a_tensor_with_a_fixed_address() -> None:
    window = Window(FakeCapture(), lr=0.02, lr_decay=0.5, min_lr=0.004, graph=True)
    rate = window.optimizer.param_groups[0]["lr"]
    for number, expected in enumerate([0.02, 0.01, 0.005, 0.004]):
        window.epoch(number)
        assert window.optimizer.param_groups[0]["lr"] is rate
        assert float(rate) == pytest.approx(expected)
    saved = window.optimizer.state_dict()
    window.begin()
    rate = window.optimizer.param_groups[0]["lr"]
    load_optimizer(window.optimizer, saved)
    assert window.optimizer.param_groups[0]["lr"] is rate
    assert len(window.optimizer.state) > 0


def test_checkpoint_without_graph_settings_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = fit()
    to_dict = StreamConfig.to_dict
    with monkeypatch.context() as patch:
        new = ("graph", "store_gib")
        patch.setattr(StreamConfig, "to_dict", lambda self: {k: v for k, v in to_dict(self).items() if k not in new})
        seen: list[str] = []

        def listener(event: str, fields: dict[str, Any]) -> None:
            seen.append(event)
            if len(seen) == 9:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, listener)
    assert fit(tmp_path) == lines
    assert StreamConfig.from_dict({"lr": 0.01}) == StreamConfig(lr=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph": 1}, "graph must be True or False, not 1"),
        ({"store_gib": -1.0}, "store_gib must be a number of GiB of at least 0, or None, not -1.0"),
        ({"store_gib": float("nan")}, "not nan"),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**settings)
