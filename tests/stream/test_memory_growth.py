"""Memory does not grow from epoch to epoch, and from window to window only by new experts."""

import gc
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.stream import tiny
from xsmoe.stream import Stream, StreamingTrainer, epoch

WINDOWS, EPOCHS = 4, 4


def living() -> tuple[int, int]:
    """Return the number of live tensors, and the bytes of their storages."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in tensors}
    return len(tensors), sum(storages.values())


@pytest.fixture(autouse=True)
def nothing_but_this_test() -> Iterator[None]:
    """Exclude all existing objects from garbage collection, because scanning them is slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def counted(listener: Any = None, **options: Any) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Count live tensors after each epoch and each window, by event, window and epoch."""
    found: dict[tuple[str, int, int], tuple[int, int]] = {}

    def listen(event: str, fields: dict[str, Any]) -> None:
        if listener is not None:
            listener(event, fields)
        if event in ("epoch", "window"):
            found[event, fields["window"], fields.get("epoch", -1)] = living()

    config = tiny.config(epochs=EPOCHS, warmup_epochs=0, patience=EPOCHS, **options)
    stream = Stream(tiny.windows(WINDOWS), tiny.features())
    StreamingTrainer(tiny.model(), stream, config, listener=listen).fit()
    return found


def growth(found: dict[tuple[str, int, int], tuple[int, int]]) -> list[str]:
    """Return the points with more live tensors than one step earlier, from the second epoch and window on."""
    grown = []
    for (event, window, number), value in found.items():
        before = found.get((event, window, number - 1) if event == "epoch" else (event, window - 1, number))
        settled = number >= 2 if event == "epoch" else window >= 2
        if settled and before is not None and (value[0] > before[0] or value[1] > before[1]):
            grown.append(f"{event} {window} {number}: {before} to {value}")
    return grown


@pytest.fixture
def leaking(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a step that keeps its loss, with its autograd graph, in a list."""
    kept: list[torch.Tensor] = []
    real = epoch.train_step

    def step(*arguments: Any) -> torch.Tensor:
        kept.append(real(*arguments))
        return kept[-1]

    monkeypatch.setattr(epoch, "train_step", step)
    return kept


def test_without_expansion_neither_tensors_nor_bytes_grow() -> None:
    found = counted(expand=False, prune=False)
    assert len(found) == WINDOWS * (EPOCHS + 1)
    assert growth(found) == []
    # Every window ends with the same count.
    assert len({value for (event, window, _), value in found.items() if event == "window" and window >= 1}) == 1


def test_with_expansion_only_experts_grow() -> None:
    found = counted(prune=False)
    epochs = {key: value for key, value in found.items() if key[0] == "epoch"}
    assert growth(epochs) == []
    ends = [value for (event, window, _), value in found.items() if event == "window" and window >= 1]
    assert len({count for count, _ in ends}) == 1
    # A new expert adds a gate row, 2 matrices of rank 2, and prepacked weights of frozen experts in each window.
    experts = sum(2 * 4 * (dim + 2 * 2 * dim) for dim in tiny.DIMS.values())
    steps = [after[1] - before[1] for before, after in pairwise(ends)]
    assert all(0 < step <= 8 * experts for step in steps), (steps, experts)


def test_leak_between_steps_is_detected(leaking: list[torch.Tensor]) -> None:
    assert growth(counted(expand=False, prune=False))
    assert leaking


def test_leak_between_windows_is_detected() -> None:
    kept = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        if event == "begin":
            kept.append(torch.zeros(10))

    grown = growth(counted(listener, expand=False, prune=False))
    assert grown
    assert all(line.startswith("window") for line in grown)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_allocated_memory_does_not_grow_between_epochs() -> None:
    held: dict[int, list[int]] = {}

    def listen(event: str, fields: dict[str, Any]) -> None:
        if event == "epoch":
            gc.collect()
            torch.cuda.synchronize()
            held.setdefault(fields["window"], []).append(torch.cuda.memory_allocated())

    config = tiny.config(epochs=EPOCHS, warmup_epochs=0, patience=EPOCHS, expand=False, prune=False, device="cuda")
    StreamingTrainer(tiny.model(), tiny.stream(), config, listener=listen).fit()
    for readings in held.values():
        assert max(readings[2:]) <= readings[1]
