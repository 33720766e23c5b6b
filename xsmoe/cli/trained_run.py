"""A run as it was left: the model of its last window, and what the stream had shown by then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xsmoe.cli.run_config import MODEL, RunConfig, check_device, read_users
from xsmoe.data import Window
from xsmoe.encoders import HiddenStateStore, ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream import StreamConfig
from xsmoe.stream.evaluation.seen_items import StreamMemory
from xsmoe.stream.hidden_states.conditioned import conditioned
from xsmoe.stream.state.run_folder import read_metrics, read_window


@dataclass(frozen=True)
class TrainedRun:
    """Read only: training may go on meanwhile.

    Attributes:
        folder, config: of the run.
        stream: its settings, on the device asked for.
        model: after its last whole window, on that device, in evaluation mode.
        store: the items' hidden states, not conditioned.
        users: the user that each integer stands for.
        windows: those the model was trained on.
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
        """Loads a run that has at least one whole window.

        Args:
            folder: of the run.
            device: where the model computes; default where it was trained.

        Raises:
            ValueError: no run, no whole window, damaged files, or a device that is not there.
        """
        config = RunConfig.read(folder)
        stream = replace(config.stream, device=device or config.stream.device)
        check_device(stream.device)
        count = sum(line["kind"] == "window" for line in read_metrics(folder))
        if count == 0 or not (folder / MODEL).is_dir():
            raise ValueError(
                f"{folder} has no trained model yet: its first window is not done; go on with `xsmoe train`"
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
        """The items' hidden states as the model takes them: conditioned when they are asked for."""
        return conditioned(self.store, self.model.items)

    def memory(self) -> StreamMemory:
        """What the windows have shown, as training sees it."""
        memory = StreamMemory()
        for window in self.windows:
            memory.add(self.stream.split(window))
        return memory
