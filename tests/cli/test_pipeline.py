"""The workflow from tables to recommendations and updates."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from tests.cli.helpers import Place, run, succeed, train_arguments
from xsmoe.cli.trained_run import TrainedRun
from xsmoe.encoders import HiddenStateStore
from xsmoe.report.verdict import judge
from xsmoe.stream import StreamingTrainer
from xsmoe.stream.hidden_states.conditioned import ConditionedFeatures
from xsmoe.stream.state.run_folder import read_metrics

pytestmark = pytest.mark.usefixtures("one_plot")

Copy = Callable[[Place], Place]


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in metrics]


def test_encode_reports_counts_and_skips_encoded_items(prepared: Place) -> None:
    encoders = [f"--{name}={prepared.root / 'encoders' / name}" for name in ("text", "image")]
    assert "0 items encoded; 60 were there already" in succeed("encode", prepared.dataset, prepared.store, *encoders)


def test_train_writes_all_files_and_shows_a_row_per_window(trained: Place) -> None:
    out = succeed(*train_arguments(trained))
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+\d+ ", line)]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert [row[3:5] for row in rows] == [["1,1", "1,1"], ["2,2", "2,2"], ["3,3", "3,3"]]
    assert rows[-1][-2] == "-"
    assert "All tests: 2 windows" in out
    assert str(trained.run / "report" / "report.html") in out
    config = json.loads((trained.run / "config.json").read_text())
    assert config["stream"]["batch_size"] == 8
    assert config["model"]["items"]["dim"] == {"image": 8, "text": 16}
    assert not Path(config["dataset"]).is_absolute()


def test_training_a_finished_run_changes_nothing(trained: Place) -> None:
    before = (trained.run / "metrics.jsonl").read_bytes()
    succeed("train", trained.run)
    assert (trained.run / "metrics.jsonl").read_bytes() == before


def test_the_seed_alone_decides_the_initial_weights(prepared: Place, copy_of: Copy) -> None:
    place = copy_of(prepared)
    metrics = []
    for seed in (0, 0, 1):
        folder = place.root / f"run{len(metrics)}"
        command = train_arguments(place)
        succeed(*command[:1], folder, *command[2:], "--seed", seed, "--epochs", 1, "--warmup-epochs", 0)
        metrics.append(without_time(read_metrics(folder)))
    assert metrics[0] == metrics[1] != metrics[2]


def test_recommend_excludes_seen_items(trained: Place) -> None:
    log = pyarrow.parquet.read_table(trained.dataset / "interactions.parquet").to_pylist()
    mine = [row["item"] for row in log if row["user"] == "u7"]
    out = succeed("recommend", trained.run, "u7", "-k", "8")
    taken, recommended = (re.findall(r"\bi\d+\b", part) for part in out.split("Recommended"))
    assert taken == mine[-10:]
    assert len(recommended) == 8
    assert not set(recommended) & set(mine)
    texts = {
        row["item"]: row["text"] for row in pyarrow.parquet.read_table(trained.dataset / "items.parquet").to_pylist()
    }
    assert texts[recommended[0]] in out


def test_recommend_conditions_hidden_states(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TrainedRun.load(trained.run)
    assert found.model.items.conditioned() == found.config.modalities
    assert isinstance(found.features(), ConditionedFeatures)
    shown = succeed("recommend", trained.run, "u7")
    monkeypatch.setattr(TrainedRun, "features", lambda run: run.store)
    assert succeed("recommend", trained.run, "u7") != shown


def test_recommend_with_few_unseen_items(trained: Place) -> None:
    out = succeed("recommend", trained.run, "u7", "-k", "500")
    assert "-inf" not in out
    assert len(re.findall(r"^ +\d+ +-?\d+\.\d{3}", out, re.MULTILINE)) < 60


def test_evaluate_shows_recorded_tests(trained: Place) -> None:
    out = succeed("evaluate", trained.run)
    tests = [line for line in read_metrics(trained.run) if line["kind"] == "test"]
    assert f"{100 * tests[0]['all']['HR@10']:.2f}" in out
    assert "All tests: 2 windows" in out


def test_evaluate_on_new_interactions_equals_the_test_of_an_update(trained: Place, copy_of: Copy) -> None:
    place = copy_of(trained)
    model = (place.run / "model" / "model.safetensors").read_bytes()
    metrics = (place.run / "metrics.jsonl").read_bytes()
    out = succeed("evaluate", place.run, "--interactions", place.more)
    assert "their items are not in the store" in out
    assert (place.run / "model" / "model.safetensors").read_bytes() == model
    assert (place.run / "metrics.jsonl").read_bytes() == metrics
    last = succeed("evaluate", place.run, "--interactions", place.more, "--targets", "last")
    succeed("update", place.run, "--interactions", place.more)
    tested = [line for line in read_metrics(place.run) if line["kind"] == "test"][-1]
    assert f"{100 * tested['all']['NDCG@10']:.2f} ±" in out
    assert f"Verdict: {judge([tested]).verdict}. {judge([tested])}" in out
    assert tested["groups"]["seen"]["all"]["model"]["targets"] > tested["all"]["users"]
    for shown, targets in (
        (out, tested["groups"]["masked"]["all"]["model"]["targets"]),
        (last, tested["all"]["users"]),
    ):
        assert re.search(rf"^all, masked +{targets} ", shown, re.MULTILINE)


def test_evaluate_ranks_targets_of_new_interactions_only(trained: Place) -> None:
    assert "--targets needs --interactions" in run("evaluate", trained.run, "--targets", "last").err
    outcome = run("evaluate", trained.run, "--interactions", trained.more, "--targets", "first")
    assert (outcome.code, "targets must be one of last, all" in outcome.err) == (2, True)


def test_update_adds_users_items_and_a_window(trained: Place, copy_of: Copy) -> None:
    place = copy_of(trained)
    command = ["update", place.run, "--interactions", place.more, "--items", place.more_items]
    out = succeed(*command)
    assert "2 items encoded" in out
    metrics = read_metrics(place.run)
    assert [line["window"] for line in metrics if line["kind"] == "window"] == [0, 1, 2, 3]
    assert [line["tested_on"] for line in metrics if line["kind"] == "test"] == [1, 2, 3]
    assert metrics[-1]["interactions"] == 150
    assert (place.run / "users.txt").read_text().splitlines()[-1] == "newcomer"
    assert HiddenStateStore.open(place.store).item_ids[-2:].tolist() == ["i60", "i61"]
    assert pyarrow.parquet.read_table(place.dataset / "items.parquet")["item"].to_pylist()[-2:] == ["i60", "i61"]
    assert "newcomer" in succeed("recommend", place.run, "newcomer")

    before = (place.run / "metrics.jsonl").read_bytes()
    assert "Nothing to do" in succeed(*command)
    assert "Resuming after 4 windows." in succeed("train", place.run)
    assert (place.run / "metrics.jsonl").read_bytes() == before


def test_interrupted_update_is_resumed_with_the_same_results(
    trained: Place, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, uninterrupted = copy_of(trained), copy_of(trained)
    command = ["update", place.run, "--interactions", place.more, "--items", place.more_items]
    whole = StreamingTrainer._epoch

    def interrupted(self: StreamingTrainer, number: int, epoch: int, *rest: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        whole(self, number, epoch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(StreamingTrainer, "_epoch", interrupted)
        outcome = run(*command)
    assert outcome.code == 130
    assert outcome.err == "xsmoe: interrupted; finished work is saved, run the same command to resume\n"
    users = (place.run / "users.txt").read_bytes()
    other = place.root / "other.csv"
    other.write_text("user,item,timestamp\nstranger,i1,1800000000\nstranger,i2,1800000001\n")
    assert "training of window 3 was interrupted" in run("update", place.run, "--interactions", other).err
    assert (place.run / "users.txt").read_bytes() == users, "a refused update leaves no users behind"
    assert "run that update again" in succeed("train", place.run)
    succeed(*command)
    succeed("update", uninterrupted.run, "--interactions", place.more, "--items", uninterrupted.more_items)
    assert without_time(read_metrics(place.run)) == without_time(read_metrics(uninterrupted.run))


def test_a_run_under_the_published_protocol_is_updated_and_evaluated(prepared: Place, copy_of: Copy) -> None:
    place = copy_of(prepared)
    succeed(*train_arguments(place), "--protocol", "paper", "--epochs", 1, "--warmup-epochs", 0)
    assert "tested on" in succeed("evaluate", place.run, "--interactions", place.more)
    succeed("update", place.run, "--interactions", place.more)
    assert [line["window"] for line in read_metrics(place.run) if line["kind"] == "window"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "rows, message",
    [
        (None, "900 of 900 interactions were given to the run before"),
        (["u1,i1,1800000000"], "no training data, because no user has 5 interactions"),
    ],
)
def test_update_rejects_trained_and_unusable_interactions(
    trained: Place, copy_of: Copy, rows: list[str] | None, message: str
) -> None:
    place = copy_of(trained)
    log = place.root / "raw" / "log.csv"
    if rows is not None:
        log.write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    before = (place.run / "metrics.jsonl").read_bytes(), (place.run / "users.txt").read_bytes()
    outcome = run("update", place.run, "--interactions", log)
    assert outcome.code == 2
    assert message in outcome.err
    assert ((place.run / "metrics.jsonl").read_bytes(), (place.run / "users.txt").read_bytes()) == before


def test_dataset_and_store_may_be_moved(trained: Place, copy_of: Copy) -> None:
    place = copy_of(trained)
    moved = [place.root / "moved" / name for name in ("dataset", "store")]
    moved[0].parent.mkdir()
    place.dataset.rename(moved[0])
    place.store.rename(moved[1])
    assert run("train", place.run).code == 2
    succeed("train", place.run, "--dataset", moved[0], "--store", moved[1])
    assert "Recommended" in succeed("recommend", place.run, "u7")


def test_modality_of_an_encoded_item_that_was_added_later_is_reported(prepared: Place, copy_of: Copy) -> None:
    place = copy_of(prepared)
    items = pyarrow.parquet.read_table(place.root / "raw" / "items.parquet").to_pydict()
    (place.root / "raw" / "late.png").write_bytes((place.root / "raw" / items["image"][0]).read_bytes())
    items["image"][1] = "late.png"
    pyarrow.parquet.write_table(pyarrow.table(items), place.root / "raw" / "late.parquet")
    files = ["--interactions", place.root / "raw" / "log.csv", "--items", place.root / "raw" / "late.parquet"]
    succeed("prepare", "table", place.root / "late", *files)
    encoders = ["--text", place.root / "encoders" / "text", "--image", place.root / "encoders" / "image"]
    out = succeed("encode", place.root / "late", place.store, *encoders)
    assert "the store has 1 items without image, although the dataset has one" in out
