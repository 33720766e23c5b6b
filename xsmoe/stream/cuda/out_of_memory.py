"""Error messages with remedies for out-of-memory errors in training, evaluation and caching."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from xsmoe.out_of_memory import allocated, is_out_of_memory, requested, short_message
from xsmoe.stream.config import StreamConfig

GIB = 1 << 30
USABLE_FRACTION = 0.9
"""Fraction of the available memory that an estimate may use."""


class OutOfMemory(ValueError):
    """A device ran out of memory. The message says what did not fit, what would fit, and which settings to change."""


@contextmanager
def explain_placement_oom(config: StreamConfig) -> Iterator[None]:
    """Convert out-of-memory errors of caching hidden states on the device into `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        allowed = "its default" if config.store_gib is None else config.store_gib
        raise OutOfMemory(
            f"the items' hidden states do not fit into the memory of {config.device} ({short_message(error)}), "
            f"although --store-gib (here {allowed}) allows their size; use --store-gib 0, which keeps them "
            f"{_uncached_location(config)}. {_RESUME}"
        ) from error


class MemoryUse(NamedTuple):
    """Memory of a device at an out-of-memory error, in bytes.

    Attributes:
        held: allocated before the first step.
        required: minimum that the step needed.
        available: upper limit for this process.
    """

    held: int
    required: int
    available: int


@contextmanager
def explain_training_oom(config: StreamConfig, where: str, *, sequences: int, cached: bool) -> Iterator[None]:
    """Convert out-of-memory errors of training steps into `OutOfMemory`.

    Args:
        config: settings of the run.
        where: the window and the epoch, for the message.
        sequences: number of sequences of the largest step.
        cached: whether the items' hidden states are cached on the device.
    """
    device = torch.device(config.device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        use = None
        if device.type == "cuda":
            # The peak covers the whole run so far. It is used only if torch does not report the allocated memory.
            in_use = allocated(error)
            in_use = torch.cuda.max_memory_allocated(device) if in_use is None else in_use
            # Memory that this process has reserved can be used for other tensors; memory of other processes cannot.
            available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            use = MemoryUse(held, in_use + requested(error), available)
        raise OutOfMemory(
            f"{where}: a training step of {sequences} sequences does not fit into the memory of {config.device} "
            f"({short_message(error)}). {advice(config, use, sequences=sequences, cached=cached)} {_RESUME}"
        ) from error


@contextmanager
def explain_ranking_oom(config: StreamConfig, what: str, *, cached: bool) -> Iterator[None]:
    """Convert out-of-memory errors of an evaluation into `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        store = f"use {_uncached(config)}, " if cached else ""
        raise OutOfMemory(
            f"{what} does not fit into the memory of {config.device} ({short_message(error)}). It processes items and "
            f"users in chunks of a fixed size, so neither --batch-size (here {config.batch_size}) nor --precision "
            f"changes its memory use: {store}free memory on {config.device}, or select another one with --device. "
            f"{_RESUME}"
        ) from error


def _uncached(config: StreamConfig) -> str:
    return f"--store-gib 0, which keeps the items' hidden states {_uncached_location(config)}"


def _uncached_location(config: StreamConfig) -> str:
    return "on the host" if torch.device(config.device).type == "cuda" else "on disk"


_RESUME = (
    "All saved files are intact: the same command resumes from them once there is enough memory, also with another "
    "--store-gib or on another GPU. Other settings need a new run."
)


def advice(config: StreamConfig, use: MemoryUse | None, *, sequences: int, cached: bool) -> str:
    """Return which batch size would fit, the basis of this estimate, and which settings to change.

    Args:
        config: settings of the run.
        use: None if the device does not report its memory.
        sequences: number of sequences of the largest step. It is less than `batch_size` for a small window.
        cached: whether the items' hidden states are cached on the device.
    """
    others = ""
    if config.precision == "float32" and torch.device(config.device).type == "cuda":
        others += ", or --precision bfloat16, which halves activations"
    if cached:
        others += f", or {_uncached(config)}"
    if sequences <= 1:
        return f"The batch size cannot be reduced further: use a device with more memory{others}."
    if use is None:
        fits = sequences // 2
        return f"Try --batch-size {fits}{others} (half; no estimate, because the device does not report its memory)."
    fits = fitting_batch(sequences, use)
    before = f"{use.held / GIB:.2f} GiB of {use.available / GIB:.2f} GiB are allocated before the first step"
    if fits == 0:
        return f"By estimate, not even one sequence fits, because {before}: use a device with more memory{others}."
    return (
        f"Try --batch-size {fits}{others} (estimated, not tested: {before}, and the step needed at least "
        f"{use.required / GIB:.2f} GiB. The estimate assumes that a step's memory is proportional to its sequences. It "
        f"is the first halving that leaves a tenth of the memory free)."
    )


def fitting_batch(sequences: int, use: MemoryUse) -> int:
    """Return the first of `sequences / 2`, `sequences / 4`, ... that fits by estimate; 0 if none does.

    The estimate assumes that all memory except `use.held` is proportional to the number of sequences.

    Args:
        sequences: number of sequences of the step that did not fit.
        use: memory of the device at the error.
    """
    each = max(use.required - use.held, 1) / sequences
    fits = sequences // 2
    while fits and use.held + fits * each > USABLE_FRACTION * use.available:
        fits //= 2
    return fits
