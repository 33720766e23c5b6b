"""The paper's formulation, trained on the stream with the same protocol as our trainer."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bench.e2e.models import PLACES, paper_model, paper_popularity
from bench.e2e.stream.data import StreamData
from bench.e2e.stream.runs import GateRows, Run, byte_size
from bench.e2e.stream.settings import Settings
from bench.e2e.stream.step_clock import StepClock
from bench.paper import model as paper
from bench.paper.parameter_names import copy_weights
from bench.paper.protocol import target_rank
from xsmoe.data import Sequences
from xsmoe.stream.evaluation.full_ranking import RankingTask
from xsmoe.stream.precision import autocast
from xsmoe.stream.state.seeds import derive, seeded

ROWS_PER_CHUNK = 2816
"""Items that a test encodes at once: the rows of a training step."""
USERS_PER_CHUNK = 1024


class PaperRun(Run):
    """One module per expert, all places of a batch encoded, a loop over users in the loss and in the ranking."""

    name = "published"
    ids: Tensor
    popularity: Tensor

    def __init__(self, settings: Settings, data: StreamData, weights: dict[str, Tensor]) -> None:
        self.settings, self.config, self.table = settings, settings.config(), data.table
        self.device = torch.device(settings.device)
        self.model = build_model(settings, data, num_experts=1)
        copy_weights(self.model, weights)
        self.model.to(self.device)
        self.clock = StepClock(self.model, self.model.item_encoder, self.model.user_encoder, self.device)

    def grow(self, window: int, rows: GateRows | None) -> GateRows | None:
        self.model.item_encoder.expand(rows)
        return rows

    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        self.ids = pad(sequences.items, sequences.offsets, PLACES)
        self.popularity = paper_popularity(share).to(self.device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=self.config.lr)
        self.clock.watch_optimizer(self.optimizer)

    def epoch(self, window: int, epoch: int) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = max(config.min_lr, config.lr * config.lr_decay**epoch)
        self.model.item_encoder.reset()
        self.model.train()
        order = np.random.default_rng(derive(config.seed, window, epoch, "order")).permutation(len(self.ids))
        losses, weights = [], []
        with seeded(derive(config.seed, window, epoch, "dropout"), self.device):
            for start in range(0, len(order), config.batch_size):
                ids = self.ids[order[start : start + config.batch_size]]
                batch = gather_batch(self.table, ids, self.popularity)
                self.optimizer.zero_grad()
                with autocast(config):
                    loss = self.model(batch)
                loss.backward()
                self.optimizer.step()
                losses.append(loss.detach())
                weights.append(int((ids[:, :-1] != paper.PADDING).sum()))
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
            inputs = embeddings[(places - 1).clamp(min=0)]
            queries = self.model.user_encoder(inputs, places != paper.PADDING)[:, -1]
            scores = (queries @ embeddings.T).cpu()
            for user in range(len(part)):
                seen = part.seen[part.seen_offsets[user] : part.seen_offsets[user + 1]].tolist()
                found.append(target_rank(scores[user], int(part.targets[user]), seen))
        return np.array(found)

    def encoded_rows(self, batch: Sequences) -> int:
        return len(batch) * PLACES

    def weight_bytes(self) -> int:
        return byte_size([*self.model.parameters(), *self.model.buffers()])


def build_model(settings: Settings, data: StreamData, num_experts: int) -> paper.Recommender:
    """Return the paper's model of a stream; all its experts are trainable."""
    return paper_model(data.table, settings.dim, settings.rank, num_experts, settings.dropout)


def pad(items: np.ndarray, offsets: np.ndarray, places: int) -> Tensor:
    """Return sequences as rows (B, places) of ids, which start at 1, padded at the front."""
    return paper.pad_sequences([(items[start:end] + 1).tolist() for start, end in pairwise(offsets)], places)


def gather_batch(table: dict[str, Tensor], ids: Tensor, popularity: Tensor) -> paper.Batch:
    """Return a batch (B, places) of the paper's model on the device of `popularity`; row 0 of the table is zeros."""
    device = popularity.device
    hidden = {name: rows[ids.flatten()].to(device) for name, rows in table.items()}
    return paper.Batch(hidden, ids.to(device), popularity)
