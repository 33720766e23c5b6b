"""Weights that a window ends with, sequences of an epoch, and batch sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.stream import tiny
from tests.stream.tiny import Killed
from xsmoe.cli.tensorboard import TensorBoard
from xsmoe.stream import StreamConfig, StreamingTrainer
from xsmoe.stream.state.kept_weights import DECAY, update_average


def fit(keep: str, folder: Path | None = None, listener: Any = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    model = tiny.model()
    settings = tiny.config(keep=keep, history="all", patience=0)
    with StreamingTrainer(model, tiny.stream(), settings, folder=folder, listener=listener) as trainer:
        return tiny.without_time(trainer.fit()), model.state_dict()


@pytest.mark.parametrize("keep", ["last", "ema"])
def test_all_epochs_run_and_only_the_kept_weights_are_validated(keep: str) -> None:
    lines, _ = fit(keep)
    assert all(line["validation"] is None for line in lines if line["kind"] == "epoch")
    for line in lines:
        if line["kind"] == "window":
            assert (line["kept"], line["best_epoch"], line["epochs"]) == (keep, None, 4)
            assert line["validation"]["users"] > 0
            assert line["sequences"] > line["users"] > 0


@pytest.mark.parametrize("keep", ["last", "ema"])
@pytest.mark.parametrize("after", [3, 12, 17, 23, 29])
def test_resumed_run_has_the_same_results(keep: str, after: int, tmp_path: Path) -> None:
    lines, weights = fit(keep)
    seen = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        seen.append(event)
        if len(seen) == after:
            raise Killed

    with pytest.raises(Killed):
        fit(keep, tmp_path, listener)
    resumed, again = fit(keep, tmp_path)
    assert resumed == lines
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name


def test_a_window_ends_with_the_last_epoch_or_with_the_average() -> None:
    epochs: list[dict[str, torch.Tensor]] = []
    for keep in ("last", "ema"):
        epochs.clear()
        model = tiny.model()

        def listener(event: str, fields: dict[str, Any], model: Any = model) -> None:
            if event == "epoch":
                epochs.append({name: value.detach().clone() for name, value in model.named_parameters()})

        StreamingTrainer(model, tiny.stream(), tiny.config(keep=keep), listener=listener).step(tiny.windows()[0])
        shares = np.array([DECAY**age for age in range(len(epochs))][::-1])
        for name, value in model.named_parameters():
            expected = epochs[-1][name]
            if keep == "ema":
                expected = sum(w * e[name] for w, e in zip(shares / shares.sum(), epochs, strict=True))
            torch.testing.assert_close(value.detach(), expected, rtol=1e-5 if keep == "ema" else 0, atol=1e-7)


def test_the_first_epoch_is_its_own_average() -> None:
    model = tiny.model()
    average = update_average(None, model, 0)
    for name, value in model.named_parameters():
        assert torch.equal(average[name], value)
        assert average[name].data_ptr() != value.data_ptr()


def test_average_from_a_checkpoint_is_moved_to_the_models_device() -> None:
    average = update_average(None, tiny.model(condition="whiten", ids=True), 0)
    assert "items.ids.weight" in average
    assert all(not name.startswith("items.conditioning.") for name in average)
    moved = update_average(average, tiny.model(condition="whiten", ids=True).to("meta"), 1)
    assert {value.device.type for value in moved.values()} == {"meta"}


@pytest.mark.parametrize(
    "sequences, batch, min_steps, expected",
    [(10_000, 256, 10, 256), (1000, 256, 10, 100), (300, 256, 10, 32), (7, 256, 10, 32), (1000, 20, 10, 20)],
)
def test_batches_of_small_windows_shrink(sequences: int, batch: int, min_steps: int, expected: int) -> None:
    assert StreamConfig(batch_size=batch, min_steps=min_steps).batch_for(sequences) == expected
    assert StreamConfig(batch_size=batch, protocol="paper").batch_for(sequences) >= min(batch, sequences)


def test_epoch_has_the_steps_of_the_window_line() -> None:
    settings = tiny.config(history="all", keep="last", batch_size=256, min_steps=3)
    lines = StreamingTrainer(tiny.model(), tiny.stream(users=60, each=60), settings).fit()
    sizes = {line["window"]: (line["sequences"], line["batch_size"]) for line in lines if line["kind"] == "window"}
    for line in lines:
        if line["kind"] == "epoch":
            sequences, batch = sizes[line["window"]]
            assert line["steps"] == -(-sequences // batch) >= 3
            assert 32 < batch < 256


def test_the_validation_of_the_kept_weights_is_among_the_events(tmp_path: Path) -> None:
    line = {"kind": "window", "window": 2, "experts": {}, "validation": {"HR@10": 0.5, "NDCG@10": 0.25}}
    with TensorBoard(tmp_path / "events", [line, line | {"window": 3, "validation": None}]):
        pass
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("validation_kept/NDCG@10")] == [(2, 0.25)]
