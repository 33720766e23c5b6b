"""Inputs that are made and copied ahead of their step."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from tests.stream import tiny
from tests.stream.tiny import needs_gpu
from xsmoe.stream.batches import prefetch as prefetching
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.batches.prefetch import HiddenStates, map_ahead, prefetch
from xsmoe.stream.cuda import streams

CPU = torch.device("cpu")


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_prefetch_keeps_the_order(ahead: int) -> None:
    chosen = [np.array([place]) for place in (2, 0, 1, 0, 2)]
    expected = [tiny.step_input(users).batch.targets.tolist() for users in chosen]
    assert [given.batch.targets.tolist() for given in map_ahead(tiny.step_input, chosen, ahead)] == expected


def test_next_batches_are_built_while_one_is_used() -> None:
    built, others = [], threading.Event()

    def note(users: np.ndarray) -> StepInput:
        built.append((int(users[0]), threading.current_thread() is threading.main_thread()))
        if len(built) == 3:
            others.set()
        return tiny.step_input(users)

    steps = map_ahead(note, [np.array([place]) for place in (0, 1, 2, 0)], ahead=2)
    next(steps)
    assert others.wait(timeout=30)
    steps.close()
    assert built[:3] == [(0, False), (1, False), (2, False)]


def test_error_in_the_thread_is_raised_at_its_step() -> None:
    def fail(users: np.ndarray) -> StepInput:
        if users[0] == 1:
            raise ValueError("bad batch")
        return tiny.step_input(users)

    steps = map_ahead(fail, [np.array([place]) for place in (0, 1, 2)])
    next(steps)
    with pytest.raises(ValueError, match="bad batch"):
        next(steps)


def test_on_the_cpu_a_batch_is_built_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "map_ahead", None)
    built = []

    def note(users: np.ndarray) -> StepInput:
        built.append(users)
        return tiny.step_input(users)

    steps = prefetch(note, [np.array([0]), np.array([1])], CPU)
    next(steps)
    assert len(built) == 1


class FakeCopyStream:
    """A stream for copies on a machine that has none: notes what happens to it, and in which thread."""

    done: ClassVar[list[tuple[str, bool]]] = []

    def __init__(self, device: torch.device) -> None:
        self.done.clear()

    def note(self, what: str) -> None:
        self.done.append((what, threading.current_thread() is threading.main_thread()))

    def send(self, given: StepInput) -> StepInput:
        self.note("sent")
        return given

    def receive(self, given: StepInput) -> StepInput:
        self.note("received")
        return given


def test_thread_sends_cuda_inputs_and_step_receives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "CopyStream", FakeCopyStream)
    chosen = [np.array([place]) for place in (2, 0, 1, 2)]
    found = [given.batch.targets.tolist() for given in prefetch(tiny.step_input, chosen, torch.device("cuda"))]
    assert found == [tiny.step_input(users).batch.targets.tolist() for users in chosen]
    assert sorted(set(FakeCopyStream.done)) == [("received", True), ("sent", False)]
    assert len(FakeCopyStream.done) == 2 * len(chosen)


@needs_gpu
@pytest.mark.parametrize("capacity", [None, Capacity(2, 6)])
def test_on_a_gpu_inputs_arrive_complete_and_in_order(capacity: Capacity | None) -> None:
    chosen = [np.array([place % 3, (place + 1) % 3]) for place in range(40)]

    def build(users: np.ndarray) -> StepInput:
        return tiny.step_input(users, capacity=capacity)

    for users, given in zip(chosen, prefetch(build, chosen, torch.device("cuda")), strict=True):
        # Steps that are slower than copies must find what was theirs.
        torch.cuda._sleep(1_000_000)
        for mine, expected in zip(given.tensors(), build(users).pin().tensors(), strict=True):
            assert mine.is_cuda
            assert torch.equal(mine.cpu(), expected)


@needs_gpu
def test_on_a_gpu_the_host_does_not_run_far_ahead() -> None:
    device, size = torch.device("cuda"), 1 << 22

    def build(users: np.ndarray) -> StepInput:
        given = tiny.step_input(users)
        return replace(given, hidden=HiddenStates({"text": [torch.zeros(size // 4)]}))

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in prefetch(build, [np.array([0])] * 60, device):
        torch.cuda._sleep(10_000_000)
    torch.cuda.synchronize()
    held = (torch.cuda.max_memory_allocated() - before) / size
    assert held < prefetching.IN_FLIGHT + 2 * prefetching.AHEAD + 3


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch's pool of streams on a machine that has none: what it gives out next."""
    given: list[int] = []

    def stream(device: torch.device) -> SimpleNamespace:
        assert device.index is not None
        return SimpleNamespace(cuda_stream=given.pop(0), device=device)

    monkeypatch.setattr(streams, "_streams", {})
    monkeypatch.setattr(streams, "_leased", {})
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return given


def test_every_purpose_has_a_separate_stream(pool: list[int]) -> None:
    pool += [7, 7, 8, 7]
    # The same GPU by two names.
    copies = streams.stream_for("copies", torch.device("cuda"))
    assert streams.stream_for("others", torch.device("cuda", 0)).cuda_stream == 8
    assert streams.stream_for("copies", torch.device("cuda", 0)) is copies
    assert streams.stream_for("copies", torch.device("cuda", 1)).cuda_stream == 7


def test_a_stream_is_leased_to_one_owner_at_a_time(pool: list[int]) -> None:
    class Owner:
        pass

    pool += [7, 7, 8, 7, 8, 9, 7]
    device = torch.device("cuda", 0)
    streams.stream_for("copies", device)
    first, second = Owner(), Owner()
    assert streams.lease(first, device).cuda_stream == 8
    assert streams.lease(second, device).cuda_stream == 9
    del first
    # It is free again, and torch is not asked for another.
    assert streams.lease(Owner(), device).cuda_stream == 8
    assert pool == [7]


def test_pool_without_a_free_stream_returns_a_used_one(pool: list[int]) -> None:
    pool += [7] * 200
    owners = [threading.Event(), threading.Event()]
    assert [streams.lease(owner, torch.device("cuda", 0)).cuda_stream for owner in owners] == [7, 7]
