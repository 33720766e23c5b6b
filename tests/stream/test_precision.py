"""Precision of training steps, and the loss scaler, which torch supports on a CPU too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.stream import tiny
from tests.stream.tiny import Killed
from xsmoe.cli.tensorboard import TensorBoard
from xsmoe.data import item_share
from xsmoe.nn import Recommender
from xsmoe.stream import Stream, StreamConfig, StreamingTrainer, TrainingDiverged, epoch, precision, trainer
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.precision import LossScaler, autocast, autocast_dtype, hidden_dtype, steps_taken
from xsmoe.stream.state.checkpoints import Checkpoints
from xsmoe.stream.state.run_folder import read_metrics

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize(
    ("device", "protocol", "asked", "expected"),
    [
        ("cpu", "default", "auto", None),
        ("cpu", "paper", "auto", None),
        ("cpu", "default", "bfloat16", torch.bfloat16),
        ("cuda", "default", "auto", torch.bfloat16),
        ("cuda:1", "paper", "auto", torch.float16),
        ("cuda", "paper", "bfloat16", torch.bfloat16),
        ("cuda", "paper", "float32", None),
        ("cuda", "default", "float16", torch.float16),
    ],
)
def test_autocast_dtype(device: str, protocol: Any, asked: Any, expected: torch.dtype | None) -> None:
    config = tiny.config(device=device, protocol=protocol, precision=asked)
    assert autocast_dtype(config) == expected
    assert hidden_dtype(tiny.model(), config) == (expected or torch.float32)
    assert hidden_dtype(tiny.model(top_k=1), config) == torch.float32
    assert (precision.loss_scaler(config) is not None) == (expected == torch.float16)


def test_float16_on_a_cpu_is_rejected_before_files_are_written(tmp_path: Path) -> None:
    config = tiny.config(precision="float16")
    with pytest.raises(ValueError, match="precision is 'float16', .* device is 'cpu'; use --precision bfloat16"):
        StreamingTrainer(tiny.model(), tiny.stream(), config, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_saved_before_float16_are_loaded_unchanged() -> None:
    saved = StreamConfig(precision="bfloat16").to_dict()
    assert saved["precision"] == "bfloat16"
    assert StreamConfig.from_dict(saved).precision == "bfloat16"
    with pytest.raises(ValueError, match="precision must be one of auto, float32, bfloat16, float16, not 'half'"):
        StreamConfig.from_dict({"precision": "half"})


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that enables a loss scaler for trainers on a CPU, in float32 or in float16."""

    def switch(dtype: torch.dtype | None = None, **options: Any) -> None:
        def scaler(config: StreamConfig) -> LossScaler:
            made = LossScaler(CPU)
            made._scaler = torch.amp.GradScaler("cpu", **options)
            return made

        monkeypatch.setattr(trainer, "loss_scaler", scaler)
        if dtype is not None:
            monkeypatch.setattr(precision, "autocast_dtype", lambda config: dtype)

    return switch


def fit(folder: Path | None = None, listener: Any = None, windows: int = 1) -> tuple[list[dict], Recommender]:
    model = tiny.model()
    stream = Stream(tiny.windows()[:windows], tiny.features())
    with StreamingTrainer(model, stream, tiny.config(), folder=folder, listener=listener) as run:
        return tiny.without_time(run.fit()), model


def epochs(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["kind"] == "epoch"]


def test_scaler_is_bitwise_neutral_in_float32(scaled: Callable[..., None]) -> None:
    lines, model = fit()
    assert not any("skipped_steps" in line or "loss_scale" in line for line in lines)
    scaled()
    again, theirs = fit()
    for line in epochs(again):
        assert (line.pop("skipped_steps"), line.pop("loss_scale")) == (0, 65536.0)
    # The scale is a power of two.
    assert again == lines
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_float16_trains_close_to_float32(scaled: Callable[..., None]) -> None:
    lines, _ = fit()
    scaled(torch.float16)
    half, model = fit()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    first = [[line["loss"] for line in epochs(found)][:3] for found in (lines, half)]
    assert first[0] != first[1]
    np.testing.assert_allclose(first[1], first[0], rtol=5e-3)


def poison(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool], factor: float) -> list[int]:
    """Multiply the loss of some steps, selected by their number, and collect the numbers."""
    real, poisoned = Recommender.forward, []
    count = iter(range(10_000))

    def forward(self: Recommender, *arguments: Any) -> torch.Tensor:
        number, loss = next(count), real(self, *arguments)
        if not when(number):
            return loss
        poisoned.append(number)
        return loss * factor

    monkeypatch.setattr(Recommender, "forward", forward)
    return poisoned


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1e36])
def test_overflowing_step_is_skipped_and_counted_and_not_a_divergence(
    scaled: Callable[..., None], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    scaled()
    seen: list[list[torch.Tensor]] = []
    poisoned = poison(monkeypatch, lambda number: number == 4, factor)
    real = epoch.train_step

    def step(model: Recommender, *arguments: Any) -> torch.Tensor:
        before = [p.detach().clone() for p in model.parameters()]
        loss = real(model, *arguments)
        seen.append([torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)])
        return loss

    monkeypatch.setattr(epoch, "train_step", step)
    lines, _ = fit(windows=2)
    found = epochs(lines)
    # Three steps per epoch.
    assert poisoned == [4]
    assert all(seen[4])
    assert not all(seen[3])
    assert not all(seen[5])
    assert [line["skipped_steps"] for line in found[:3]] == [0, 1, 0]
    assert [line["loss_scale"] for line in found[:3]] == [65536.0, 32768.0, 32768.0]
    # Each window has a new optimizer and a new scaler.
    assert {line["loss_scale"] for line in found if line["window"] == 1} == {65536.0}
    assert all(np.isfinite(line["loss"]) for line in found)


def test_infinite_loss_in_all_steps_is_a_divergence(
    scaled: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scaled()
    with monkeypatch.context() as patch:
        poison(patch, lambda number: number >= 4, float("inf"))
        with pytest.raises(TrainingDiverged, match=r"window 0, epoch 2: the loss is inf at step 0 of 3\. .*float32"):
            fit(tmp_path)
    assert [line["skipped_steps"] for line in epochs(read_metrics(tmp_path))] == [0, 2]


def test_repeatedly_overflowing_gradients_are_a_divergence(
    scaled: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(init_scale=4.0)
    poison(monkeypatch, lambda number: number % 3 != 0, float("nan"))
    with pytest.raises(
        TrainingDiverged, match="epoch 1: the loss scale is 0.25 after the last step of 3, because gradients overflow"
    ):
        fit()


def test_nonfinite_weights_are_a_divergence_with_a_scaler_too(scaled: Callable[..., None]) -> None:
    scaled()
    model = tiny.model()

    def listener(event: str, fields: dict) -> None:
        if event == "batch" and fields["done"] == fields["of"]:
            with torch.no_grad():
                model.items.projection.weight[0, 0] = torch.inf

    with pytest.raises(TrainingDiverged, match="the weights are not finite after the last step"):
        StreamingTrainer(model, tiny.stream(), tiny.config(), listener=listener).step(tiny.windows()[0])


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_killed_run_resumes_with_its_loss_scale(
    scaled: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    scaled(dtype, init_scale=1.0, growth_interval=1)
    after = 2

    def listener(event: str, fields: dict) -> None:
        if event == "epoch" and fields["epoch"] == after:
            raise Killed

    lines, model = fit()
    scales = [line["loss_scale"] for line in epochs(lines)][: after + 2]
    assert len(set(scales)) == len(scales), "a fresh scaler would have to show"
    with pytest.raises(Killed):
        fit(tmp_path, listener)
    again, theirs = fit(tmp_path)
    assert again == lines
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_checkpoint_without_scaler_state_is_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Checkpoints.save

    def save(self: Checkpoints, payload: dict[str, Any]) -> Path:
        assert payload.pop("scaler") is None
        return real(self, payload)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)

        def listener(event: str, fields: dict) -> None:
            if event == "epoch" and fields["epoch"] == 2:
                raise Killed

        with pytest.raises(Killed):
            fit(tmp_path, listener)
    assert fit(tmp_path)[0] == fit()[0]


def test_skipped_steps_are_among_the_events(tmp_path: Path) -> None:
    line = {"kind": "epoch", "loss": 1.0, "lr": 0.1, "validation": None, "time": {"step_ms": 1.0, "peak_rss_mib": 1.0}}
    with TensorBoard(tmp_path / "events", [line, line | {"skipped_steps": 3, "loss_scale": 512.0}]):
        pass
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/skipped_steps")] == [(1, 3.0)]
    assert [event.value for event in events.Scalars("train/loss_scale")] == [512.0]


def test_tf32_setting_of_torch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training does not change the setting."""
    before = torch.get_float32_matmul_precision()
    seen = []

    def listener(event: str, fields: dict) -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))

    try:
        for setting, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(setting)
            seen.clear()
            fit(listener=listener)
            assert set(seen) == {(setting, allowed)}
            assert torch.get_float32_matmul_precision() == setting
            # Disabled autocast does not change the setting for a float32 step on CUDA.
            with autocast(tiny.config()):
                assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def step_on_gpu(config: StreamConfig) -> tuple[Recommender, torch.optim.Optimizer, StepInput]:
    model = tiny.model().to(config.device)
    sequences = config.split(tiny.windows()[0]).train
    with np.errstate(divide="ignore"):
        share = np.log(item_share(sequences, tiny.NUM_ITEMS))
    dtype = hidden_dtype(model, config)
    given = StepInput.build(tiny.features(), model.items.modalities, sequences, share, dtype).pin()
    return model, epoch.make_optimizer(model, config), given.to(torch.device(config.device))


@needs_gpu
def test_on_a_gpu_a_scaled_step_does_not_synchronize() -> None:
    config = tiny.config(device="cuda", precision="float16")
    model, optimizer, given = step_on_gpu(config)
    scaler = precision.loss_scaler(config)
    assert scaler is not None
    for _ in range(3):
        epoch.train_step(model, given, optimizer, config, scaler)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = epoch.train_step(model, given, optimizer, config, scaler)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    assert steps_taken(optimizer) == 4
    assert given.hidden["text"][-1].dtype == torch.float16


@needs_gpu
def test_on_a_gpu_float16_under_the_paper_protocol_trains_and_resumes(tmp_path: Path) -> None:
    def run(listener: Any = None) -> list[dict]:
        stream = Stream(tiny.windows(), tiny.features(), protocol="paper")
        config = tiny.config(device="cuda", protocol="paper")
        with StreamingTrainer(tiny.model(), stream, config, folder=tmp_path, listener=listener) as made:
            return tiny.without_time(made.fit())

    def listener(event: str, fields: dict) -> None:
        if event == "epoch" and fields["epoch"] == 1:
            raise Killed

    with pytest.raises(Killed):
        run(listener)
    lines = run()
    assert all(line["skipped_steps"] <= 2 and line["loss_scale"] >= 1 for line in epochs(lines))
    assert epochs(lines)[0]["loss"] > [line["loss"] for line in epochs(lines) if line["window"] == 0][-1]


@needs_gpu
def test_on_a_gpu_float32_products_follow_torch() -> None:
    config = tiny.config(device="cuda", precision="float32")
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("high", "highest"):
            torch.set_float32_matmul_precision(setting)
            model, optimizer, given = step_on_gpu(config)
            epoch.train_step(model, given, optimizer, config)
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
