"""One formulation going through the stream: what a window asks of it, and ours."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.steps.model import BLOCKS, LEVELS, OUT_DIM, PLACES
from bench.steps.our_step import refuse
from bench.stream.parts import Clock, StepClock
from bench.stream.settings import Settings
from bench.stream.streams import Drawn
from xsmoe.data import Sequences
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.stream.cuda.graph_steps import CapturedSteps
from xsmoe.stream.epoch import make_optimizer, train_epoch
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.growth import grow
from xsmoe.stream.hidden_states.device_cache import place
from xsmoe.stream.state.seeds import seeded

GateRows = Mapping[str, Sequence[Tensor]]


class Run(ABC):
    """A model that is trained window by window.

    Attributes:
        name: what tables call it.
        clock: its steps, or their parts.
        optimizer: of the window at hand.
    """

    name: str
    clock: Clock
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def grow(self, window: int, rows: GateRows | None) -> GateRows | None:
        """Freezes all experts and adds one to each level, with these gate rows; returns those that it took."""

    @abstractmethod
    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        """Makes ready for a window: its training sequences, and each item's share (I,) of them."""

    @abstractmethod
    def epoch(self, window: int, epoch: int) -> float:
        """Trains on every sequence once; returns the mean loss."""

    @abstractmethod
    def ranks(self, task: RankingTask) -> np.ndarray:
        """Each target's rank, (B,) float64."""

    @abstractmethod
    def encoded_rows(self, batch: Sequences) -> int:
        """How many rows of each modality a step on these users encodes."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """What parameters, frozen experts, and what is derived from these and kept take."""

    def optimizer_bytes(self) -> int:
        """What the optimizer keeps between steps."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return byte_size(value for value in states if isinstance(value, Tensor))


class OurRun(Run):
    """`xsmoe`'s recommender, trained by the functions that `xsmoe train` trains with."""

    sequences: Sequences
    log_share: np.ndarray
    graphs: CapturedSteps | None = None

    def __init__(self, name: str, settings: Settings, drawn: Drawn, top_k: int | None = None) -> None:
        self.name, self.top_k = name, top_k
        self.config = settings.config()
        self.features, _ = place(drawn.features, drawn.features.modalities, self.config)
        self.device = torch.device(settings.device)
        with seeded(settings.seed, torch.device("cpu")):
            items = XSMoE(drawn.features.modalities, settings.dim, LEVELS, settings.rank, OUT_DIM, top_k=top_k)
            users = UserEncoder(OUT_DIM, BLOCKS, dropout=settings.dropout, max_length=PLACES - 1)
        self.model = Recommender(items, users).to(self.device)
        for _, _, bank in items.banks():
            bank.count_in_eval = True
        # A graph runs none of the hooks that tell parts apart.
        self.clock = (
            Clock(self.device)
            if settings.graph
            else StepClock(self.model, self.model.items, self.model.users, self.device)
        )

    def grow(self, window: int, rows: GateRows | None) -> GateRows:
        # The rows depend on seed and window alone, so that runs of ours draw the same.
        grow(self.model.items, self.config, window, trains=True)
        return {
            name: [bank.router[-1].detach().clone() for bank in side.levels()]
            for name, side in self.model.items.ladders().items()
        }

    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        self.sequences = sequences
        with np.errstate(divide="ignore"):
            self.log_share = np.log(share)
        self.optimizer = make_optimizer(self.model, self.config)
        self.clock.follow(self.optimizer)
        if self.graphs is not None:
            self.graphs.forget()
        if self.config.graph:
            self.graphs = CapturedSteps(self.model, self.optimizer, tell=refuse)

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
            # Sparse routing reads the experts as they are.
            frozen = None if bank.top_k is not None else bank.operands(bank.router, bank.router)["frozen"]
            if frozen is None:
                continue
            kept = [frozen]
            if self.config.precision == "bfloat16":
                kept.append(frozen.to(torch.bfloat16))
                held += [kept[-1].down, kept[-1].up]
            held += [pack for pack in (one.pack() for one in kept) if pack is not None]
        return byte_size(held)

    def copy(self) -> Recommender:
        """A model of the same weights that nothing trains, watches or keeps anything derived in."""
        twin = Recommender.from_config(self.model.config())
        twin.load_state_dict(self.model.state_dict())
        return twin.to(self.device).train()


def byte_size(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, each once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
