"""Files of a run's fitted conditioning. It is constant, so it is not stored in every checkpoint."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from xsmoe.nn import Recommender
from xsmoe.stream.state.checkpoints import CheckpointError, read_payload, write_payload

PREFIX = "items.conditioning."


def split_state(model: Recommender) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's state dict in two parts: without the conditioning, and only the conditioning."""
    state = model.state_dict()
    conditions = {name: value for name, value in state.items() if name.startswith(PREFIX)}
    return {name: value for name, value in state.items() if name not in conditions}, conditions


class SavedConditions:
    """Files of fitted conditioning. Each file is named after its digest and written once.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved: tuple[tuple[str, ...], str] | None = None

    def save(self, model: Recommender) -> str | None:
        """Write the conditioning of a model if it is not saved yet.

        Returns:
            The name of the file; None for a model without conditioning.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        fitted = model.items.conditioned()
        if self._saved is None or self._saved[0] != fitted:
            _, conditions = split_state(model)
            if not conditions:
                return None
            path = self._folder / f"{_digest(conditions)}.conditions"
            write_payload(conditions, path)
            self._saved = fitted, path.name
        return self._saved[1]

    def load(self, name: str | None) -> dict[str, Tensor]:
        """Return the state dict of the conditioning in the file `name`; an empty dict for None.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        if name is None:
            return {}
        path = self._folder / name
        try:
            conditions = read_payload(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}, which the run needs to resume: {error}") from error
        if f"{_digest(conditions)}.conditions" != name:
            raise CheckpointError(f"{path} has another conditioning than the run; restore it from a backup")
        return conditions


def _digest(conditions: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors and their names."""
    found = hashlib.sha256()
    for name, value in sorted(conditions.items()):
        found.update(repr((name, tuple(value.shape), value.dtype)).encode())
        found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
