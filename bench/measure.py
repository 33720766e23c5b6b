"""Time: interleaved rounds of all variants, of which medians and paired ratios are taken."""

import functools
import gc
import math
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

SAY_SECONDS = 0.5
"""How seldom short tasks are told: a terminal that draws takes its time from what is timed."""

FEWEST_ROUNDS = 5
FEWEST_LONG_ROUNDS = 3


class Quantiles(NamedTuple):
    """The median, and the 10th and 90th of a hundred."""

    median: float
    p10: float
    p90: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Quantiles of at least one value."""
    return Quantiles(*(float(q) for q in np.quantile(np.asarray(values, dtype=np.float64), (0.5, 0.1, 0.9))))


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> Quantiles:
    """How many times faster than theirs my rounds are, each beside the one that ran next to it."""
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
        """Ends a lap and starts the next."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def laps(self) -> tuple[float, ...]:
        """Seconds of each lap so far; waits for the device."""
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return tuple(first.elapsed_time(last) / 1e3 for first, last in pairs)
        return tuple(last - first for first, last in zip(self._times, self._times[1:], strict=False))


def flusher(device: torch.device) -> Callable[[], None]:
    """Empties a GPU's second-level cache, where a variant would find what it just copied; nothing for a CPU."""
    if device.type != "cuda":
        return lambda: None
    scratch = _scratch(device)

    def flush() -> None:
        scratch.zero_()

    return flush


def announced(tasks: Mapping[str, Task], say: Say) -> Callable[[str, int, str], tuple[float, ...]]:
    """Runs a task by its name and turn, and says a text ahead of it: if it takes long always, else seldom."""
    last, took = -math.inf, dict.fromkeys(tasks, math.inf)

    def run(name: str, turn: int, text: str) -> tuple[float, ...]:
        nonlocal last
        begin = time.monotonic()
        if took[name] >= SAY_SECONDS or begin - last >= SAY_SECONDS:
            say(text)
            last = begin
        laps = tasks[name](turn)
        took[name] = time.monotonic() - begin
        return laps

    return run


@functools.cache
def _scratch(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)


def interleave(
    tasks: Mapping[str, Task],
    *,
    seconds: float,
    most_rounds: int = 200,
    warm_up: int = 1,
    seed: int = 0,
    say: Say = lambda _: None,
) -> Samples:
    """Runs every task once a round, in an order drawn anew each time, so that what disturbs one disturbs all.

    Args:
        tasks: by name, from the round's number to the seconds of its laps.
        seconds: when this much time has passed, no further round begins; but there are at least `FEWEST_ROUNDS`, or
            `FEWEST_LONG_ROUNDS` where even that takes twice this time.
        most_rounds: the largest number of rounds.
        warm_up: rounds ahead of these that are not counted.
        seed: for the order.
        say: told what runs next, between what is timed.

    Returns:
        For each task the laps of each round, all of the same number of rounds.
    """
    samples: Samples = {name: [] for name in tasks}
    run = announced(tasks, say)
    order, shuffle = list(tasks), random.Random(seed).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(warm_up):
            for name in order:
                run(name, turn, f"warming up {name}, {turn + 1} of {warm_up}")
        begin = time.perf_counter()
        for turn in range(most_rounds):
            passed = time.perf_counter() - begin
            if (turn >= FEWEST_ROUNDS and passed > seconds) or (turn >= FEWEST_LONG_ROUNDS and passed > 2 * seconds):
                break
            shuffle(order)
            for name in order:
                text = f"timing {name}, round {turn + 1}, {passed:.0f} of {seconds:g} s"
                samples[name].append(run(name, warm_up + turn, text))
    finally:
        if collecting:
            gc.enable()
    return samples
