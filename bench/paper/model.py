"""XSMoE as its paper describes it (arXiv 2508.05993): one module per expert, Python loops, no optimization.

It shares no code with the library. Like the published code it computes one expert after the other, and it masks the
logits of one user after the other, in place.
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
    """A bottleneck adapter with a residual connection."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.fc_down = nn.Linear(dim, rank, bias=False)
        self.fc_up = nn.Linear(rank, dim, bias=False)
        nn.init.normal_(self.fc_down.weight, std=0.01)
        nn.init.normal_(self.fc_up.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc_up(F.gelu(self.fc_down(x)))


class Router(nn.Module):
    """Softmax gates. Row 0 is the gate of the backbone, row e that of expert e, counted from 1."""

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
        """Append one gate row: `row` (dim,), or the initial weights of a new nn.Linear."""
        old = self.linear.weight.detach()
        fresh = nn.Linear(old.shape[1], 1, bias=False).weight.detach()[0]
        self._replace(torch.cat([old, (fresh if row is None else row).to(old)[None]]))

    def _replace(self, weight: Tensor) -> None:
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight.clone())


class MoE(nn.Module):
    """The experts of one level, and the utilization of each branch; branch 0 is the backbone."""

    def __init__(self, dim: int, rank: int, num_experts: int = 1) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(dim, rank) for _ in range(num_experts))
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero. They are float64 and not part of the state dict."""
        self.norm_mass = torch.zeros(len(self.experts) + 1, dtype=torch.float64)
        self.gate_mass = torch.zeros(len(self.experts) + 1, dtype=torch.float64)

    def shares(self) -> Tensor:
        """Return each expert's share of the norms (E,), without the backbone."""
        return self.norm_mass[1:] / self.norm_mass[1:].sum()

    def forward(self, x: Tensor, backbone: Tensor, gates: Tensor) -> Tensor:
        outputs = torch.stack([backbone] + [expert(x) for expert in self.experts], dim=1)
        gated = gates.unsqueeze(-1) * outputs
        # The published code also counts in evaluation.
        self.norm_mass += gated.detach().norm(dim=-1).sum(dim=0).double().cpu()
        self.gate_mass += gates.detach().sum(dim=0).double().cpu()
        return gated.sum(dim=1)

    def least_used(self, tau: float) -> int | None:
        """Return the least used expert, counted from 0, if its share is below tau."""
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
        """Freeze all experts and append a trainable one, their mean, whose counters are zero."""
        self.experts.requires_grad_(False)
        new = copy.deepcopy(self.experts[0]).requires_grad_(True)
        with torch.no_grad():
            new.fc_down.weight.copy_(torch.stack([e.fc_down.weight for e in self.experts]).mean(dim=0))
            new.fc_up.weight.copy_(torch.stack([e.fc_up.weight for e in self.experts]).mean(dim=0))
        self.experts.append(new)
        zero = torch.zeros(1, dtype=torch.float64)
        self.norm_mass, self.gate_mass = torch.cat([self.norm_mass, zero]), torch.cat([self.gate_mass, zero])


class SideNetwork(nn.Module):
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
        """Drop at most one expert per level; return the dropped expert of each level, counted from 0, or None."""
        dropped = [moe.least_used(tau) for moe in self.moes]
        for moe, router, expert in zip(self.moes, self.routers, dropped, strict=True):
            if expert is not None:
                moe.drop(expert)
                router.drop(expert + 1)
        return dropped

    def expand(self, rows: Sequence[Tensor | None] | None = None) -> None:
        """Add one expert per level; `rows` holds the new gate row of each level."""
        for moe, router, row in zip(self.moes, self.routers, rows or [None] * len(self.moes), strict=True):
            moe.grow()
            router.grow(row)


class ItemEncoder(nn.Module):
    """One side network per modality, in the given order. A projection to (N, out_dim) of their concatenated outputs."""

    def __init__(self, dims: Mapping[str, int], num_levels: int, rank: int, out_dim: int, num_experts: int = 1) -> None:
        super().__init__()
        self.sides = nn.ModuleDict(
            {name: SideNetwork(dim, rank, num_levels, num_experts) for name, dim in dims.items()}
        )
        self.projection = nn.Linear(sum(dims.values()), out_dim)

    def forward(self, hidden: Mapping[str, Tensor]) -> Tensor:
        return self.projection(torch.cat([side(hidden[name]) for name, side in self.sides.items()], dim=-1))

    def reset(self) -> None:
        for side in self.sides.values():
            side.reset()

    def prune(self, tau: float = 0.1) -> dict[str, list[int | None]]:
        return {name: side.prune(tau) for name, side in self.sides.items()}

    def expand(self, rows: Mapping[str, Sequence[Tensor | None]] | None = None) -> None:
        for name, side in self.sides.items():
            side.expand(rows[name] if rows else None)


class Attention(nn.Module):
    """Multi-head self-attention, residual connection, LayerNorm. `bias` is added to the attention logits."""

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
    """Two linear layers with ReLU, dropout, residual connection, LayerNorm."""

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, inner)
        self.w_2 = nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x + self.dropout(self.w_2(torch.relu(self.w_1(x)))))


class Block(nn.Module):
    """A Transformer block with LayerNorm after each sublayer."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, inner, dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x, bias))


class UserEncoder(nn.Module):
    """A causal Transformer over left-padded sequences. The last input has position max_length - 1."""

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
        """Encode x (B, max_length, dim); log_mask (B, max_length) is true at real items."""
        length = x.shape[1]
        if length != self.position_embedding.num_embeddings or log_mask.shape != x.shape[:2]:
            raise ValueError(f"sequences must be padded to max_length, got {tuple(x.shape)}, {tuple(log_mask.shape)}")
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = causal & log_mask.bool()[:, None, None, :]
        # A padding query may attend to nothing. A finite bias keeps its result finite.
        least = max(-1e9, torch.finfo(x.dtype).min)
        bias = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(~allowed, least)
        x = self.dropout(self.layer_norm(x + self.position_embedding(torch.arange(length, device=x.device))))
        for block in self.blocks:
            x = block(x, bias)
        return x


def pad_sequences(sequences: Sequence[Sequence[int]], max_items: int = 11) -> Tensor:
    """Return item ids (B, max_items), padded at the front."""
    rows = [list(items)[-max_items:] for items in sequences]
    return torch.tensor([[PADDING] * (max_items - len(row)) + row for row in rows], dtype=torch.long)


def gather_hidden(table: Mapping[str, Tensor], item_ids: Tensor) -> dict[str, Tensor]:
    """Gather rows of the tables (num_items + 1, levels, dim) for all places of a batch; rows of padding are zeros."""
    ids = item_ids.reshape(-1)
    return {name: rows[ids].masked_fill((ids == PADDING)[:, None, None], 0) for name, rows in table.items()}


def item_popularity(train: Mapping[object, Sequence[int]], num_items: int) -> Tensor:
    """Return each item's share of the training interactions (num_items + 1,), float64; padding has 1."""
    counts = torch.zeros(num_items + 1, dtype=torch.float64)
    for items in train.values():
        for item in items:
            counts[item] += 1
    popularity = counts / counts.sum()
    popularity[PADDING] = 1
    return popularity


def masked_logits(queries: Tensor, embeddings: Tensor, item_ids: Tensor, popularity: Tensor) -> Tensor:
    """Return masked, logQ-corrected logits (B, S - 1, B * S) of queries (B, S - 1, d) with all places of the batch.

    embeddings (B, S, d), item_ids (B, S), popularity (num_items + 1,). The target of position j of user b is column
    b * S + j + 1. All other columns with items of this user are masked.
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


def in_batch_cross_entropy(queries: Tensor, embeddings: Tensor, item_ids: Tensor, popularity: Tensor) -> Tensor:
    """Return the mean over all positions whose input is a real item; for the arguments see `masked_logits`."""
    logits = masked_logits(queries, embeddings, item_ids, popularity)
    real = item_ids[:, :-1] != PADDING
    targets = torch.arange(item_ids.numel(), device=logits.device).view(item_ids.shape)[:, 1:]
    return F.cross_entropy(logits[real], targets[real])


def training_loss(
    item_encoder: nn.Module,
    user_encoder: nn.Module,
    hidden: Mapping[str, Tensor],
    item_ids: Tensor,
    popularity: Tensor,
) -> Tensor:
    """Return the loss of item_ids (B, S); hidden holds (B * S, levels, dim) per modality, zeros for padding."""
    embeddings = item_encoder(hidden).view(*item_ids.shape, -1)
    queries = user_encoder(embeddings[:, :-1], item_ids[:, :-1] != PADDING)
    return in_batch_cross_entropy(queries, embeddings, item_ids, popularity)


class Batch(NamedTuple):
    hidden: Mapping[str, Tensor]
    item_ids: Tensor
    popularity: Tensor


class Recommender(nn.Module):
    """Both encoders; forward returns the loss."""

    def __init__(self, item_encoder: ItemEncoder, user_encoder: UserEncoder) -> None:
        super().__init__()
        self.item_encoder = item_encoder
        self.user_encoder = user_encoder

    def forward(self, batch: Batch) -> Tensor:
        return training_loss(self.item_encoder, self.user_encoder, *batch)
