"""Runs with all optional features: a run that is killed at any time is resumed with the same results."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.stream import tiny
from xsmoe.encoders import HiddenStateStore, InMemoryFeatures, ItemFeatures, ModalitySpec
from xsmoe.nn import Recommender
from xsmoe.stream import Stream, StreamConfig, StreamingTrainer, growth
from xsmoe.stream.state.run_folder import read_metrics

WINDOWS = tiny.windows(3, users=10)
KNOWN = int(max(window.items.max() for window in WINDOWS[:2])) + 1
"""Items of the dataset; those of the last window that come on top arrive by an update."""


def source() -> InMemoryFeatures:
    """Return hidden states with a shared lowest level. The first items lack a modality that later items have."""
    generator = torch.Generator().manual_seed(0)
    levels = {}
    for name, dim in tiny.DIMS.items():
        rows = [5 + torch.randn(size, dim, generator=generator) for size in (1, tiny.NUM_ITEMS, tiny.NUM_ITEMS)]
        levels[name] = [row.to(torch.bfloat16 if name == "text" else torch.float16) for row in rows]
    items = np.arange(tiny.NUM_ITEMS)
    return InMemoryFeatures(levels, {"text": items % 5 != 3, "image": items > 20})


def append(store: HiddenStateStore, given: ItemFeatures, rows: np.ndarray) -> None:
    hidden = {name: given.hidden(rows, [name], dtype=given.dtypes[name])[name] for name in store.modalities}
    present = {name: given.present(name)[rows] for name in store.modalities}
    store.append([f"item {row}" for row in rows], hidden, present, allow_bare=True)


def settings(**options: Any) -> StreamConfig:
    given = {"history": "all", "keep": "ema", "epochs": 2, "min_steps": 2, "batch_size": 40, "id_dropout": 0.25}
    given |= {"new_gate": "copy", "prune_rule": "merge", "prune_threshold": 0.6, "patience": None}
    return tiny.config(**given | options)


class Run:
    """A run on two windows, updated with a third window that has new items."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.config = folder, settings(**options)

    def store(self) -> HiddenStateStore:
        path = self.folder / "store"
        if path.exists():
            return HiddenStateStore.open(path)
        given = source()
        specs = {name: ModalitySpec(dim, (0, 1, 2), given.dtypes[name]) for name, dim in tiny.DIMS.items()}
        store = HiddenStateStore.create(path, specs)
        append(store, given, np.arange(KNOWN))
        return store

    def go_on(self, listener: Callable[[str, dict[str, Any]], None] | None = None) -> Recommender:
        """Do all remaining work, like `xsmoe train` and `xsmoe update`."""
        store = self.store()
        with self.trainer(Stream(WINDOWS[:2], store), listener) as trainer:
            if trainer.windows_done < 2:
                trainer.fit()
        if store.num_items == KNOWN:
            append(store, source(), np.arange(KNOWN, tiny.NUM_ITEMS))
            store = HiddenStateStore.open(self.folder / "store")
        with self.trainer(Stream([], store), listener) as trainer:
            if trainer.windows_done < 3:
                trainer.step(WINDOWS[2])
            return trainer.model

    def trainer(self, stream: Stream, listener: Callable[[str, dict[str, Any]], None] | None) -> StreamingTrainer:
        model = tiny.model(condition="whiten", ids=True)
        return StreamingTrainer(model, stream, self.config, folder=self.folder / "run", listener=listener)

    def result(self) -> list[dict[str, Any]]:
        return tiny.without_time(read_metrics(self.folder / "run"))


def moments(run: Run, copies: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Recommender, list[Path]]:
    """Do a run, and return its model and a copy of its folder after every change of a file."""
    taken: list[Path] = []
    before: list[Any] = []

    def take(*_: Any) -> None:
        files = sorted(path for path in run.folder.rglob("*") if path.is_file())
        now = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if now != before:
            before[:] = now
            taken.append(Path(shutil.copytree(run.folder, copies / f"{len(taken):03d}")))

    run.store()
    replace = os.replace

    def replaced(*arguments: Any) -> None:
        replace(*arguments)
        take()

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        model = run.go_on(take)
    return model, taken


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "slow, options",
    [
        (False, {"keep": "ema", "store_gib": 0}),
        pytest.param(True, {"keep": "ema", "store_gib": 0}, marks=SLOW),
        pytest.param(True, {"keep": "last", "grow": "novelty"}, marks=SLOW),
        pytest.param(True, {"keep": "best", "new_gate": "random", "prune_rule": "drop"}, marks=SLOW),
    ],
)
def test_run_killed_at_any_time_has_the_same_results(
    slow: bool, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth copy is tested, and every copy in the slow variant."""
    # With metrics of so few users, every window is novel.
    monkeypatch.setattr(growth, "NOVELTY_ERRORS", -100.0)
    run = Run(tmp_path / "uninterrupted", **options)
    model, taken = moments(run, tmp_path / "copies", monkeypatch)
    expected, weights = run.result(), model.state_dict()
    assert model.items.conditioned() == ("image", "text")
    assert expected[0]["kind"] == "epoch"
    grown = [line for line in expected if line["kind"] == "test"]
    assert any(line["expanded"] for line in grown)
    assert any(any(line["pruned"].values()) for line in grown)
    assert len(taken) > 25
    for folder in taken if slow else taken[::4]:
        again = Run(folder, **options)
        found = again.go_on().state_dict()
        assert again.result() == expected, folder.name
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(value, found[name]), (folder.name, name)
        exported = Recommender.from_pretrained(folder / "run" / "model").state_dict()
        assert all(torch.equal(value, exported[name]) for name, value in weights.items())
