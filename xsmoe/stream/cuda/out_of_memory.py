"""What to do when a device's memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from xsmoe.out_of_memory import allocated, is_shortage, requested, said
from xsmoe.stream.config import StreamConfig

GIB = 1 << 30
SPARE = 0.9
"""The part of the room that an estimate fills."""


class OutOfMemory(ValueError):
    """A device's memory does not suffice; the message says for what, what would fit, and what to change."""


@contextmanager
def placing_memory(config: StreamConfig) -> Iterator[None]:
    """Turns what torch says where hidden states do not fit onto the device into `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        allowed = "its default" if config.store_gib is None else config.store_gib
        raise OutOfMemory(
            f"the items' hidden states do not fit into the memory of {config.device} ({said(error)}), although "
            f"--store-gib (here {allowed}) allows what they take: --store-gib 0 leaves them {_elsewhere(config)}. "
            f"{_KEPT}"
        ) from error


class Taken(NamedTuple):
    """Bytes on a device that ran short.

    Attributes:
        held: before the first step.
        reached: what the step would have reached at least.
        room: what there is for this process.
    """

    held: int
    reached: int
    room: int


@contextmanager
def training_memory(config: StreamConfig, where: str, *, sequences: int, resident: bool) -> Iterator[None]:
    """Turns what torch says where a training step does not fit into `OutOfMemory`.

    Args:
        config: of the run.
        where: the window and the epoch.
        sequences: of the largest step.
        resident: whether the items' hidden states lie on the device.
    """
    device = torch.device(config.device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        taken = None
        if device.type == "cuda":
            # The peak is of the whole run so far, and only asked for if torch does not say what there was.
            there = allocated(error)
            there = torch.cuda.max_memory_allocated(device) if there is None else there
            # What this process has reserved can serve other tensors, what others hold cannot.
            room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            taken = Taken(held, there + requested(error), room)
        raise OutOfMemory(
            f"{where}: a training step of {sequences} sequences does not fit into the memory of {config.device} "
            f"({said(error)}). {advice(config, taken, sequences=sequences, resident=resident)} {_KEPT}"
        ) from error


@contextmanager
def ranking_memory(config: StreamConfig, what: str, *, resident: bool) -> Iterator[None]:
    """Turns what torch says where memory is short, in an evaluation, into `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        store = f"use {_store(config)}, " if resident else ""
        raise OutOfMemory(
            f"{what} does not fit into the memory of {config.device} ({said(error)}). It takes items and users in "
            f"chunks of a fixed size, so that neither --batch-size (here {config.batch_size}) nor --precision changes "
            f"what it needs: {store}make room on {config.device}, or use --device with another one. {_KEPT}"
        ) from error


def _store(config: StreamConfig) -> str:
    return f"--store-gib 0, which leaves the items' hidden states {_elsewhere(config)}"


def _elsewhere(config: StreamConfig) -> str:
    return "on the host" if torch.device(config.device).type == "cuda" else "on disk"


_KEPT = (
    "Everything saved so far is intact: the same command goes on from there once there is room, with another "
    "--store-gib or on another GPU too. Other settings need a run of their own."
)


def advice(config: StreamConfig, taken: Taken | None, *, sequences: int, resident: bool) -> str:
    """Which batch size would fit, how that is known, and which switches to turn.

    Args:
        config: of the run.
        taken: None where the device does not tell.
        sequences: of the largest step, of which a small window has fewer than `batch_size`.
        resident: whether the items' hidden states lie on the device.
    """
    others = ""
    if config.precision == "float32" and torch.device(config.device).type == "cuda":
        others += ", or --precision bfloat16, which halves activations"
    if resident:
        others += f", or {_store(config)}"
    if sequences <= 1:
        return f"No smaller batch is left: use a device with more memory{others}."
    if taken is None:
        fits = sequences // 2
        return f"Try --batch-size {fits}{others} (half; the device does not tell what it has, so this is no estimate)."
    fits = fitting_batch(sequences, taken)
    there = f"{taken.held / GIB:.2f} GiB of {taken.room / GIB:.2f} GiB are taken before the first step"
    if fits == 0:
        return f"Not even one sequence would fit by estimate, since {there}: use a device with more memory{others}."
    return (
        f"Try --batch-size {fits}{others} (estimated, not tried: {there}, the step needed at least "
        f"{taken.reached / GIB:.2f} GiB, and what it added is taken to grow in proportion to the sequences; of those "
        f"the first halving that leaves a tenth of the memory free)."
    )


def fitting_batch(sequences: int, taken: Taken) -> int:
    """Half the sequences, a quarter, .., the first that fits if all but what was held grows with them; 0 if none does.

    Args:
        sequences: of the step that did not fit.
        taken: what it needed.
    """
    each = max(taken.reached - taken.held, 1) / sequences
    fits = sequences // 2
    while fits and taken.held + fits * each > SPARE * taken.room:
        fits //= 2
    return fits
