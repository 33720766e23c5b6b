"""Graphed steps on a GPU."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fakes import FailingCapture
from tests.stream import tiny
from tests.stream.cuda.graph_runs import Window, fit, kill_and_resume, weights
from tests.stream.tiny import needs_gpu
from xsmoe.stream import Stream, StreamConfig, StreamingTrainer, epoch
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.precision import loss_scaler

GPU: dict[str, Any] = {"device": "cuda", "precision": "float32"}


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_a_gpu_graphs_have_the_same_results(precision: str) -> None:
    settings = {"device": "cuda", "precision": precision}
    scalers = [loss_scaler(StreamConfig(**settings)) for _ in range(2)]
    replayed, eager = Window(scaler=scalers[0], **settings), Window(FailingCapture(), scaler=scalers[1], **settings)
    first = weights(eager)
    for number in range(2):
        assert replayed.epoch(number) == pytest.approx(eager.epoch(number), rel=1e-3)
    assert len(replayed.graphs) > 0
    assert not replayed.warnings
    last = weights(eager)
    # Relative to the change of the weights, because Adam also makes full steps for rounding errors.
    assert (weights(replayed) - last).norm() < 0.02 * (last - first).norm()
    expected = eager.model.state_dict()
    for name, value in replayed.model.state_dict().items():
        if "utilization" in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3, msg=name)


@needs_gpu
def test_on_a_gpu_a_grown_model_is_captured_again_and_trains() -> None:
    window = Window(**GPU)
    first = window.epoch(0)
    window.model.items.expand()
    window.begin()
    before = {name: value.clone() for name, value in window.model.state_dict().items()}
    assert [window.epoch(number) for number in range(1, 4)][-1] < first
    assert len(window.graphs) > 0
    for _, _, bank in window.model.items.banks():
        assert bank.num_frozen == 1
    for name, value in window.model.state_dict().items():
        if name.endswith((".up", ".down", ".router")):
            assert not torch.equal(value, before[name]), name
        if "frozen" in name:
            assert torch.equal(value, before[name]), name


@needs_gpu
def test_on_a_gpu_steps_are_captured_again_after_weights_are_reallocated() -> None:
    window = Window(**GPU)
    first = window.epoch(0)
    weight = window.model.users.norm.weight
    weight.data = weight.data.clone()
    assert window.epoch(1) < first
    assert len(window.graphs) > 0
    assert not window.warnings


@needs_gpu
@pytest.mark.parametrize("graph", [True, False])
def test_on_a_gpu_reserved_memory_does_not_grow_between_windows(graph: bool) -> None:
    reserved: list[int] = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "window":
            torch.cuda.synchronize()
            reserved.append(torch.cuda.memory_reserved())

    config = tiny.config(device="cuda", graph=graph, expand=False, prune=False, epochs=12, warmup_epochs=12)
    stream = Stream(tiny.windows(6), tiny.features())
    # More epochs than streams in torch's pool.
    StreamingTrainer(tiny.model(), stream, config, listener=listener).fit()
    # A later window ranks some more items. The workspaces of a stream are many times larger.
    assert max(reserved[2:]) <= max(reserved[:2]) + (8 << 20)


@needs_gpu
def test_on_a_gpu_out_of_memory_in_a_capture_drops_only_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = epoch.train_step

    def short(*arguments: Any) -> Tensor:
        loss = real(*arguments)
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return loss

    monkeypatch.setattr(epoch, "train_step", short)
    window, eager = Window(**GPU), Window(FailingCapture(), **GPU)
    for number in range(2):
        assert window.epoch(number) == pytest.approx(eager.epoch(number), rel=1e-3)
    (message,) = window.warnings
    assert "not enough memory for CUDA graphs (CUDA out of seen. Tried to allocate" in message
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@needs_gpu
def test_on_a_gpu_every_replay_draws_new_dropout() -> None:
    window = Window(**GPU, lr=1e-9, min_lr=1e-9)
    given = tiny.step_input(np.array([0, 1, 2]), capacity=epoch.Capacity(3, 6)).pin().to(torch.device("cuda"))
    window.model.train()

    def step(one: StepInput) -> Tensor:
        return epoch.train_step(window.model, one, window.optimizer, window.config)

    losses = {float(window.graphs(step, given)) for _ in range(6)}
    assert len(losses) > 3


def synchronisations(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


@needs_gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_an_epoch_synchronizes_once(graphs: bool) -> None:
    window = Window(**GPU, graph=graphs)
    window.epoch(0, graphs=graphs)
    assert synchronisations(lambda: window.epoch(1, graphs=graphs)) <= 1


@needs_gpu
def test_on_a_gpu_ranking_synchronizes_once() -> None:
    window = Window(**GPU)
    seen = SeenItemHistory()
    seen.add_training(window.splits)
    task = RankingTask.build(window.splits.test, seen.known, seen.history, "rank")
    device = torch.device("cuda")

    def rank() -> np.ndarray:
        return rank_with_model(window.model, tiny.features(), task, device)

    expected = rank()
    assert synchronisations(rank) <= 1
    assert np.array_equal(rank(), expected)


@needs_gpu
def test_on_a_gpu_a_synchronizing_step_trains_without_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    real = epoch.train_step

    def waits(*arguments: Any) -> Tensor:
        loss = real(*arguments)
        torch.cuda.synchronize()
        return loss

    monkeypatch.setattr(epoch, "train_step", waits)
    window, eager = Window(**GPU), Window(FailingCapture(), **GPU)
    for number in range(2):
        assert window.epoch(number) == pytest.approx(eager.epoch(number), rel=1e-3)
    assert window.graphs.reason
    assert len(window.warnings) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@needs_gpu
def test_on_a_gpu_a_killed_run_has_the_same_results(tmp_path: Path) -> None:
    lines = fit(**GPU)
    assert {line["without_graphs"] for line in lines if line["kind"] == "window"} == {None}
    for after in (2, 9, 17, 30):
        assert kill_and_resume(tmp_path / str(after), after, **GPU) == lines
