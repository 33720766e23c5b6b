"""Where a run stands."""

from dataclasses import dataclass


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

    @property
    def windows_done(self) -> int:
        """Windows that are trained to the end."""
        return len(self.digests) - (self.epoch is not None)
