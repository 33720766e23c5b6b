"""The interface of a formulation that is trained on the stream, and our implementation of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.e2e.models import BLOCKS, LEVELS, OUT_DIM, PLACES
from bench.e2e.step.our_step import raise_capture_failed
from bench.e2e.stream.data import StreamData
from bench.e2e.stream.settings import Settings
from bench.e2e.stream.step_clock import Clock, StepClock
from xsmoe.data import Sequences
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.stream.cuda.graph_steps import GraphedSteps
from xsmoe.stream.epoch import make_optimizer, train_epoch
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.growth import grow
from xsmoe.stream.hidden_states.placement import place
from xsmoe.stream.state.seeds import seeded

GateRows = Mapping[str, Sequence[Tensor]]


class Run(ABC):
    """A model that is trained window by window.

    Attributes:
        name: used in tables.
        clock: of its steps.
        optimizer: of the current window.
    """

    name: str
    clock: Clock
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def grow(self, window: int, rows: GateRows | None) -> GateRows | None:
        """Freeze all experts and add one to each level, with these gate rows; return the rows that were used."""

    @abstractmethod
    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        """Prepare for a window: its training sequences, and each item's share (I,) of them."""

    @abstractmethod
    def epoch(self, window: int, epoch: int) -> float:
        """Train on every sequence once; return the mean loss."""

    @abstractmethod
    def ranks(self, task: RankingTask) -> np.ndarray:
        """Return each target's rank, (B,) float64."""

    @abstractmethod
    def encoded_rows(self, batch: Sequences) -> int:
        """Return the number of rows of each modality that a step on these users encodes."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Return the bytes of parameters, frozen experts, and tensors that are derived from them and kept."""

    def optimizer_bytes(self) -> int:
        """Return the bytes of the optimizer's state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return byte_size(value for value in states if isinstance(value, Tensor))


class OurRun(Run):
    """Our recommender, trained by the functions that `xsmoe train` uses."""

    sequences: Sequences
    log_share: np.ndarray
    graphs: GraphedSteps | None = None

    def __init__(self, name: str, settings: Settings, data: StreamData, top_k: int | None = None) -> None:
        self.name, self.top_k = name, top_k
        self.config = settings.config()
        self.features, _ = place(data.features, data.features.modalities, self.config)
        self.device = torch.device(settings.device)
        with seeded(settings.seed, torch.device("cpu")):
            items = XSMoE(data.features.modalities, settings.dim, LEVELS, settings.rank, OUT_DIM, top_k=top_k)
            users = UserEncoder(OUT_DIM, BLOCKS, dropout=settings.dropout, max_length=PLACES - 1)
        self.model = Recommender(items, users).to(self.device)
        for _, _, bank in items.banks():
            bank.count_in_eval = True
        # A graph replay runs no hooks.
        self.clock = (
            Clock(self.device)
            if settings.graph
            else StepClock(self.model, self.model.items, self.model.users, self.device)
        )

    def grow(self, window: int, rows: GateRows | None) -> GateRows:
        # The rows depend on seed and window only, so all our runs draw the same rows.
        grow(self.model.items, self.config, window, trains=True)
        return {
            name: [bank.router[-1].detach().clone() for bank in side.levels()]
            for name, side in self.model.items.side_networks().items()
        }

    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        self.sequences = sequences
        with np.errstate(divide="ignore"):
            self.log_share = np.log(share)
        self.optimizer = make_optimizer(self.model, self.config)
        self.clock.watch_optimizer(self.optimizer)
        if self.graphs is not None:
            self.graphs.drop()
        if self.config.graph:
            self.graphs = GraphedSteps(self.model, self.optimizer, warn=raise_capture_failed)

    def epoch(self, window: int, epoch: int) -> float:
        done = train_epoch(
            self.model,
            self.features,
            self.sequences,
            self.log_share,
            self.optimizer,
            self.config,
            window=window,
            epoch=epoch,
            on_batch=lambda done, of: None if self.graphs is None else self.clock.mark(),
            graphs=self.graphs,
        )
        return float(done["loss"])

    def ranks(self, task: RankingTask) -> np.ndarray:
        return rank_with_model(self.model, self.features, task, self.device)

    def encoded_rows(self, batch: Sequences) -> int:
        return len(np.unique(batch.items))

    def weight_bytes(self) -> int:
        held = [*self.model.parameters(), *self.model.buffers()]
        for _, _, bank in self.model.items.banks():
            # Sparse routing uses the experts without derived tensors.
            frozen = None if bank.top_k is not None else bank.operands(bank.router, bank.router)["frozen"]
            if frozen is None:
                continue
            kept = [frozen]
            if self.config.precision == "bfloat16":
                kept.append(frozen.to(torch.bfloat16))
                held += [kept[-1].down, kept[-1].up]
            held += [packed for packed in (one.pack() for one in kept) if packed is not None]
        return byte_size(held)

    def copy(self) -> Recommender:
        """Return a model with the same weights, without hooks and without derived tensors."""
        copied = Recommender.from_config(self.model.config())
        copied.load_state_dict(self.model.state_dict())
        return copied.to(self.device).train()


def byte_size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
