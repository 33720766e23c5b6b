"""XSMoE as its paper describes it (arXiv 2508.05993): one module per expert, Python loops, nothing clever.

It is an oracle for tests and a rival of the bench. It shares no code with the library, and works as the published code
does: an expert at a time, the loss's mask a user at a time, written where the logits lie.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0


class Expert(nn.Module):
    """A bottleneck adapter with a residual."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.fc_down = nn.Linear(dim, rank, bias=False)
        self.fc_up = nn.Linear(rank, dim, bias=False)
        nn.init.normal_(self.fc_down.weight, std=0.01)
        nn.init.normal_(self.fc_up.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc_up(F.gelu(self.fc_down(x)))


class Router(nn.Module):
    """Softmax gates; row 0 gates the backbone, row e the expert number e, counted from 1."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_experts + 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.linear(x), dim=-1)

    def drop(self, row: int) -> None:
        """Remove one gate row."""
        old = self.linear.weight.detach()
        self._replace(torch.cat([old[:row], old[row + 1 :]]))

    def grow(self, row: Tensor | None = None) -> None:
        """Append one gate row: `row` (dim,), or what a fresh nn.Linear starts with."""
        old = self.linear.weight.detach()
        fresh = nn.Linear(old.shape[1], 1, bias=False).weight.detach()[0]
        self._replace(torch.cat([old, (fresh if row is None else row).to(old)[None]]))

    def _replace(self, weight: Tensor) -> None:
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight.clone())


class MoE(nn.Module):
    """The experts of one level, and how much each branch (the backbone is branch 0) has been used."""

    def __init__(self, dim: int, rank: int, num_experts: int = 1) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(dim, rank) for _ in range(num_experts))
        self.reset()

    def reset(self) -> None:
        """Set the counters, which are float64 and not part of the state dict, to zero."""
        self.norm_mass = torch.zeros(len(self.experts) + 1, dtype=torch.float64)
        self.gate_mass = torch.zeros(len(self.experts) + 1, dtype=torch.float64)

    def shares(self) -> Tensor:
        """The experts' shares of the norms (E,), which leave the backbone out."""
        return self.norm_mass[1:] / self.norm_mass[1:].sum()

    def forward(self, x: Tensor, backbone: Tensor, gates: Tensor) -> Tensor:
        outputs = torch.stack([backbone] + [expert(x) for expert in self.experts], dim=1)
        gated = gates.unsqueeze(-1) * outputs
        # In evaluation too: the published counters do not ask for the mode.
        self.norm_mass += gated.detach().norm(dim=-1).sum(dim=0).double().cpu()
        self.gate_mass += gates.detach().sum(dim=0).double().cpu()
        return gated.sum(dim=1)

    def least_used(self, tau: float) -> int | None:
        """The expert to prune, counted from 0, if its share is below tau."""
        shares = self.shares().tolist()
        least = min(range(len(shares)), key=lambda e: shares[e])
        return least if shares[least] < tau else None

    def drop(self, expert: int) -> None:
        """Remove one expert and its counters."""
        kept = [e for e in range(len(self.experts)) if e != expert]
        self.experts = nn.ModuleList(self.experts[e] for e in kept)
        branches = [0] + [e + 1 for e in kept]
        self.norm_mass, self.gate_mass = self.norm_mass[branches], self.gate_mass[branches]

    def grow(self) -> None:
        """Freeze all experts and append their mean as a trainable one, with counters at zero."""
        self.experts.requires_grad_(False)
        new = copy.deepcopy(self.experts[0]).requires_grad_(True)
        with torch.no_grad():
            new.fc_down.weight.copy_(torch.stack([e.fc_down.weight for e in self.experts]).mean(dim=0))
            new.fc_up.weight.copy_(torch.stack([e.fc_up.weight for e in self.experts]).mean(dim=0))
        self.experts.append(new)
        zero = torch.zeros(1, dtype=torch.float64)
        self.norm_mass, self.gate_mass = torch.cat([self.norm_mass, zero]), torch.cat([self.gate_mass, zero])


class Ladder(nn.Module):
    """The side network of one modality: hidden (N, num_levels + 1, dim) -> (N, dim)."""

    def __init__(self, dim: int, rank: int, num_levels: int, num_experts: int = 1) -> None:
        super().__init__()
        self.moes = nn.ModuleList(MoE(dim, rank, num_experts) for _ in range(num_levels))
        self.routers = nn.ModuleList(Router(dim, num_experts) for _ in range(num_levels))

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.ndim != 3 or hidden.shape[1] != len(self.moes) + 1:
            raise ValueError(f"hidden must be (N, {len(self.moes) + 1}, dim), got {tuple(hidden.shape)}")
        x = hidden[:, 0]
        for level, (moe, router) in enumerate(zip(self.moes, self.routers, strict=True), start=1):
            x = moe(x, hidden[:, level], router(x))
        return x

    def reset(self) -> None:
        for moe in self.moes:
            moe.reset()

    def prune(self, tau: float = 0.1) -> list[int | None]:
        """Drop at most one expert per level; returns which one, counted from 0, for every level."""
        dropped = [moe.least_used(tau) for moe in self.moes]
        for moe, router, expert in zip(self.moes, self.routers, dropped, strict=True):
            if expert is not None:
                moe.drop(expert)
                router.drop(expert + 1)
        return dropped

    def expand(self, rows: Sequence[Tensor | None] | None = None) -> None:
        """Add one expert per level; `rows` gives every level's new gate row."""
        for moe, router, row in zip(self.moes, self.routers, rows or [None] * len(self.moes), strict=True):
            moe.grow()
            router.grow(row)


class ItemEncoder(nn.Module):
    """One ladder per modality, in the order given; their last x side by side, projected to (N, out_dim)."""

    def __init__(self, dims: Mapping[str, int], num_levels: int, rank: int, out_dim: int, num_experts: int = 1) -> None:
        super().__init__()
        self.ladders = nn.ModuleDict({name: Ladder(dim, rank, num_levels, num_experts) for name, dim in dims.items()})
        self.projection = nn.Linear(sum(dims.values()), out_dim)

    def forward(self, hidden: Mapping[str, Tensor]) -> Tensor:
        return self.projection(torch.cat([ladder(hidden[name]) for name, ladder in self.ladders.items()], dim=-1))

    def reset(self) -> None:
        for ladder in self.ladders.values():
            ladder.reset()

    def prune(self, tau: float = 0.1) -> dict[str, list[int | None]]:
        return {name: ladder.prune(tau) for name, ladder in self.ladders.items()}

    def expand(self, rows: Mapping[str, Sequence[Tensor | None]] | None = None) -> None:
        for name, ladder in self.ladders.items():
            ladder.expand(rows[name] if rows else None)


class Attention(nn.Module):
    """Multi-head self-attention, residual, LayerNorm; `bias` is added to the attention logits."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.w_q = nn.Linear(dim, dim, bias=False)
        self.w_k = nn.Linear(dim, dim, bias=False)
        self.w_v = nn.Linear(dim, dim, bias=False)
        self.fc = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            w(x).view(batch, length, self.heads, dim // self.heads).transpose(1, 2)
            for w in (self.w_q, self.w_k, self.w_v)
        )
        logits = q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads) + bias
        mixed = self.dropout(torch.softmax(logits, dim=-1)) @ v
        return self.layer_norm(x + self.dropout(self.fc(mixed.transpose(1, 2).reshape(batch, length, dim))))


class FeedForward(nn.Module):
    """Two layers with ReLU, dropout, residual, LayerNorm."""

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, inner)
        self.w_2 = nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x + self.dropout(self.w_2(torch.relu(self.w_1(x)))))


class Block(nn.Module):
    """A post-norm Transformer block."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, inner, dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x, bias))


class UserEncoder(nn.Module):
    """A causal Transformer over left-padded sequences; the last input stands at position max_length - 1."""

    def __init__(
        self,
        dim: int = 128,
        heads: int = 2,
        blocks: int = 2,
        inner: int = 512,
        dropout: float = 0.1,
        max_length: int = 10,
    ) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(max_length, dim)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, inner, dropout) for _ in range(blocks))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, log_mask: Tensor) -> Tensor:
        """x (B, max_length, dim), log_mask (B, max_length) true at real items -> (B, max_length, dim)."""
        length = x.shape[1]
        if length != self.position_embedding.num_embeddings or log_mask.shape != x.shape[:2]:
            raise ValueError(f"sequences must be padded to max_length, got {tuple(x.shape)}, {tuple(log_mask.shape)}")
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = causal & log_mask.bool()[:, None, None, :]
        # Finite, so that a padding query, which may see nothing, comes out finite too.
        least = max(-1e9, torch.finfo(x.dtype).min)
        bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, least)
        x = self.dropout(self.layer_norm(x + self.position_embedding(torch.arange(length, device=x.device))))
        for block in self.blocks:
            x = block(x, bias)
        return x


def pad_sequences(sequences: Sequence[Sequence[int]], max_items: int = 11) -> Tensor:
    """Item ids (B, max_items), padded at the front."""
    rows = [list(items)[-max_items:] for items in sequences]
    return torch.tensor([[PADDING] * (max_items - len(row)) + row for row in rows], dtype=torch.long)


def gather_hidden(table: Mapping[str, Tensor], item_ids: Tensor) -> dict[str, Tensor]:
    """Rows of the tables (num_items + 1, levels, dim) for every place of the batch; those of padding are zeros."""
    ids = item_ids.reshape(-1)
    return {name: rows[ids].masked_fill((ids == PADDING)[:, None, None], 0) for name, rows in table.items()}


def published_popularity(train: Mapping[object, Sequence[int]], num_items: int) -> Tensor:
    """Each item's share of the training interactions (num_items + 1,), float64; padding gets 1."""
    counts = torch.zeros(num_items + 1, dtype=torch.float64)
    for items in train.values():
        for item in items:
            counts[item] += 1
    popularity = counts / counts.sum()
    popularity[PADDING] = 1
    return popularity


def published_logits(queries: Tensor, embeddings: Tensor, item_ids: Tensor, popularity: Tensor) -> Tensor:
    """Masked, corrected logits (B, S - 1, B * S) of queries (B, S - 1, d) against all places of the batch.

    embeddings (B, S, d), item_ids (B, S), popularity (num_items + 1,). The target of position j of user b is column
    b * S + j + 1, the only column of the user's own items that stays open.
    """
    batch, length = item_ids.shape
    columns = item_ids.reshape(-1)
    probability = popularity[columns].masked_fill(columns == PADDING, 1)
    logits = queries @ embeddings.reshape(batch * length, -1).T - torch.log(probability).to(queries)
    for user in range(batch):
        own = (columns == item_ids[user][:, None]).any(0) | (columns == PADDING)
        closed = own.repeat(length - 1, 1)
        for position in range(length - 1):
            closed[position, user * length + position + 1] = False
        logits[user][closed] = -math.inf
    return logits


def published_cross_entropy(queries: Tensor, embeddings: Tensor, item_ids: Tensor, popularity: Tensor) -> Tensor:
    """Mean over all positions whose input is a real item; arguments as in `published_logits`."""
    logits = published_logits(queries, embeddings, item_ids, popularity)
    real = item_ids[:, :-1] != PADDING
    targets = torch.arange(item_ids.numel(), device=logits.device).view(item_ids.shape)[:, 1:]
    return F.cross_entropy(logits[real], targets[real])


def published_loss(
    item_encoder: nn.Module,
    user_encoder: nn.Module,
    hidden: Mapping[str, Tensor],
    item_ids: Tensor,
    popularity: Tensor,
) -> Tensor:
    """The training loss of item_ids (B, S); hidden holds (B * S, levels, dim) per modality, zeros where padded."""
    embeddings = item_encoder(hidden).view(*item_ids.shape, -1)
    queries = user_encoder(embeddings[:, :-1], item_ids[:, :-1] != PADDING)
    return published_cross_entropy(queries, embeddings, item_ids, popularity)


class Batch(NamedTuple):
    hidden: Mapping[str, Tensor]
    item_ids: Tensor
    popularity: Tensor


class Recommender(nn.Module):
    """Both encoders; forward is the loss."""

    def __init__(self, item_encoder: ItemEncoder, user_encoder: UserEncoder) -> None:
        super().__init__()
        self.item_encoder = item_encoder
        self.user_encoder = user_encoder

    def forward(self, batch: Batch) -> Tensor:
        return published_loss(self.item_encoder, self.user_encoder, *batch)


def train_step(model: Recommender, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """One optimizer step; returns the loss before it."""
    model.train()
    optimizer.zero_grad()
    loss = model(batch)
    loss.backward()
    optimizer.step()
    return loss.item()
