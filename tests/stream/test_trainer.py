"""The streaming trainer: order of events, results, and resuming after an interruption."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.stream import tiny
from tests.stream.tiny import Killed
from xsmoe.data import Window
from xsmoe.nn import Recommender
from xsmoe.stream import CheckpointError, Stream, StreamConfig, StreamingTrainer, TrainingDiverged
from xsmoe.stream.state.checkpoints import Checkpoints
from xsmoe.stream.state.run_folder import read_metrics


def fit(folder: Path | None = None, listener: Any = None, **options: Any) -> tuple[list[dict], Recommender]:
    model = tiny.model()
    with StreamingTrainer(model, tiny.stream(), tiny.config(**options), folder=folder, listener=listener) as trainer:
        return trainer.fit(), model


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[list[dict], Recommender]:
    return fit()


def test_order_of_events_and_fields_of_the_metrics(uninterrupted) -> None:
    lines, model = uninterrupted
    kinds = [line["kind"] for line in lines if line["kind"] != "epoch"]
    assert kinds == ["window", "test", "window", "test", "window"]
    tests = [line for line in lines if line["kind"] == "test"]
    assert [(line["window"], line["tested_on"]) for line in tests] == [(0, 1), (1, 2)]
    for line in tests:
        assert set(line["all"]) == {"users", "HR@10", "NDCG@10", "HR@20", "NDCG@20", "MRR", "se"}
        assert 0 < line["cold"]["users"] < line["all"]["users"]
        assert set(line["popularity"]) == set(line["lift"]) == {"all_time", "last_window"}
        assert line["lift"]["all_time"]["MRR"] == pytest.approx(
            line["all"]["MRR"] - line["popularity"]["all_time"]["MRR"]
        )
        assert [e["num_frozen"] for e in line["expanded"]["text"]] == [line["window"] + 1] * 2
    window = [line for line in lines if line["kind"] == "window"][-1]
    assert window["experts"] == {name: side.num_experts for name, side in model.items.side_networks().items()}
    assert sum(window["shares"]["image"][0]) == pytest.approx(1)
    assert json.loads(json.dumps(lines)) == lines


def test_the_best_epoch_is_restored_with_its_counters(uninterrupted) -> None:
    lines, _ = uninterrupted
    kept = {}
    model = tiny.model()

    def listener(event: str, line: dict) -> None:
        if event == "epoch" and line["best"]:
            kept[line["window"]] = {name: value.clone() for name, value in model.state_dict().items()}
        if event == "window":
            assert (
                line["best_epoch"]
                == max(
                    (e for e in lines if e["kind"] == "epoch" and e["window"] == line["window"] and e["validation"]),
                    key=lambda e: e["validation"]["NDCG@10"],
                )["epoch"]
            )
            for name, value in model.state_dict().items():
                assert torch.equal(value, kept[line["window"]][name]), name

    trainer = StreamingTrainer(model, tiny.stream(), tiny.config(), listener=listener)
    assert tiny.without_time(trainer.fit()) == tiny.without_time(lines)
    assert any(line["best_epoch"] + 1 < line["epochs"] for line in lines if line["kind"] == "window")


def count_events() -> int:
    events = []
    fit(listener=lambda event, fields: events.append(event))
    return len(events)


@pytest.mark.parametrize("part", range(12))
def test_run_killed_at_any_event_has_the_same_results(uninterrupted, tmp_path: Path, part: int) -> None:
    lines, model = uninterrupted
    after = 1 + part * (count_events() - 1) // 11
    seen = []

    def listener(event: str, fields: dict) -> None:
        seen.append(event)
        if len(seen) == after:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path, listener)
    resumed, again = fit(tmp_path)
    assert tiny.without_time(resumed) == tiny.without_time(lines)
    assert tiny.without_time(read_metrics(tmp_path)) == tiny.without_time(lines)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_run_killed_at_any_write_has_the_same_results(uninterrupted, tmp_path: Path, monkeypatch) -> None:
    lines, _ = uninterrupted
    synced, replaced = os.fsync, os.replace
    for attempt, (call, after) in enumerate(
        [("fsync", 3), ("replace", 4), ("fsync", 11), ("replace", 9), ("fsync", 30)]
    ):
        folder, calls = tmp_path / str(attempt), []

        def dying(*arguments: Any, real=None, name="", calls=calls, call=call, after=after) -> Any:
            calls.append(name)
            if calls.count(call) == after and name == call:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda *a: dying(*a, real=synced, name="fsync"))
            patch.setattr(os, "replace", lambda *a: dying(*a, real=replaced, name="replace"))
            with pytest.raises(Killed):
                fit(folder)
        assert tiny.without_time(fit(folder)[0]) == tiny.without_time(lines)


def test_finished_run_does_nothing(uninterrupted, tmp_path: Path) -> None:
    lines, _ = fit(tmp_path)
    events = []
    again, _ = fit(tmp_path, lambda event, fields: events.append(event))
    assert events == ["resumed"]
    assert again == lines
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    loaded = Recommender.from_pretrained(tmp_path / "model")
    assert loaded.items.sides["text"].num_experts == lines[-1]["experts"]["text"]


def test_step_accepts_windows_outside_of_the_stream(uninterrupted, tmp_path: Path) -> None:
    lines, _ = uninterrupted
    first, second, third = tiny.windows()
    empty = Stream([], tiny.features())
    with StreamingTrainer(tiny.model(), empty, tiny.config(), folder=tmp_path) as trainer:
        trainer.step(first)
        assert trainer.windows_done == 1
    with StreamingTrainer(tiny.model(), empty, tiny.config(), folder=tmp_path) as trainer:
        trainer.step(second)
        trainer.step(third)
        assert tiny.without_time(trainer.metrics) == tiny.without_time(lines)


def test_interrupted_window_cannot_be_replaced(tmp_path: Path) -> None:
    def listener(event: str, fields: dict) -> None:
        if event == "epoch":
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path, listener)
    with StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(), folder=tmp_path) as trainer:
        with pytest.raises(ValueError, match="training of window 0 was interrupted; finish that window first"):
            trainer.step(tiny.windows()[1])
    other = tiny.stream(seed=5)
    fit(tmp_path)
    with StreamingTrainer(tiny.model(), other, tiny.config(), folder=tmp_path) as trainer:
        with pytest.raises(ValueError, match="window 0 of the stream is not the one that this run was trained on"):
            trainer.fit()


@pytest.mark.parametrize(
    "options, experts",
    [({"expand": False}, [1, 1]), ({"prune": False}, [3, 3]), ({"prune_threshold": 1.0}, [2, 2])],
)
def test_expansion_and_pruning_can_be_disabled(options: dict, experts: list[int]) -> None:
    lines, _ = fit(**options)
    assert lines[-1]["experts"] == {"image": experts, "text": experts}
    tests = [line for line in lines if line["kind"] == "test"]
    assert all(bool(line["expanded"]) == (options.get("expand") is None) for line in tests)
    assert all(bool(line["pruned"]) == (options.get("prune") is None) for line in tests)


def test_run_with_nonfinite_counters_continues_and_warns_about_skipped_pruning() -> None:
    model, messages = tiny.model(), []

    def listener(event: str, line: dict) -> None:
        if event == "warning":
            messages.append(line["message"])
        if event == "window":
            banks = model.items.sides["text"].levels()
            banks[1].utilization.norm[-1] = float("nan")

    trainer = StreamingTrainer(model, tiny.stream(), tiny.config(prune_threshold=1.0), listener=listener)
    tests = [line for line in trainer.fit() if line["kind"] == "test"]
    assert messages == ["window 2 does not prune text 1: the utilization counters are not finite"]
    assert [[level["level"] for level in line["pruned"]["text"]] for line in tests] == [[], [0]]
    assert [bank.num_experts for bank in model.items.sides["text"].levels()] == [2, 3]
    assert [bank.num_experts for bank in model.items.sides["image"].levels()] == [2, 2]


def test_warm_up_only_and_an_empty_validation_split_keep_the_last_epoch() -> None:
    messages = []
    lines, _ = fit(listener=lambda e, f: messages.append(f) if e == "warning" else None, warmup_epochs=9)
    assert {line["kept"] for line in lines if line["kind"] == "window"} == {"last"}
    assert "all epochs were warm-up epochs without validation (9)" in messages[0]["message"]
    lines, _ = fit(train_fraction=0.999)
    reasons = {line.get("reason") for line in lines if line["kind"] == "window"}
    assert reasons == {"the validation split has no user with 2 items"}


def test_window_without_users_is_skipped() -> None:
    lines, _ = fit(k_core=10_000)
    window = lines[0]
    assert (window["epochs"], window["users"], window["kept"]) == (0, 0, "last")
    assert lines[-1]["experts"]["text"] == [1, 1], "what was not trained does not grow"
    assert "10000 interactions in the window (k_core)" in window["reason"]
    assert lines[1]["all"] == {
        "users": 0,
        **dict.fromkeys(["HR@10", "NDCG@10", "HR@20", "NDCG@20", "MRR"]),
        "se": dict.fromkeys(["HR@10", "NDCG@10", "HR@20", "NDCG@20", "MRR"]),
    }


def test_window_without_training_sequences_does_not_change_experts() -> None:
    first, second, third = tiny.windows()
    alone = Window(0, second.users[:3], second.items[:3], second.timestamps[:3])
    trainer = StreamingTrainer(tiny.model(), tiny.stream(), tiny.config())
    trainer.step(first)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.step(alone)["epochs"] == 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert trainer.step(third)["experts"]["text"] == [2, 2]


def test_nonfinite_loss_stops_the_run(uninterrupted, tmp_path: Path) -> None:
    lines, _ = uninterrupted
    model = tiny.model()

    def poison(event: str, fields: dict) -> None:
        if event == "batch" and (fields["window"], fields["epoch"], fields["done"]) == (1, 1, 1):
            with torch.no_grad():
                model.items.projection.weight[0, 0] = torch.nan

    with StreamingTrainer(model, tiny.stream(), tiny.config(), folder=tmp_path, listener=poison) as trainer:
        with pytest.raises(
            TrainingDiverged, match="window 1, epoch 1: the loss is nan at step 1 of 3. .* lower lr than 0.01"
        ):
            trainer.fit()
    assert tiny.without_time(fit(tmp_path)[0]) == tiny.without_time(lines)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": tiny.config(lr=0.5)}, r"config\.lr was 0\.01, is now 0\.5"),
        (
            {
                "config": tiny.config(protocol="paper"),
                "stream": Stream(tiny.windows(), tiny.features(), protocol="paper"),
            },
            r"config\.protocol was 'default', is now 'paper'",
        ),
        ({"model": tiny.model(top_k=1)}, r"model_config\.items\.top_k was None, is now 1"),
        ({"stream": Stream(tiny.windows(), tiny.features(seed=1))}, "was trained on other hidden states"),
    ],
)
def test_run_with_another_configuration_is_rejected(tmp_path: Path, change: dict, message: str) -> None:
    lines, _ = fit(tmp_path)
    arguments = {"model": tiny.model(), "stream": tiny.stream(), "config": tiny.config(), **change}
    with pytest.raises(ValueError, match=message):
        StreamingTrainer(**arguments, folder=tmp_path)
    assert fit(tmp_path)[0] == lines


def test_damaged_checkpoint_is_skipped_with_a_warning(uninterrupted, tmp_path: Path) -> None:
    lines, _ = uninterrupted

    def listener(event: str, fields: dict) -> None:
        if event == "begin" and fields["window"] == 1:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path, listener)
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    warned = []
    resumed, _ = fit(tmp_path, lambda event, fields: warned.append(fields["message"]) if event == "warning" else None)
    message = "is damaged: its content does not match its digest; resuming from the previous checkpoint"
    assert f"{newest} {message}" in warned[0]
    assert tiny.without_time(resumed) == tiny.without_time(lines)

    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; start a new run"):
            fit(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match="has metrics but no checkpoint; restore it from a backup, or use another folder"
    ):
        fit(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_full_disk_keeps_saved_files(uninterrupted, tmp_path: Path, monkeypatch) -> None:
    lines, _ = uninterrupted
    calls = []
    synced = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 17:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match="No space left on device.* free disk space and run the same command again"
        ):
            fit(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert tiny.without_time(fit(tmp_path)[0]) == tiny.without_time(lines)


def test_nonfinite_weights_are_never_saved(uninterrupted, tmp_path: Path) -> None:
    lines, _ = uninterrupted
    model = tiny.model()

    def poison(event: str, fields: dict) -> None:
        if event == "batch" and (fields["window"], fields["epoch"], fields["done"]) == (0, 2, fields["of"]):
            with torch.no_grad():
                model.items.projection.weight[0, 0] = torch.inf

    with StreamingTrainer(model, tiny.stream(), tiny.config(), folder=tmp_path, listener=poison) as trainer:
        with pytest.raises(TrainingDiverged, match="window 0, epoch 2: the weights are not finite after the last step"):
            trainer.fit()
    assert tiny.without_time(fit(tmp_path)[0]) == tiny.without_time(lines)


def test_interrupted_or_closed_trainer_rejects_windows(tmp_path: Path) -> None:
    def listener(event: str, fields: dict) -> None:
        if event == "epoch":
            raise Killed

    with StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(), folder=tmp_path, listener=listener) as trainer:
        with pytest.raises(Killed):
            trainer.fit()
        with pytest.raises(
            RuntimeError, match="cannot be used, because training of window 0 was interrupted; create a"
        ):
            trainer.fit()
    with pytest.raises(RuntimeError, match="it is closed"):
        trainer.step(tiny.windows()[0])


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(), folder=tmp_path):
        with pytest.raises(ValueError, match="is in use by another process"):
            StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(), folder=tmp_path)


def test_modified_metrics_and_windows_are_rejected(tmp_path: Path) -> None:
    fit(tmp_path)
    window = tmp_path / "windows" / "0000.npz"
    kept = window.read_bytes()
    window.write_bytes((tmp_path / "windows" / "0001.npz").read_bytes())
    with pytest.raises(CheckpointError, match="window 0 in .* differs from the one in the checkpoint"):
        fit(tmp_path)
    window.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*0000\.npz, which the run needs to resume"):
        fit(tmp_path)
    window.write_bytes(kept)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is shorter than at the last checkpoint"):
        fit(tmp_path)


def test_invalid_windows_and_models_are_named() -> None:
    trainer = StreamingTrainer(tiny.model(), tiny.stream(), tiny.config())
    one = np.array([99], dtype=np.int64)
    with pytest.raises(ValueError, match=r"window\.items must be in \[0, 40\), but ranges from 99 to 99"):
        trainer.step(Window(0, one, one, one))
    for users in (one - 100, one << 31):
        with pytest.raises(ValueError, match=r"window\.users must be in \[0, 2147483648\)"):
            trainer.step(Window(0, users, one - 90, one))
    first = tiny.windows()[0]
    with pytest.raises(ValueError, match=r"window\.timestamps must be in ascending order"):
        trainer.step(Window(0, first.users, first.items, first.timestamps[::-1].copy()))
    assert trainer.metrics == []
    trainer.step(first)
    with pytest.raises(ValueError, match="already trained on these interactions, as window 0; pass a new window"):
        trainer.step(first)
    with pytest.raises(ValueError, match=r"protocol 'default', but config\.protocol is 'paper'"):
        StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(protocol="paper"))
    with pytest.raises(ValueError, match="max_inputs is 11, but the user encoder supports at most 10"):
        StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(max_inputs=11))
    text_only = tiny.features()
    text_only._levels.pop("image")
    with pytest.raises(ValueError, match=r"stream\.features has no modality image"):
        StreamingTrainer(tiny.model(), Stream([], text_only), tiny.config())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"protocol": "published"}, "protocol must be one of default, paper, not 'published'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"train_fraction": 1.0}, "train_fraction must be between 0 and 1, not 1.0"),
        ({"prune_threshold": 2}, "prune_threshold must be a share"),
        ({"lr": 1e-5}, "need 0 < min_lr <= lr"),
        ({"repeats": "drop"}, "repeats must be one of rank, miss, not 'drop'"),
        ({"keep": "first"}, "keep must be one of last, best, ema, not 'first'"),
        ({"history": "none"}, "history must be one of all, last, not 'none'"),
        ({"ties": "random"}, "ties must be one of hash, file, not 'random'"),
        ({"duplicates": "count"}, "duplicates must be one of drop, keep, not 'count'"),
        ({"targets": "first"}, "targets must be one of last, all, not 'first'"),
        ({"min_steps": 0}, "min_steps must be a whole number of at least 1, not 0"),
        ({"id_dropout": 1.5}, "id_dropout must be a share between 0 and 1, not 1.5"),
        ({"keep": "best", "patience": 0}, "patience is 0, but must be at least 1 if keep is 'best'"),
    ],
)
def test_invalid_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamConfig(**settings)


def test_settings_follow_the_protocol_and_survive_json() -> None:
    assert (StreamConfig().repeats, StreamConfig().validation_candidates) == ("rank", "known")
    paper = StreamConfig(protocol="paper", repeats="rank")
    assert (paper.repeats, paper.validation_candidates) == ("rank", "split")
    assert (paper.ties, paper.duplicates, paper.history, paper.targets) == ("file", "keep", "last", "last")
    assert (paper.keep, paper.epochs, paper.patience, paper.min_steps) == ("last", 100, 5, 1)
    ours = StreamConfig()
    assert (ours.ties, ours.duplicates, ours.history, ours.targets) == ("hash", "drop", "all", "all")
    assert (ours.keep, ours.epochs, ours.patience, ours.min_steps) == ("ema", 12, 0, 10)
    assert (ours.expand, ours.prune, paper.expand, paper.prune) == (False, False, True, True)
    best = StreamConfig(keep="best")
    assert (best.epochs, best.patience) == (100, 5)
    assert StreamConfig.from_dict(json.loads(json.dumps(paper.to_dict()))) == paper
    with pytest.raises(ValueError, match="unknown settings: colour"):
        StreamConfig.from_dict({"colour": 1})


def test_settings_of_earlier_versions_keep_their_behaviour() -> None:
    saved = StreamConfig(keep="best", history="last").to_dict()
    for name in ("ties", "duplicates", "history", "keep", "targets", "min_steps", "id_dropout", "grow", "prune_rule"):
        del saved[name]
    old = StreamConfig.from_saved(saved)
    assert (old.ties, old.duplicates, old.history, old.keep, old.targets) == ("file", "keep", "last", "best", "last")
    assert (old.min_steps, old.id_dropout, old.epochs, old.patience) == (1, 0.0, 100, 5)
    assert (old.grow, old.prune_rule) == ("every", "drop")


def test_run_of_an_earlier_version_is_resumed_with_its_behaviour(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ties": "file", "duplicates": "keep", "targets": "last", "min_steps": 1}
    options |= {"id_dropout": 0.0}
    old = tiny.config(**options)
    with StreamingTrainer(tiny.model(), tiny.stream(), old, folder=tmp_path) as trainer:
        trainer.step(tiny.windows()[0])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    found = checkpoints.load_newest(lambda _: None)
    assert found is not None
    state = found[1]
    for name in (*options, "history", "keep"):
        del state["config"][name]
    for name in ("condition", "ids"):
        del state["model_config"]["items"][name]
    del state["average"]
    checkpoints.save(state)
    with StreamingTrainer(tiny.model(), tiny.stream(), old, folder=tmp_path) as trainer:
        assert trainer.windows_done == 1
    with pytest.raises(ValueError, match="config.history was 'last', is now 'all'"):
        StreamingTrainer(tiny.model(), tiny.stream(), tiny.config(**options, history="all"), folder=tmp_path)
