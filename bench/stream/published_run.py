"""The published formulation going through the stream, by the protocol that our trainer follows with it."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from bench import published, published_protocol
from bench.published_names import take_weights
from bench.steps.model import PLACES
from bench.steps.published_step import popularity, published_model
from bench.stream.parts import StepClock
from bench.stream.runs import GateRows, Run, byte_size
from bench.stream.settings import Settings
from bench.stream.streams import Drawn
from xsmoe.data import Sequences
from xsmoe.stream.evaluation.full_ranking import RankingTask
from xsmoe.stream.precision import autocast
from xsmoe.stream.state.seeds import derive, seeded

ROWS_A_CHUNK = 2816
"""Items encoded at once for a test: the rows of a training step."""
USERS_A_CHUNK = 1024


class PublishedRun(Run):
    """One module an expert, every place of a batch encoded, a loop over users in the loss and in the ranking."""

    name = "published"
    ids: Tensor
    popularity: Tensor

    def __init__(self, settings: Settings, drawn: Drawn, weights: dict[str, Tensor]) -> None:
        self.settings, self.config, self.table = settings, settings.config(), drawn.table
        self.device = torch.device(settings.device)
        self.model = build(settings, list(drawn.table), num_experts=1)
        take_weights(self.model, weights)
        self.model.to(self.device)
        self.clock = StepClock(self.model, self.model.item_encoder, self.model.user_encoder, self.device)

    def grow(self, window: int, rows: GateRows | None) -> GateRows | None:
        self.model.item_encoder.expand(rows)
        return rows

    def begin(self, sequences: Sequences, share: np.ndarray) -> None:
        self.ids = padded(sequences.items, sequences.offsets, PLACES)
        self.popularity = popularity(share).to(self.device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=self.config.lr)
        self.clock.follow(self.optimizer)

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
                batch = gather(self.table, ids, self.popularity)
                self.optimizer.zero_grad()
                with autocast(config):
                    loss = self.model(batch)
                loss.backward()
                self.optimizer.step()
                losses.append(loss.detach())
                weights.append(int((ids[:, :-1] != published.PADDING).sum()))
        return float(np.average(torch.stack(losses).double().cpu().numpy(), weights=weights))

    @torch.no_grad()
    def ranks(self, task: RankingTask) -> np.ndarray:
        self.model.eval()
        parts = []
        for start in range(0, len(task.candidates), ROWS_A_CHUNK):
            rows = torch.from_numpy(task.candidates[start : start + ROWS_A_CHUNK] + 1)
            parts.append(
                self.model.item_encoder({name: t[rows].float().to(self.device) for name, t in self.table.items()})
            )
        embeddings = torch.cat(parts)
        found = []
        for start in range(0, len(task), USERS_A_CHUNK):
            part = task.chunk(start, min(start + USERS_A_CHUNK, len(task)))
            places = padded(part.inputs, part.offsets, PLACES - 1).to(self.device)
            inputs = embeddings[(places - 1).clamp(min=0)]
            queries = self.model.user_encoder(inputs, places != published.PADDING)[:, -1]
            scores = (queries @ embeddings.T).cpu()
            for user in range(len(part)):
                seen = part.seen[part.seen_offsets[user] : part.seen_offsets[user + 1]].tolist()
                found.append(published_protocol.published_rank(scores[user], int(part.targets[user]), seen))
        return np.array(found)

    def encoded_rows(self, batch: Sequences) -> int:
        return len(batch) * PLACES

    def weight_bytes(self) -> int:
        return byte_size([*self.model.parameters(), *self.model.buffers()])


def build(settings: Settings, modalities: Iterable[str], num_experts: int) -> published.Recommender:
    """The published model of a stream, with all its experts trainable."""
    return published_model(modalities, settings.dim, settings.rank, num_experts, settings.dropout)


def padded(items: np.ndarray, offsets: np.ndarray, places: int) -> Tensor:
    """Sequences as rows (B, places) of ids from 1 on, padded at the front."""
    lengths = np.diff(offsets)
    rows = np.full((len(lengths), places), published.PADDING, dtype=np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    rows[row, places - np.repeat(offsets[1:], lengths) + np.arange(len(items))] = items + 1
    return torch.from_numpy(rows)


def gather(table: dict[str, Tensor], ids: Tensor, popularity: Tensor) -> published.Batch:
    """A batch (B, places) of the published model on the device of `popularity`; row 0 of the table is zeros."""
    device = popularity.device
    hidden = {name: rows[ids.flatten()].to(device) for name, rows in table.items()}
    return published.Batch(hidden, ids.to(device), popularity)
