"""The two formulations that are trained on the stream: ours and the paper's, and the clock of their steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from bench.core.timing import Stopwatch
from bench.e2e.models import BLOCKS, LEVELS, OUT_DIM, PLACES, paper_model
from bench.e2e.step.our_step import raise_capture_failed
from bench.e2e.step.paper_step import PaperStep
from bench.e2e.stream.data import StreamData
from bench.e2e.stream.records import PARTS
from bench.e2e.stream.settings import Settings
from bench.paper import model as paper
from bench.paper.parameter_names import copy_weights
from bench.paper.protocol import target_rank
from xsmoe.data import Sequences
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.stream.cuda.graph_steps import GraphedSteps
from xsmoe.stream.epoch import make_optimizer, train_epoch
from xsmoe.stream.evaluation.full_ranking import RankingTask, rank_with_model
from xsmoe.stream.growth import grow
from xsmoe.stream.hidden_states.placement import place
from xsmoe.stream.state.seeds import derive, seeded

GateRows = Mapping[str, Sequence[Tensor]]

ROWS_PER_CHUNK = 2816
"""Items that a test of the paper's formulation encodes at once: the rows of a training step."""
USERS_PER_CHUNK = 1024


class StepClock:
    """The times of training steps in an epoch; of the parts of steps too, after `watch`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._parts = device, 1
        self._watch: Stopwatch | None = None

    def watch(self, model: nn.Module, items: nn.Module, users: nn.Module) -> None:
        """Time the parts of each step with hooks. The model calls its encoders once each, in this order."""
        self._parts = len(PARTS)
        model.register_forward_pre_hook(self.mark)
        for module in (items, users, model):
            module.register_forward_hook(self.mark)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the hooks of a new optimizer, if parts are timed."""
        if self._parts > 1:
            optimizer.register_step_pre_hook(self.mark)
            optimizer.register_step_post_hook(self.mark)

    @contextmanager
    def epoch(self) -> Iterator[list[list[float]]]:
        """Yield a list that contains the seconds of each step's parts after the block."""
        steps: list[list[float]] = []
        self._watch = Stopwatch(self._device)
        try:
            yield steps
            laps = self._watch.laps()
        finally:
            self._watch = None
        if len(laps) % self._parts:
            raise RuntimeError(f"{len(laps)} laps are no whole steps of {self._parts} parts")
        steps += [list(laps[start : start + self._parts]) for start in range(0, len(laps), self._parts)]

    def mark(self, *_: object) -> None:
        """End a lap. Outside of an epoch nothing is marked, because evaluation calls the encoders too."""
        if self._watch is not None:
            self._watch.mark()


class _Run:
    """A model that is trained window by window.

    Each formulation has these methods. `grow(window, rows)` freezes all experts, adds one with these gate rows to each
    level, and returns the rows that were used. `begin(sequences, share)` prepares for a window: its training sequences,
    and each item's share (I,) of them. `epoch(window, epoch)` trains on every sequence once and returns the mean loss.
    `ranks(task)` returns each target's rank, (B,) float64. `encoded_rows(batch)` returns the number of rows of each
    modality that a step on these users encodes.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.config, self.device = name, settings.config(), torch.device(settings.device)
        self.clock = StepClock(self.device)

    def weights(self) -> list[Tensor]:
        """Return parameters, frozen experts, and tensors that are derived from them and kept."""
        return [*self.model.parameters(), *self.model.buffers()]

    def weight_bytes(self) -> int:
        return _byte_size(self.weights())

    def optimizer_bytes(self) -> int:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return _byte_size(value for value in states if isinstance(value, Tensor))


class OurRun(_Run):
    """Our recommender, trained by the functions that `xsmoe train` uses."""

    sequences: Sequences
    log_share: np.ndarray
    graphs: GraphedSteps | None = None

    def __init__(self, name: str, settings: Settings, data: StreamData, top_k: int | None = None) -> None:
        super().__init__(name, settings)
        self.top_k = top_k
        self.features, _ = place(data.features, data.features.modalities, self.config)
        with seeded(settings.seed, torch.device("cpu")):
            items = XSMoE(data.features.modalities, settings.dim, LEVELS, settings.rank, OUT_DIM, top_k=top_k)
            users = UserEncoder(OUT_DIM, BLOCKS, dropout=settings.dropout, max_length=PLACES - 1)
        self.model: Recommender = Recommender(items, users).to(self.device)
        for _, _, bank in items.banks():
            bank.count_in_eval = True
        # A graph replay runs no hooks.
        if not settings.graph:
            self.clock.watch(self.model, items, users)

    def grow(self, window: int, rows: GateRows | None) -> GateRows:
        # The rows depend on seed and window only, so all our runs draw the same rows.
        grow(self.model.items, self.config, window, trains=True)
        return {
            name: [bank.router[-1].detach().clone() for bank in side.levels()]
            for name, side in self.model.items.side_networks().items()
        }

    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        self.sequences, self.log_share = sequences, log_shares(share)
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

    def weights(self) -> list[Tensor]:
        held = super().weights()
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
        return held

    def copy(self) -> Recommender:
        """Return a model with the same weights, without hooks and without derived tensors."""
        copied = Recommender.from_config(self.model.config())
        copied.load_state_dict(self.model.state_dict())
        return copied.to(self.device).train()


class PaperRun(_Run):
    """One module per expert, all places of a batch encoded, a loop over users in the loss and in the ranking."""

    items: Tensor
    step: PaperStep

    def __init__(self, settings: Settings, data: StreamData, weights: dict[str, Tensor]) -> None:
        super().__init__("published", settings)
        self.settings, self.table = settings, data.table
        self.model: paper.Recommender = paper_with_weights(settings, data, weights, num_experts=1).to(self.device)
        self.clock.watch(self.model, self.model.item_encoder, self.model.user_encoder)

    def grow(self, window: int, rows: GateRows | None) -> GateRows | None:
        self.model.item_encoder.expand(rows)
        return rows

    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        self.items = pad(sequences.items, sequences.offsets, PLACES)
        self.step = paper_step(self.settings, self.table, share, self.model)
        self.optimizer = self.step.optimizer
        self.clock.watch_optimizer(self.optimizer)

    def epoch(self, window: int, epoch: int) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = max(config.min_lr, config.lr * config.lr_decay**epoch)
        self.model.item_encoder.reset()
        self.model.train()
        order = np.random.default_rng(derive(config.seed, window, epoch, "order")).permutation(len(self.items))
        losses, weights = [], []
        with seeded(derive(config.seed, window, epoch, "dropout"), self.device):
            for start in range(0, len(order), config.batch_size):
                items = self.items[order[start : start + config.batch_size]]
                losses.append(self.step.train({"items": items}))
                weights.append(int((items[:, :-1] >= 0).sum()))
        return float(np.average(torch.stack(losses).double().cpu().numpy(), weights=weights))

    @torch.no_grad()
    def ranks(self, task: RankingTask) -> np.ndarray:
        self.model.eval()
        chunks = []
        for start in range(0, len(task.candidates), ROWS_PER_CHUNK):
            rows = torch.from_numpy(task.candidates[start : start + ROWS_PER_CHUNK] + 1)
            hidden = {name: table[rows].float().to(self.device) for name, table in self.table.items()}
            chunks.append(self.model.item_encoder(hidden))
        embeddings = torch.cat(chunks)
        found = []
        for start in range(0, len(task), USERS_PER_CHUNK):
            part = task.chunk(start, min(start + USERS_PER_CHUNK, len(task)))
            places = pad(part.inputs, part.offsets, PLACES - 1).to(self.device)
            queries = self.model.user_encoder(embeddings[places.clamp(min=0)], places >= 0)[:, -1]
            scores = (queries @ embeddings.T).cpu()
            for user in range(len(part)):
                seen = part.seen[part.seen_offsets[user] : part.seen_offsets[user + 1]].tolist()
                found.append(target_rank(scores[user], int(part.targets[user]), seen))
        return np.array(found)

    def encoded_rows(self, batch: Sequences) -> int:
        return len(batch) * PLACES


Run = OurRun | PaperRun


def paper_with_weights(
    settings: Settings, data: StreamData, weights: Mapping[str, Tensor], num_experts: int
) -> paper.Recommender:
    """Return the paper's model with the state of our recommender."""
    model = paper_model(data.table, settings.dim, settings.rank, num_experts, settings.dropout)
    copy_weights(model, weights)
    return model


def paper_step(
    settings: Settings, table: Mapping[str, Tensor], share: np.ndarray, model: paper.Recommender
) -> PaperStep:
    """Return the step of the paper's model on the hidden states of the stream; in float64 without autocast."""
    double = next(model.parameters()).dtype == torch.float64
    autocast_dtype = torch.bfloat16 if settings.half and not double else None
    return PaperStep(model, table, share, lr=settings.lr, dropout=settings.dropout, autocast_dtype=autocast_dtype)


def pad(items: np.ndarray, offsets: np.ndarray, places: int) -> Tensor:
    """Return sequences as rows (B, places) of items, padded with -1 at the front."""
    return paper.pad_sequences([(items[start:end] + 1).tolist() for start, end in pairwise(offsets)], places) - 1


def log_shares(share: np.ndarray) -> np.ndarray:
    """Return logarithms of shares, -inf for an item without interactions."""
    with np.errstate(divide="ignore"):
        return np.log(share)


def _byte_size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
