"""Batches that are built ahead of their step, and what a batch is."""

import threading
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from xsmoe.data import Sequences
from xsmoe.nn import Batch
from xsmoe.stream import batches
from xsmoe.stream.batches import StepInput, built_ahead, feed
from xsmoe.stream.precision import hidden_dtype

CPU = torch.device("cpu")


def sequences() -> Sequences:
    lengths = np.array([2, 5, 3])
    items = np.array([4, 4, 1, 0, 1, 2, 3, 6, 7, 4])
    return Sequences(np.arange(3), items, np.concatenate([[0], np.cumsum(lengths)]))


def build(users: np.ndarray, dtype: torch.dtype = torch.float32) -> StepInput:
    log_share = np.log(np.arange(1, tiny.NUM_ITEMS + 1) / 100)
    return StepInput.build(tiny.features(), tuple(tiny.DIMS), sequences().take(users), log_share, dtype)


def test_a_step_gets_the_hidden_states_of_its_distinct_items() -> None:
    given = build(np.array([0, 2]))
    assert given.batch.items.tolist() == [4, 6, 7]
    expected = tiny.features().hidden(given.batch.items.numpy())
    for name, levels in expected.items():
        for mine, level in zip(given.hidden[name], levels, strict=True):
            assert torch.equal(mine, level)


def test_hidden_states_come_in_the_dtype_asked_for() -> None:
    given = build(np.array([1]), torch.bfloat16)
    assert {level.dtype for levels in given.hidden.values() for level in levels} == {torch.bfloat16}


def test_lengths_are_those_of_the_offsets() -> None:
    batch = build(np.array([2, 0, 1])).batch
    assert batch.lengths == tuple(batch.offsets.diff().tolist()) == (2, 1, 4)
    assert batch.num_padding(11) == 3 * 10 - 7


def test_moving_a_batch_keeps_what_it_holds() -> None:
    given = build(np.array([0, 1]))
    moved = given.to(CPU)
    for field in fields(Batch):
        mine, theirs = getattr(given.batch, field.name), getattr(moved.batch, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert moved.hidden.keys() == given.hidden.keys()


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_building_ahead_keeps_the_order(ahead: int) -> None:
    chosen = [np.array([place]) for place in (2, 0, 1, 0, 2)]
    expected = [build(users).batch.targets.tolist() for users in chosen]
    assert [given.batch.targets.tolist() for given in built_ahead(build, chosen, ahead)] == expected


def test_the_next_batches_are_built_while_one_is_used() -> None:
    built, others = [], threading.Event()

    def note(users: np.ndarray) -> StepInput:
        built.append((int(users[0]), threading.current_thread() is threading.main_thread()))
        if len(built) == 3:
            others.set()
        return build(users)

    steps = built_ahead(note, [np.array([place]) for place in (0, 1, 2, 0)], ahead=2)
    next(steps)
    assert others.wait(timeout=30)
    steps.close()
    assert built[:3] == [(0, False), (1, False), (2, False)]


def test_what_goes_wrong_in_the_thread_is_raised_by_the_step_it_was_for() -> None:
    def fail(users: np.ndarray) -> StepInput:
        if users[0] == 1:
            raise ValueError("bad batch")
        return build(users)

    steps = built_ahead(fail, [np.array([place]) for place in (0, 1, 2)])
    next(steps)
    with pytest.raises(ValueError, match="bad batch"):
        next(steps)


def test_on_the_cpu_a_batch_is_built_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "built_ahead", None)
    built = []

    def note(users: np.ndarray) -> StepInput:
        built.append(users)
        return build(users)

    steps = feed(note, [np.array([0]), np.array([1])], CPU)
    next(steps)
    assert len(built) == 1


def test_for_cuda_batches_are_pinned_in_the_thread_and_moved_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, bool]] = []

    def note(what: str) -> None:
        done.append((what, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(StepInput, "pin", lambda given: note("pinned") or given)
    monkeypatch.setattr(StepInput, "to", lambda given, device: note(f"moved to {device}") or given)
    chosen = [np.array([place]) for place in (2, 0, 1, 2)]
    found = [given.batch.targets.tolist() for given in feed(build, chosen, torch.device("cuda"))]
    assert found == [build(users).batch.targets.tolist() for users in chosen]
    assert sorted(set(done)) == [("moved to cuda", True), ("pinned", False)]
    assert len(done) == 2 * len(chosen)


@pytest.mark.parametrize(
    ("device", "precision", "top_k", "expected"),
    [
        ("cpu", "auto", None, torch.float32),
        ("cpu", "bfloat16", None, torch.bfloat16),
        ("cpu", "bfloat16", 1, torch.float32),
        ("cuda", "auto", None, torch.bfloat16),
        ("cuda", "float32", None, torch.float32),
    ],
)
def test_hidden_states_come_in_what_the_step_would_cast_them_to(
    device: str, precision: Any, top_k: int | None, expected: torch.dtype
) -> None:
    config = tiny.config(device=device, precision=precision)
    assert hidden_dtype(tiny.model(top_k=top_k), config) == expected
