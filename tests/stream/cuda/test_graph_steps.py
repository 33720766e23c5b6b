"""Graphed steps on a CPU, with a fake capture."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import CPU, FailingCapture, FakeCapture
from tests.stream import tiny
from tests.stream.cuda.graph_runs import OUT_OF_MEMORY, Window, assert_same
from xsmoe.nn import Recommender
from xsmoe.stream import StreamConfig, epoch
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.cuda.graph_steps import GraphedSteps, graphs_requested, no_graphs_reason
from xsmoe.stream.hidden_states.device_cache import DeviceCachedFeatures
from xsmoe.stream.precision import LossScaler
from xsmoe_kernels.runtime.profiler_ranges import opening_ranges


def test_replayed_steps_have_the_same_results() -> None:
    # The model has dropout, and warm-up steps must not advance the random state.
    replayed, eager = Window(FakeCapture()), Window(FailingCapture())
    for number in range(3):
        assert replayed.epoch(number) == eager.epoch(number)
        assert_same(replayed, eager)
    assert len(replayed.graphs) > 0
    assert len(eager.graphs) == 0


def test_step_is_captured_once_for_each_input_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsmoe.stream.batches.padding.ITEMS", 4)
    fake = FakeCapture()
    window, kinds = Window(fake), set()
    run = GraphedSteps.__call__

    def note(graphs: GraphedSteps, step: Any, given: StepInput) -> Tensor:
        kinds.add(given.graph_key())
        return run(graphs, step, given)

    monkeypatch.setattr(GraphedSteps, "__call__", note)
    for number in range(4):
        window.epoch(number)
    assert len(kinds) > 1
    assert fake.captures == len(window.graphs) == len(kinds)


def test_padding_changes_an_epoch_only_by_rounding() -> None:
    padded, plain = Window(FakeCapture()), Window(FailingCapture())
    for window in (padded, plain):
        for module in window.model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
    # Adam also makes full steps for gradients that are only rounding errors, so only one epoch is compared.
    assert padded.epoch() == pytest.approx(plain.epoch(graphs=False), rel=1e-5)
    expected = plain.model.state_dict()
    for name, value in padded.model.state_dict().items():
        if "utilization" in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)


def change_experts(model: Recommender) -> None:
    model.items.expand()


def move(model: Recommender) -> None:
    model.users.norm.weight.data = model.users.norm.weight.data.clone()


@pytest.mark.parametrize("change", [change_experts, move])
def test_graphs_are_dropped_when_their_tensors_are_reallocated(change: Callable[[Recommender], None]) -> None:
    fake = FakeCapture()
    window = Window(fake)
    window.epoch(0)
    before = fake.captures
    window.epoch(0)
    assert fake.captures == before, "nothing moved"
    change(window.model)
    window.epoch(0)
    assert fake.captures > before


def test_graphs_are_dropped_when_frozen_experts_are_loaded() -> None:
    fake = FakeCapture()
    window = Window(fake)
    window.model.items.expand()
    window.begin()
    window.epoch(0)
    before = fake.captures
    with torch.no_grad():
        next(iter(window.model.items.banks()))[2].frozen_up.mul_(2)
    window.epoch(0)
    assert fake.captures > before, "autocast may have kept what they were cast to"


def test_step_that_cannot_be_captured_runs_eagerly_with_one_warning() -> None:
    window, eager = Window(FailingCapture()), Window(FailingCapture())
    eager.graphs.reason = "never tried"
    for number in range(2):
        assert window.epoch(number) == eager.epoch(number)
    assert_same(window, eager)
    assert window.graphs.reason == "operation not permitted when stream is capturing"
    (message,) = window.warnings
    assert "without CUDA graphs: operation not permitted when stream is capturing" in message
    assert not any(group["capturable"] for group in window.optimizer.param_groups)


def test_out_of_memory_in_a_later_capture_drops_all_graphs_and_keeps_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xsmoe.stream.batches.padding.ITEMS", 4)

    class OutOfMemoryCapture(FakeCapture):
        def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            found = super().__call__(step)
            if self.captures == 2:
                raise OUT_OF_MEMORY
            return found

    short = OutOfMemoryCapture()
    window, expected = Window(short), Window(FakeCapture())
    for number in range(3):
        assert window.epoch(number) == expected.epoch(number)
    assert_same(window, expected)
    assert (short.captures, short.freed, len(window.graphs)) == (2, 1, 0)
    assert window.graphs.reason == "not enough memory for CUDA graphs (CUDA out of memory. Tried to allocate 2.50 GiB)"
    assert len(window.warnings) == 1


def test_tensors_of_a_failed_step_are_freed_before_the_next_one() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class OutOfMemoryCapture(FakeCapture):
        def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            made = torch.zeros(3)
            kept.append(weakref.ref(made))
            raise torch.OutOfMemoryError("CUDA out of memory")

        def free(self) -> None:
            gc.collect()
            assert kept[0]() is None, "the error still holds it"
            super().free()

    short = OutOfMemoryCapture()
    Window(short).epoch()
    assert short.freed == 1


def test_graphs_are_dropped_if_other_work_needs_their_memory() -> None:
    fake = FakeCapture()
    window = Window(fake)
    window.epoch()
    tries = []

    def work() -> str:
        tries.append(len(window.graphs))
        if len(tries) == 1:
            raise OUT_OF_MEMORY
        return "done"

    assert window.graphs.retry_without_graphs("validation", work) == "done"
    assert tries[0] > 0
    assert tries[1:] == [0]
    assert fake.freed == 1
    (message,) = window.warnings
    assert "not enough memory for CUDA graphs and validation (CUDA out of memory. Tried to allocate 2.50" in message
    expected = Window(FakeCapture())
    for number in (0, 1):
        expected.epoch(number)
    window.epoch(1)
    assert_same(window, expected)

    def short() -> None:
        raise OUT_OF_MEMORY

    with pytest.raises(torch.OutOfMemoryError):
        window.graphs.retry_without_graphs("validation", short)

    def bad() -> None:
        raise RuntimeError("another")

    other = Window(FakeCapture())
    other.epoch()
    with pytest.raises(RuntimeError, match="another"):
        other.graphs.retry_without_graphs("validation", bad)
    assert other.graphs.reason is None


@pytest.mark.parametrize("scale", [65536.0, 3e38])
@pytest.mark.parametrize("growth_interval", [2000, 2])
def test_replayed_steps_have_the_same_loss_scale(scale: float, growth_interval: int) -> None:
    # With the larger scale gradients overflow: steps are skipped, and the scale decreases.
    def scaler() -> LossScaler:
        made = LossScaler(CPU)
        made.load_state_dict(made.state_dict() | {"scale": scale, "growth_interval": growth_interval})
        return made

    fake = FakeCapture()
    replayed, eager = Window(fake, scaler=scaler()), Window(FailingCapture(), scaler=scaler())
    for number in range(3):
        assert replayed.epoch(number) == eager.epoch(number)
        assert replayed.scaler is not None
        assert eager.scaler is not None
        assert replayed.scaler.state_dict() == eager.scaler.state_dict()
        assert_same(replayed, eager)
    assert fake.captures > 0
    assert (replayed.scaler.scale() != scale) == (scale > 1e38 or growth_interval == 2)


def test_graphs_keep_their_hidden_states_alive() -> None:
    tables = DeviceCachedFeatures(tiny.features(), tuple(tiny.DIMS), CPU)
    window = Window(FakeCapture(), features=tables)
    window.epoch()
    held = weakref.ref(tables)
    window.features = tiny.features()
    del tables
    gc.collect()
    assert held() is not None
    assert any(weight.grad is not None for weight in window.model.parameters())
    window.graphs.drop()
    gc.collect()
    assert held() is None
    assert all(weight.grad is None for weight in window.model.parameters())


def test_other_errors_of_a_step_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window(FakeCapture())

    def fail(*_: Any) -> Tensor:
        raise ValueError("bad step")

    monkeypatch.setattr(epoch, "train_step", fail)
    with pytest.raises(ValueError, match="bad step"):
        window.epoch()


def test_profile_records_the_parts_of_a_step_and_does_not_change_results() -> None:
    fake, opened = FakeCapture(), []
    window, expected = Window(fake), Window(FakeCapture())

    def note(name: str) -> nullcontext[None]:
        opened.append(name)
        return nullcontext()

    for number in range(3):
        with opening_ranges(note) if number == 1 else nullcontext():
            before = fake.captures
            assert window.epoch(number) == expected.epoch(number)
            assert (fake.captures > before) == (number == 0)
    assert_same(window, expected)
    assert {"data", "encode", "attend", "loss", "backward", "optimizer"} <= set(opened)
    assert window.warnings == [
        "while a profile is recorded, training steps run one operation at a time, without CUDA graphs"
    ]
    assert window.graphs.reason is None


@pytest.mark.parametrize(
    ("options", "debug", "reason"),
    [
        ({"graph": True}, "", "CUDA graphs need a GPU, and device is cpu"),
        ({"device": "cuda"}, "", "graph is off"),
        ({"device": "cuda", "graph": True}, "1", "XSMOE_DEBUG=1 enables checks that read values on the host"),
        ({"device": "cuda", "graph": True, "protocol": "paper"}, "", None),
        ({"device": "cuda", "graph": True}, "", None),
    ],
)
def test_reasons_without_graphs(
    options: dict[str, Any], debug: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XSMOE_DEBUG", debug)
    config = StreamConfig(**options)
    assert no_graphs_reason(config) == reason
    # Batches must be equal even if a resumed run has another reason.
    assert graphs_requested(config) == (config.graph and config.device == "cuda")
