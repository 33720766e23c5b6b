"""What to do when a device's memory does not suffice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xsmoe.shortage import is_shortage
from xsmoe.stream.config import StreamConfig

GIB = 1 << 30
SPARE = 0.9
"""The part of the room that an estimate fills."""
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}


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
            f"the items' hidden states do not fit into the memory of {config.device} ({_said(error)}), although "
            f"--store-gib (here {allowed}) allows what they take: --store-gib 0 leaves them on the host. {_KEPT}"
        ) from error


@contextmanager
def training_memory(config: StreamConfig, window: int, epoch: int, *, resident: bool) -> Iterator[None]:
    """Turns what torch says where a training step does not fit into `OutOfMemory`; see `advice` for `resident`."""
    device = torch.device(config.device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        numbers = None
        if device.type == "cuda":
            # What this process has reserved can serve other tensors, what others hold cannot.
            room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            numbers = held, torch.cuda.max_memory_allocated(device) + requested(error), room
        raise OutOfMemory(
            f"window {window}, epoch {epoch}: a training step of {config.batch_size} users does not fit into the "
            f"memory of {config.device} ({_said(error)}). {advice(config, numbers, resident=resident)} {_KEPT}"
        ) from error


@contextmanager
def ranking_memory(config: StreamConfig, what: str) -> Iterator[None]:
    """Turns what torch says where memory is short, in an evaluation, into `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise OutOfMemory(
            f"{what} does not fit into the memory of {config.device} ({_said(error)}). It takes items and users in "
            f"chunks of a fixed size, so that neither --batch-size (here {config.batch_size}) nor --precision changes "
            f"what it needs: make room on {config.device}, or use --device with another one. {_KEPT}"
        ) from error


_KEPT = (
    "Everything saved so far is intact: the same command goes on from there once there is room. Other settings need a "
    "run of their own."
)


def advice(config: StreamConfig, numbers: tuple[int, int, int] | None, *, resident: bool) -> str:
    """Which batch size would fit, how that is known, and which switches to turn.

    Args:
        config: of the run.
        numbers: bytes held before the first step, bytes that the step would have reached at least, and bytes there are
            for this process; None where the device does not tell.
        resident: whether the items' hidden states lie on the device.
    """
    others = ""
    if config.precision == "float32" and torch.device(config.device).type == "cuda":
        others += ", or --precision bfloat16, which halves activations"
    if resident:
        others += ", or --store-gib 0, which leaves the items' hidden states on the host"
    if config.batch_size == 1:
        return f"No smaller batch is left: use a device with more memory{others}."
    if numbers is None:
        fits = config.batch_size // 2
        return f"Try --batch-size {fits}{others} (half; the device does not tell what it has, so this is no estimate)."
    held, reached, room = numbers
    fits = fitting_batch(config.batch_size, *numbers)
    if fits == 0:
        return (
            f"Not even one user would fit by estimate, since {held / GIB:.2f} GiB of {room / GIB:.2f} GiB are taken "
            f"before the first step: use a device with more memory{others}."
        )
    return (
        f"Try --batch-size {fits}{others} (estimated, not tried: the step needed at least {reached / GIB:.2f} GiB, "
        f"{held / GIB:.2f} GiB of it before it began, {room / GIB:.2f} GiB can be had, and the rest is taken to grow "
        f"in proportion to the users; of those the first halving that leaves a tenth of the memory free)."
    )


def fitting_batch(batch_size: int, held: int, reached: int, room: int) -> int:
    """The largest of batch_size/2, /4, .. that would fit if all but `held` grew in proportion to it; 0 if none would.

    Args:
        batch_size: users of the step that did not fit.
        held: bytes before the step.
        reached: bytes that it needed at least, more than `held`.
        room: bytes there are.
    """
    per_user = max(reached - held, 1) / batch_size
    fits = batch_size // 2
    while fits and held + fits * per_user > SPARE * room:
        fits //= 2
    return fits


def requested(error: Exception) -> int:
    """The bytes that the allocation asked for which failed; 0 if torch does not say."""
    found = _REQUEST.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _said(error: Exception) -> str:
    """What torch says up to what was asked for, without its advice."""
    text = " ".join(str(error).split())
    found = _REQUEST.search(text)
    return text[: found.end()] if found else text.split(". ")[0] or type(error).__name__
