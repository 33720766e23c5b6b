"""Captured steps: what a stand-in for CUDA graphs shows on a CPU, and what a GPU shows."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import needs_gpu
from torch import Tensor

from xsmoe.data import item_share
from xsmoe.nn import Recommender
from xsmoe.stream import StreamConfig, StreamingTrainer, captured, epoch, trainer
from xsmoe.stream.batches import StepInput
from xsmoe.stream.captured import CannotCapture, CapturedSteps, refusal
from xsmoe.stream.epoch import load_optimizer, make_optimizer, train_epoch
from xsmoe.stream.evaluation import RankingTask, rank_with_model
from xsmoe.stream.memory import StreamMemory
from xsmoe_kernels.ranges import opening_ranges


class StandIn:
    """Captures by running a step, and replays by running it again into the place of its loss, as a graph does."""

    def __init__(self, device: torch.device) -> None:
        self.captures = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        for _ in range(captured.WARM_UP):
            step()
        loss = step()

        def replay() -> None:
            loss.copy_(step())

        return replay, loss


def cannot(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    step()
    raise CannotCapture("operation not permitted when stream is capturing")


class Window:
    """A window that is trained on with graphs, or at least with what makes them."""

    def __init__(self, capture: Any = None, **options: Any) -> None:
        self.config = tiny.config(**options)
        self.model = tiny.model().to(self.config.device)
        self.splits = self.config.split(tiny.windows(2, users=30)[0])
        with np.errstate(divide="ignore"):
            self.log_share = np.log(item_share(self.splits.train, tiny.NUM_ITEMS))
        self.told: list[str] = []
        self.capture = capture
        self.begin()

    def begin(self) -> None:
        self.optimizer = make_optimizer(self.model, self.config)
        self.graphs = CapturedSteps(self.model, self.optimizer, self.told.append, self.capture)

    def epoch(self, number: int = 0, *, graphs: bool = True) -> float:
        done = train_epoch(
            self.model,
            tiny.features(),
            self.splits.train,
            self.log_share,
            self.optimizer,
            self.config,
            window=0,
            epoch=number,
            on_batch=lambda done, of: None,
            graphs=self.graphs if graphs else None,
        )
        return float(done["loss"])

    def state(self) -> dict[str, Tensor]:
        moments = self.optimizer.state_dict()["state"]
        return self.model.state_dict() | {
            f"{place} {name}": value for place, state in moments.items() for name, value in state.items()
        }


def assert_same(one: Window, other: Window) -> None:
    mine, theirs = one.state(), other.state()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def weights(window: Window) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in window.model.parameters()])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has trainers on a CPU capture their steps."""
    monkeypatch.setattr(captured, "CudaCapture", StandIn)
    for module in (trainer, epoch):
        monkeypatch.setattr(module, "refusal", lambda config: None if config.graph else "graph is off")


def test_replayed_steps_end_where_others_do() -> None:
    # With dropout: the steps ahead of a capture must draw nothing.
    replayed, eager = Window(StandIn(torch.device("cpu"))), Window(cannot)
    for number in range(3):
        assert replayed.epoch(number) == eager.epoch(number)
        assert_same(replayed, eager)
    assert len(replayed.graphs) > 0
    assert len(eager.graphs) == 0


def test_a_step_is_captured_once_for_each_kind_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xsmoe.stream.padding.ITEMS", 4)
    stand_in = StandIn(torch.device("cpu"))
    window, kinds = Window(stand_in), set()
    run = CapturedSteps.__call__

    def note(graphs: CapturedSteps, step: Any, given: StepInput) -> Tensor:
        kinds.add(given.kind())
        return run(graphs, step, given)

    monkeypatch.setattr(CapturedSteps, "__call__", note)
    for number in range(4):
        window.epoch(number)
    assert len(kinds) > 1
    assert stand_in.captures == len(window.graphs) == len(kinds)


def test_padding_changes_an_epoch_by_no_more_than_rounding() -> None:
    padded, plain = Window(StandIn(torch.device("cpu"))), Window(cannot)
    for window in (padded, plain):
        for module in window.model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
    # Adam takes whole steps of gradients that are nothing but rounding: one epoch, and no more.
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
def test_graphs_are_dropped_when_what_they_read_moves(change: Callable[[Recommender], None]) -> None:
    stand_in = StandIn(torch.device("cpu"))
    window = Window(stand_in)
    window.epoch(0)
    before = stand_in.captures
    window.epoch(0)
    assert stand_in.captures == before, "nothing moved"
    change(window.model)
    window.epoch(0)
    assert stand_in.captures > before


def test_graphs_are_dropped_when_frozen_experts_are_loaded() -> None:
    stand_in = StandIn(torch.device("cpu"))
    window = Window(stand_in)
    window.model.items.expand()
    window.begin()
    window.epoch(0)
    before = stand_in.captures
    with torch.no_grad():
        next(iter(window.model.items.banks()))[2].frozen_up.mul_(2)
    window.epoch(0)
    assert stand_in.captures > before, "autocast may have kept what they were cast to"


def test_what_cannot_be_captured_runs_all_the_same_and_says_so_once() -> None:
    window, eager = Window(cannot), Window(cannot)
    eager.graphs.reason = "never tried"
    for number in range(2):
        assert window.epoch(number) == eager.epoch(number)
    assert_same(window, eager)
    assert window.graphs.reason == "operation not permitted when stream is capturing"
    (message,) = window.told
    assert "without CUDA graphs: operation not permitted when stream is capturing" in message
    assert not any(group["capturable"] for group in window.optimizer.param_groups)


def test_other_errors_of_a_step_are_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window(StandIn(torch.device("cpu")))

    def fail(*_: Any) -> Tensor:
        raise ValueError("bad step")

    monkeypatch.setattr(epoch, "train_step", fail)
    with pytest.raises(ValueError, match="bad step"):
        window.epoch()


def test_a_profile_sees_the_parts_of_a_step_and_changes_no_number() -> None:
    stand_in, opened = StandIn(torch.device("cpu")), []
    window, expected = Window(stand_in), Window(StandIn(torch.device("cpu")))

    def note(name: str) -> nullcontext[None]:
        opened.append(name)
        return nullcontext()

    for number in range(3):
        with opening_ranges(note) if number == 1 else nullcontext():
            before = stand_in.captures
            assert window.epoch(number) == expected.epoch(number)
            assert (stand_in.captures > before) == (number == 0)
    assert_same(window, expected)
    assert {"data", "encode", "attend", "loss", "backward", "optimizer"} <= set(opened)
    assert window.told == ["while a profile is taken, training steps run one operation at a time, without CUDA graphs"]
    assert window.graphs.reason is None


@pytest.mark.parametrize(
    ("options", "debug", "reason"),
    [
        ({"graph": True}, "", "CUDA graphs need a GPU, and device is cpu"),
        ({"device": "cuda"}, "", "graph is off"),
        ({"device": "cuda", "graph": True}, "1", "XSMOE_DEBUG=1 has checks read values on the host"),
        (
            {"device": "cuda", "graph": True, "precision": "float16"},
            "",
            "precision is float16, and graphs leave out its loss scaler",
        ),
        (
            {"device": "cuda", "graph": True, "protocol": "paper"},
            "",
            "precision is float16, and graphs leave out its loss scaler",
        ),
        ({"device": "cuda", "graph": True, "protocol": "paper", "precision": "bfloat16"}, "", None),
        ({"device": "cuda", "graph": True}, "", None),
    ],
)
def test_why_steps_are_not_captured(
    options: dict[str, Any], debug: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XSMOE_DEBUG", debug)
    assert refusal(StreamConfig(**options)) == reason


def fit(folder: Path | None = None, listener: Any = None, **options: Any) -> list[dict[str, Any]]:
    model, settings = tiny.model(), tiny.config(**options)
    with StreamingTrainer(model, tiny.stream(), settings, folder=folder, listener=listener) as run:
        return tiny.without_time(run.fit())


def kill_and_resume(folder: Path, after: int, **options: Any) -> list[dict[str, Any]]:
    seen = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        seen.append(event)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(folder, listener, **options)
    return fit(folder, **options)


@pytest.mark.usefixtures("stand_in")
def test_a_run_that_is_killed_ends_the_same(tmp_path: Path) -> None:
    lines = fit()
    assert {line["without_graphs"] for line in lines if line["kind"] == "window"} == {None}
    for after in (2, 17, 30):
        assert kill_and_resume(tmp_path / str(after), after) == lines


def test_a_window_says_why_it_had_no_graphs() -> None:
    reasons = {line["without_graphs"] for line in fit() if line["kind"] == "window"}
    assert reasons == {"CUDA graphs need a GPU, and device is cpu"}


@pytest.mark.usefixtures("stand_in")
def test_the_rate_of_captured_steps_is_a_tensor_that_stays_in_place() -> None:
    window = Window(StandIn(torch.device("cpu")), lr=0.02, lr_decay=0.5, min_lr=0.004)
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


def test_a_checkpoint_from_before_these_settings_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = fit(graph=False)
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
            fit(tmp_path, listener, graph=False)
    assert fit(tmp_path, graph=False) == lines
    assert StreamConfig.from_dict({"lr": 0.01}) == StreamConfig(lr=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph": 1}, "graph must be True or False, not 1"),
        ({"store_gib": -1.0}, "store_gib must be a number of GiB of at least 0, or None, not -1.0"),
        ({"store_gib": float("nan")}, "not nan"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**settings)


GPU: dict[str, Any] = {"device": "cuda", "precision": "float32"}


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_graphs_end_where_others_do(precision: str) -> None:
    replayed, eager = Window(device="cuda", precision=precision), Window(cannot, device="cuda", precision=precision)
    first = weights(eager)
    for number in range(2):
        assert replayed.epoch(number) == pytest.approx(eager.epoch(number), rel=1e-3)
    assert len(replayed.graphs) > 0
    assert not replayed.told
    last = weights(eager)
    # Of how far they went: Adam takes whole steps of gradients that are nothing but rounding.
    assert (weights(replayed) - last).norm() < 0.02 * (last - first).norm()
    expected = eager.model.state_dict()
    for name, value in replayed.model.state_dict().items():
        if "utilization" in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3, msg=name)


@needs_gpu
def test_on_a_gpu_a_grown_model_is_captured_anew_and_goes_on_learning() -> None:
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
def test_on_a_gpu_every_replay_draws_dropout_anew() -> None:
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
def test_on_a_gpu_an_epoch_waits_once(graphs: bool) -> None:
    window = Window(**GPU, graph=graphs)
    window.epoch(0, graphs=graphs)
    assert synchronisations(lambda: window.epoch(1, graphs=graphs)) <= 1


@needs_gpu
def test_on_a_gpu_ranking_waits_once() -> None:
    window = Window(**GPU)
    memory = StreamMemory()
    memory.add_training(window.splits)
    task = RankingTask.build(window.splits.test, memory.known, memory.history, "rank")
    device = torch.device("cuda")

    def rank() -> np.ndarray:
        return rank_with_model(window.model, tiny.features(), task, device)

    expected = rank()
    assert synchronisations(rank) <= 1
    assert np.array_equal(rank(), expected)


@needs_gpu
def test_on_a_gpu_a_step_that_waits_is_not_captured_and_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = epoch.train_step

    def waits(*arguments: Any) -> Tensor:
        loss = real(*arguments)
        torch.cuda.synchronize()
        return loss

    monkeypatch.setattr(epoch, "train_step", waits)
    window, eager = Window(**GPU), Window(cannot, **GPU)
    for number in range(2):
        assert window.epoch(number) == pytest.approx(eager.epoch(number), rel=1e-3)
    assert window.graphs.reason
    assert len(window.told) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@needs_gpu
def test_on_a_gpu_a_run_that_is_killed_ends_the_same(tmp_path: Path) -> None:
    lines = fit(**GPU)
    assert {line["without_graphs"] for line in lines if line["kind"] == "window"} == {None}
    for after in (2, 9, 17, 30):
        assert kill_and_resume(tmp_path / str(after), after, **GPU) == lines
