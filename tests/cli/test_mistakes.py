"""User errors: one line with the reason, exit code 2, no traceback."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.helpers import Place, run, train_arguments
from xsmoe.encoders import build_small_text_encoder

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such command": (["nonsense"], "No such command 'nonsense' (see `xsmoe --help`)"),
    "no such option": (["train", "{run}", "--nonsense", "1"], "--nonsense"),
    "no argument": (["recommend"], "Missing argument 'RUN' (see `xsmoe recommend --help`)"),
    "no number": (["demo", "--windows", "many"], "--windows"),
    "no run": (["report", "{root}"], "is not a run"),
    "no trained run": (["recommend", "{root}", "u1"], "is not a run"),
    "no dataset for a new run": (["train", "{root}/new"], "needs --dataset"),
    "a file for a run": (["train", "{log}", "--dataset", "{dataset}", "--store", "{store}"], "is not a folder"),
    "a file for a dataset": (["prepare", "catalogue", "{log}"], "Not a directory"),
    "no such dataset": (["train", "{root}/new", "--dataset", "{root}/none", "--store", "{store}"], "no such file"),
    "no such store": (
        ["train", "{root}/new", "--dataset", "{dataset}", "--store", "{root}/none"],
        "no hidden-state store",
    ),
    "other settings": (["train", "{run}", "--epochs", "7", "--no-prune"], "prune is True, not False"),
    "other store": (["train", "{run}", "--store", "{root}/other"], "store is"),
    "no such modality": (
        ["train", "{root}/new", "--dataset", "{dataset}", "--store", "{store}", "--modalities", "text,sound"],
        "modality 'sound' is not in the store; it has image, text",
    ),
    "no such protocol": (
        ["train", "{root}/new", "--dataset", "{dataset}", "--store", "{store}", "--protocol", "mine"],
        "protocol must be one of default, paper, not 'mine'",
    ),
    "no such device": (
        ["train", "{root}/new", "--dataset", "{dataset}", "--store", "{store}", "--device", "quantum"],
        "device must be cpu, cuda or cuda:N, not 'quantum'",
    ),
    "a precision that the device has not": (
        ["train", "{root}/new", "--dataset", "{dataset}", "--store", "{store}", "--precision", "float16"],
        "precision is 'float16', which needs CUDA, but device is 'cpu'; use --precision bfloat16",
    ),
    "one window": (
        ["train", "{root}/new", "--dataset", "{dataset}", "--store", "{store}", "--windows", "1"],
        "num_windows must be at least 2",
    ),
    "no such user": (["recommend", "{run}", "nobody"], "user 'nobody' is in no window"),
    "no items asked for": (["recommend", "{run}", "u1", "-k", "0"], "at least 1"),
    "no encoder": (["encode", "{dataset}", "{root}/new"], "no encoder is given"),
    "no such encoder": (["encode", "{dataset}", "{root}/new", "--text", "{root}/none"], "no such folder"),
    "other pooling": (
        ["encode", "{dataset}", "{store}", "--text", "{text}", "--image", "{image}", "--pooling", "cls"],
        "cls",
    ),
    "no such pooling": (["encode", "{dataset}", "{root}/new", "--text", "{text}", "--pooling", "max"], "pooling"),
    "levels that are no numbers": (
        ["encode", "{dataset}", "{root}/new", "--text", "{text}", "--levels", "a"],
        "levels",
    ),
    "no such dtype": (
        ["encode", "{dataset}", "{root}/new", "--text", "{text}", "--dtype", "int8"],
        "float16, bfloat16",
    ),
    "no movies": (["prepare", "movielens", "{root}", "{root}/new"], "movies.csv"),
    "no such column": (
        ["prepare", "table", "{root}/new", "--interactions", "{log}", "--items", "{items}", "--user-column", "who"],
        "has no column 'who'",
    ),
    "no contents": (
        ["prepare", "table", "{root}/new", "--interactions", "{log}", "--items", "{log}"],
        "has neither texts nor images",
    ),
    "a catalogue of nothing": (["prepare", "catalogue", "{root}/new", "--items", "3"], "items must be at least"),
    "no interactions to evaluate": (["evaluate", "{run}", "--interactions", "{root}/none.csv"], "no such file"),
    "no interactions to learn": (["update", "{run}", "--interactions", "{root}/none.parquet"], "no such file"),
    "a folder of something else": (["demo", "--folder", "{root}"], "has files that are not from a demo"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_error_is_one_line(mistake: str, trained: Place) -> None:
    names = {
        "root": trained.root,
        "run": trained.run,
        "dataset": trained.dataset,
        "store": trained.store,
        "text": trained.root / "encoders" / "text",
        "image": trained.root / "encoders" / "image",
        "log": trained.root / "raw" / "log.csv",
        "items": trained.root / "raw" / "items.parquet",
    }
    arguments, fragment = MISTAKES[mistake]
    outcome = run(*(argument.format(**names) for argument in arguments))
    assert outcome.code == 2
    assert outcome.err.startswith("xsmoe: error: ")
    assert outcome.err.count("\n") == 1
    assert fragment in outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    assert not (trained.root / "new").exists()


def test_update_needs_a_finished_run(prepared: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(prepared)
    assert "is not a run" in run("update", place.run, "--interactions", place.more).err


def test_update_rejects_other_contents_of_a_known_item(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    changed = place.root / "changed.csv"
    changed.write_text("item,text\ni3,something else\n")
    outcome = run("update", place.run, "--interactions", place.more, "--items", changed)
    assert outcome.code == 2
    assert "item 'i3' is known with another text" in outcome.err


def test_update_rejects_another_encoder(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    other = build_small_text_encoder(place.root / "other", ["other"], width=16, layers=2, seed=1)
    command = ["update", place.run, "--interactions", place.more, "--items", place.more_items]
    outcome = run(*command, "--text", other)
    assert outcome.code == 2
    assert "encoded with 'text'" in outcome.err


def test_damaged_config_file_is_reported(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    (place.run / "config.json").write_text("{}")
    outcome = run("train", place.run)
    assert outcome.code == 2
    assert "config.json is invalid" in outcome.err


def test_run_in_use_is_rejected(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    with open(place.run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = run("train", place.run)
    assert outcome.code == 2
    assert "in use by another process" in outcome.err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        run("--debug", "report", tmp_path)


def test_a_bug_keeps_its_traceback(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("xsmoe.cli.commands.report.write_report", broken)
    with pytest.raises(KeyError, match="a bug"):
        run("report", trained.run)


def test_train_rejects_a_changed_dataset(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    (place.run / "users.txt").write_text("somebody\n")
    outcome = run(*train_arguments(place))
    assert outcome.code == 2
    assert "has changed since the run was started" in outcome.err


def test_truncated_users_file_is_rejected(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    users = place.run / "users.txt"
    users.write_text("\n".join(users.read_text().splitlines()[:5]) + "\n")
    for command in (["update", place.run, "--interactions", place.more], ["recommend", place.run, "u7"]):
        outcome = run(*command)
        assert outcome.code == 2
        assert "has 5 users, but the run's windows have at least 30; restore it" in outcome.err


def test_damaged_metrics_are_named(trained: Place, copy_of: Callable[[Place], Place]) -> None:
    place = copy_of(trained)
    metrics = place.run / "metrics.jsonl"
    metrics.write_text("{" + metrics.read_text())
    outcome = run("report", place.run)
    assert outcome.code == 2
    assert "metrics.jsonl is damaged" in outcome.err


@pytest.mark.parametrize("width", [0, -2, 7])
def test_odd_embedding_width_is_rejected(prepared: Place, tmp_path: Path, width: int) -> None:
    stream = ["--dataset", prepared.dataset, "--store", prepared.store]
    outcome = run("train", tmp_path / "run", *stream, f"--out-dim={width}")
    assert outcome.code == 2
    assert f"out_dim must be even and at least 2, for two attention heads, not {width}" in outcome.err


@pytest.mark.parametrize(
    ("option", "needed"),
    [("--new-gate=mean", "expand"), ("--grow=novelty", "expand"), ("--prune-rule=merge", "prune")],
)
def test_growth_rule_without_growth_is_rejected(prepared: Place, tmp_path: Path, option: str, needed: str) -> None:
    stream = ["--dataset", prepared.dataset, "--store", prepared.store]
    outcome = run("train", tmp_path / "run", *stream, option)
    assert outcome.code == 2
    assert f"has no effect, because {needed} is off; add --{needed}" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake", ["--items=10", "--epochs=0", "--windows=1"])
def test_invalid_demo_settings_do_not_mark_the_folder(tmp_path: Path, mistake: str) -> None:
    outcome = run("demo", "--folder", tmp_path / "demo", mistake)
    assert outcome.code == 2
    assert not (tmp_path / "demo" / "demo.json").exists()


def test_characters_outside_the_output_encoding_are_replaced(trained: Place) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "xsmoe", "evaluate", str(trained.run)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"All tests: 2 windows" in done.stdout
