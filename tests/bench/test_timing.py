"""Rounds are interleaved and limited; saved activations are counted once."""

import gc

import pytest
import torch

from bench.core.memory import count_saved
from bench.core.timing import MIN_LONG_ROUNDS, MIN_ROUNDS, Stopwatch, interleave, quantiles


def test_every_round_runs_every_task_with_its_own_number() -> None:
    turns: dict[str, list[int]] = {"a": [], "b": []}

    def task(name: str, turn: int) -> tuple[float, ...]:
        assert not gc.isenabled()
        turns[name].append(turn)
        return (float(turn),)

    samples = interleave({name: lambda turn, name=name: task(name, turn) for name in turns}, seconds=9, max_rounds=7)
    assert turns["a"] == turns["b"] == [0, *range(1, 8)]
    assert samples["a"] == [(float(turn),) for turn in range(1, 8)]
    assert gc.isenabled()


def test_time_bounds_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def task(_: int) -> tuple[float, ...]:
        nonlocal now
        now += cost
        return (cost,)

    for cost, rounds in ((0.1, 11), (0.3, MIN_ROUNDS), (1.0, MIN_LONG_ROUNDS)):
        found = len(interleave({"a": task}, seconds=1.0)["a"])
        assert found == rounds, cost


def test_progress_is_reported_before_each_round() -> None:
    said: list[str] = []
    interleave({"a": lambda _: (0.1,), "b": lambda _: (0.1,)}, seconds=11.0, max_rounds=2, say=said.append)
    assert said == [
        "warming up a, 1 of 1",
        "warming up b, 1 of 1",
        "timing round 1, 0 of 11 s",
        "timing round 2, 0 of 11 s",
    ]


def test_garbage_collection_continues_after_an_error() -> None:
    def fails(_: int) -> tuple[float, ...]:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interleave({"a": fails}, seconds=1)
    assert gc.isenabled()


def test_quantiles_and_laps() -> None:
    assert quantiles([float(value) for value in range(11)]) == (5.0, 1.0, 9.0)
    watch = Stopwatch(torch.device("cpu"))
    watch.mark()
    watch.mark()
    assert len(watch.laps()) == 2
    assert min(watch.laps()) >= 0


def test_saved_bytes_leave_out_inputs_and_count_a_storage_once() -> None:
    x = torch.randn(100, 8, requires_grad=True)
    weight = torch.randn(8, 8)
    with count_saved([x, weight]) as saved:
        hidden = x @ weight.T  # saves the weight alone, a view of what is owned
    assert saved.bytes == 0
    with count_saved([x, weight]) as saved:
        grown = hidden.exp()  # saves its result
        y = grown * grown  # saves it twice more
    assert saved.bytes == 100 * 8 * 4
    y.sum().backward()
    assert x.grad is not None


def test_saved_bytes_count_whole_storages() -> None:
    x = torch.randn(10, 8, requires_grad=True)
    with count_saved([x]) as saved:
        _ = (x * 2)[:1].sin()
    assert saved.bytes == 10 * 8 * 4
