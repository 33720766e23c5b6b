"""Helpers that run commands in this process, and small raw data for them."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

from xsmoe.cli import app

WORDS = ["red", "green", "blue", "small", "large", "round", "square", "soft", "hard", "old", "new", "fine"]
NUM_ITEMS, NUM_USERS, NUM_INTERACTIONS = 60, 30, 900
TRAIN = {"windows": 3, "epochs": 3, "warmup-epochs": 1, "batch-size": 8, "rank": 4, "out-dim": 8}


@dataclass(frozen=True)
class Outcome:
    """Result of a command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> Outcome:
    """Run `xsmoe` with these arguments in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    """Run a command, require success, and return its standard output."""
    outcome = run(*arguments)
    assert outcome.code == 0, outcome
    return outcome.out


@dataclass(frozen=True)
class Place:
    """Paths of a dataset, a store, a run and raw data."""

    root: Path

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def more(self) -> Path:
        """Later interactions, with a new user and a new item."""
        return self.root / "more.csv"

    @property
    def more_items(self) -> Path:
        return self.root / "raw" / "more_items.parquet"


def write_log(path: Path, users: np.ndarray, items: np.ndarray, start: int) -> None:
    """Write interactions to a CSV file."""
    times = start + np.arange(len(users)) * 60
    pyarrow.csv.write_csv(pa.table({"user": users, "item": items, "timestamp": times}), path)


def write_items(path: Path, numbers: range, rng: np.random.Generator) -> None:
    """Write items to a Parquet file, and images of every other item next to it."""
    texts = [" ".join(rng.choice(WORDS, 3)) for _ in numbers]
    images = [f"pictures/{number}.png" if number % 2 == 0 else None for number in numbers]
    (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
    for image in filter(None, images):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path.parent / image)
    ids = [f"i{number}" for number in numbers]
    pyarrow.parquet.write_table(pa.table({"item": ids, "text": texts, "image": images}), path)


def train_arguments(place: Place) -> list[object]:
    """Return the arguments of the command that trains the run."""
    stream = ["--dataset", place.dataset, "--store", place.store, "--missing", "zero", "--expand", "--prune"]
    return ["train", place.run, *stream, *(f"--{name}={value}" for name, value in TRAIN.items())]
