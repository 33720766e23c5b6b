"""A trained run: the model of its last finished window, and the seen items up to that window."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xsmoe.cli.run_config import MODEL, RunConfig, check_device, read_users
from xsmoe.data import Window
from xsmoe.encoders import HiddenStateStore, ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream import StreamConfig
from xsmoe.stream.evaluation.seen_items import SeenItemHistory
from xsmoe.stream.hidden_states.conditioned import conditioned
from xsmoe.stream.state.run_folder import read_metrics, read_window


@dataclass(frozen=True)
class TrainedRun:
    """Read-only view of a run. Training may continue at the same time.

    Attributes:
        folder, config: folder and settings of the run.
        stream: settings of the trainer, with the requested device.
        model: model after the last finished window, on that device, in evaluation mode.
        store: the items' hidden states, not conditioned.
        users: the user name for each integer id.
        windows: windows that the model was trained on.
    """

    folder: Path
    config: RunConfig
    stream: StreamConfig
    model: Recommender
    store: HiddenStateStore
    users: np.ndarray
    windows: Sequence[Window]

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> "TrainedRun":
        """Load a run that has at least one finished window.

        Args:
            folder: folder of the run.
            device: device of the model; None uses the device of the training.

        Raises:
            ValueError: there is no run or no finished window, files are damaged, or the device does not exist.
        """
        config = RunConfig.read(folder)
        stream = replace(config.stream, device=device or config.stream.device)
        check_device(stream.device)
        count = sum(line["kind"] == "window" for line in read_metrics(folder))
        if count == 0 or not (folder / MODEL).is_dir():
            raise ValueError(
                f"{folder} has no trained model yet: its first window is not finished; resume it with `xsmoe train`"
            )
        windows = [read_window(folder, number) for number in range(count)]
        return cls(
            folder=folder,
            config=config,
            stream=stream,
            model=Recommender.from_pretrained(folder / MODEL).to(stream.device),
            store=HiddenStateStore.open(config.store),
            users=read_users(folder, windows),
            windows=windows,
        )

    def features(self) -> ItemFeatures:
        """Return the hidden states that the model expects, conditioned when they are read."""
        return conditioned(self.store, self.model.items)

    def seen_items(self) -> SeenItemHistory:
        """Return the seen items of all windows, split as in training."""
        seen = SeenItemHistory()
        for window in self.windows:
            seen.add(self.stream.split(window))
        return seen
