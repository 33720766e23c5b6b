"""Times from interleaved rounds of all variants: medians and paired ratios."""

import functools
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

Task = Callable[[int], tuple[float, ...]]
Samples = dict[str, list[tuple[float, ...]]]
Say = Callable[[str], None]

# More than the second-level cache of any GPU.
FLUSHED_BYTES = 256 << 20

MIN_ROUNDS = 5
MIN_LONG_ROUNDS = 3


class Quantiles(NamedTuple):
    """The median and the 10th and 90th percentiles."""

    median: float
    p10: float
    p90: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Return quantiles of at least one value."""
    return Quantiles(*(float(q) for q in np.quantile(np.asarray(values, dtype=np.float64), (0.5, 0.1, 0.9))))


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> Quantiles:
    """Return the speed-up of my rounds over theirs. Each ratio is of two runs in the same round."""
    return quantiles([other / own for own, other in zip(mine, theirs, strict=True)])


class Stopwatch:
    """Laps between marks, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        if self._cuda:
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        """End a lap and start the next."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def laps(self) -> tuple[float, ...]:
        """Return the seconds of each lap. It waits for the device."""
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return tuple(first.elapsed_time(last) / 1e3 for first, last in pairs)
        return tuple(last - first for first, last in zip(self._times, self._times[1:], strict=False))


def flusher(device: torch.device) -> Callable[[], None]:
    """Return a function that evicts a GPU's second-level cache. It does nothing on a CPU.

    Otherwise a variant would find in the cache what it has just copied.
    """
    if device.type != "cuda":
        return lambda: None
    scratch = _scratch(device)

    def flush() -> None:
        scratch.zero_()

    return flush


@functools.cache
def _scratch(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)


def interleave(
    tasks: Mapping[str, Task],
    *,
    seconds: float,
    max_rounds: int = 200,
    warm_up: int = 1,
    seed: int = 0,
    say: Say = lambda _: None,
) -> Samples:
    """Run every task once per round, in a new random order, so that a disturbance affects all tasks.

    Args:
        tasks: by name; a task gets the round's number and returns the seconds of its laps.
        seconds: no round begins after this time, except for the first `MIN_ROUNDS`, or the first `MIN_LONG_ROUNDS`
            if `MIN_ROUNDS` need twice this time.
        max_rounds: the largest number of rounds.
        warm_up: rounds before these that are not counted.
        seed: of the order.
        say: called with the progress, before each round.

    Returns:
        For each task the laps of each round. All tasks have the same number of rounds.
    """
    samples: Samples = {name: [] for name in tasks}
    order, shuffle = list(tasks), random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up):
            for name in order:
                say(f"warming up {name}, {turn + 1} of {warm_up}")
                tasks[name](turn)
        begin = time.perf_counter()
        for turn in range(max_rounds):
            passed = time.perf_counter() - begin
            if (turn >= MIN_ROUNDS and passed > seconds) or (turn >= MIN_LONG_ROUNDS and passed > 2 * seconds):
                break
            say(f"timing round {turn + 1}, {passed:.0f} of {seconds:g} s")
            shuffle(order)
            for name in order:
                samples[name].append(tasks[name](warm_up + turn))
    finally:
        if collecting:
            gc.enable()
    return samples
