"""A killed training is resumed by the same command, with the same results."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.helpers import Place, succeed, train_arguments
from tests.movielens import movielens_folder
from xsmoe.stream.state.run_folder import read_metrics

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "xsmoe", *map(str, arguments)]


def train(place: Place) -> list[str]:
    return command(*train_arguments(place), "--epochs", "8")


def kill_after(training: list[str], run: Path, epochs: int) -> None:
    """Start a training, and kill it when the given number of epochs is recorded."""
    process = subprocess.Popen(training, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b'"kind": "epoch"') < epochs:
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def lines(run: Path) -> list[dict[str, object]]:
    return [{name: value for name, value in line.items() if name != "time"} for line in read_metrics(run)]


def test_killed_and_restarted_run_has_the_same_metrics(prepared: Place, copy_of: Callable[[Place], Place]) -> None:
    uninterrupted, killed = copy_of(prepared), copy_of(prepared)
    subprocess.run(train(uninterrupted), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    kill_after(train(killed), killed.run, epochs=6)
    assert not (killed.run / "report" / "report.html").exists()
    done = subprocess.run(train(killed), env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert "Resuming after" in done.stdout
    assert done.stderr == ""
    assert lines(killed.run) == lines(uninterrupted.run)

    # The interrupted epoch has no event.
    events = EventAccumulator(str(killed.run / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    recorded = [line for line in lines(killed.run) if line["kind"] == "epoch"]
    assert [event.step for event in losses] == list(range(len(recorded)))


def often_rated(source: Path, target: Path) -> Path:
    """Return MovieLens with films of 20 ratings or more, an eighth of all, because encoding needs most of the time."""
    target.mkdir()
    rows = {}
    for name in ("movies.csv", "ratings.csv"):
        with open(source / name, newline="") as file:
            rows[name] = list(csv.DictReader(file))
    counts = Counter(row["movieId"] for row in rows["ratings.csv"])
    for name, all_rows in rows.items():
        with open(target / name, "w", newline="") as file:
            writer = csv.DictWriter(file, all_rows[0])
            writer.writeheader()
            writer.writerows(row for row in all_rows if counts[row["movieId"]] >= 20)
    return target


def test_movielens_through_all_windows_with_a_pretrained_encoder(tmp_path: Path) -> None:
    dataset, store = tmp_path / "dataset", tmp_path / "store"
    succeed("prepare", "movielens", often_rated(movielens_folder(), tmp_path / "movielens"), dataset)
    succeed("encode", dataset, store, "--text", "minilm", "--levels", "0,1,2", "--max-tokens", "16")
    settings = ["--dataset", dataset, "--store", store, "--batch-size", 32, "--epochs", 2, "--warmup-epochs", 1]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    subprocess.run(command("train", uninterrupted, *settings), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    kill_after(command("train", killed, *settings), killed, epochs=11)
    subprocess.run(command("train", killed, *settings), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    assert lines(killed) == lines(uninterrupted)
    kinds = [line["kind"] for line in lines(uninterrupted)]
    assert (kinds.count("window"), kinds.count("test")) == (10, 9)
