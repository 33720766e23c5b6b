"""Helpers: windows and runs with graphed steps, by CUDA or by a fake capture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.stream import tiny
from xsmoe.data import item_share
from xsmoe.encoders import ItemFeatures
from xsmoe.stream import StreamingTrainer
from xsmoe.stream.cuda.graph_capture import Capture
from xsmoe.stream.cuda.graph_steps import GraphedSteps
from xsmoe.stream.epoch import make_optimizer, train_epoch
from xsmoe.stream.precision import LossScaler

OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB."
)


class Window:
    """Training on one window with graphed steps."""

    def __init__(
        self,
        capture: Capture | None = None,
        features: ItemFeatures | None = None,
        scaler: LossScaler | None = None,
        **options: Any,
    ) -> None:
        self.features, self.scaler = features or tiny.features(), scaler
        self.config = tiny.config(**options)
        self.model = tiny.model().to(self.config.device)
        self.splits = self.config.split(tiny.windows(2, users=30)[0])
        with np.errstate(divide="ignore"):
            self.log_share = np.log(item_share(self.splits.train, tiny.NUM_ITEMS))
        self.warnings: list[str] = []
        self.capture = capture
        self.begin()

    def begin(self) -> None:
        self.optimizer = make_optimizer(self.model, self.config)
        self.graphs = GraphedSteps(self.model, self.optimizer, self.scaler, self.warnings.append, self.capture)

    def epoch(self, number: int = 0, *, graphs: bool = True) -> float:
        done = train_epoch(
            self.model,
            self.features,
            self.splits.train,
            self.log_share,
            self.optimizer,
            self.config,
            self.scaler,
            window=0,
            epoch=number,
            on_batch=lambda done, of: None,
            graphs=self.graphs if graphs else None,
        )
        return float(done["loss"])

    def state(self) -> dict[str, Tensor]:
        moments = self.optimizer.state_dict()["state"]
        return self.model.state_dict() | {
            f"{place} {name}": value for place, state in moments.items() for name, value in state.items()
        }


def assert_same(one: Window, other: Window) -> None:
    mine, theirs = one.state(), other.state()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def weights(window: Window) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in window.model.parameters()])


def fit(folder: Path | None = None, listener: Any = None, **options: Any) -> list[dict[str, Any]]:
    model, settings = tiny.model(), tiny.config(**options)
    with StreamingTrainer(model, tiny.stream(), settings, folder=folder, listener=listener) as run:
        return tiny.without_time(run.fit())


def kill_and_resume(folder: Path, after: int, **options: Any) -> list[dict[str, Any]]:
    seen = []

    def listener(event: str, fields: dict[str, Any]) -> None:
        seen.append(event)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(folder, listener, **options)
    return fit(folder, **options)
