"""Where a run stands, and whether it is the run that a checkpoint was made by."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Where training stands: all that a checkpoint holds besides weights and optimizer.

    Attributes:
        digests: of the windows taken so far, the last of which may be in training.
        epoch: the next epoch of the window in training; None between windows.
        steps: optimizer steps in all.
        best_epoch, best_value: of the window in training; None before its first validation.
        stale: validations since the best one.
    """

    digests: list[str]
    epoch: int | None = None
    steps: int = 0
    best_epoch: int | None = None
    best_value: float | None = None
    stale: int = 0


def differences(name: str, saved: Any, mine: Any) -> list[str]:
    """What differs between two nested dicts of settings, a phrase each."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = sorted(set(saved) | set(mine))
        return [d for key in keys for d in differences(f"{name}.{key}", saved.get(key), mine.get(key))]
    return [] if saved == mine else [f"{name} was {saved!r}, is now {mine!r}"]
