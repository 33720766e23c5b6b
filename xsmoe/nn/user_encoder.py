"""The user encoder: a causal Transformer over the embeddings of a user's items."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xsmoe.nn.dropout import Dropout
from xsmoe.nn.pretrained import Pretrained
from xsmoe_kernels import packed_attention
from xsmoe_kernels.runtime import checks

NORM_EPS = 1e-6


class UserEncoder(Pretrained):
    """Post-norm causal Transformer over concatenated sequences, arXiv 2508.05993.

    Positions are right-aligned: the last item of every sequence has position `max_length - 1`.

    Args:
        dim: width of the item embeddings and of the queries.
        num_blocks: Transformer blocks.
        num_heads: attention heads; must divide `dim`.
        inner_dim: width of the feed-forward layers.
        dropout: probability for embeddings, attention weights and the outputs of both sublayers.
        max_length: maximum number of items of a sequence.
    """

    def __init__(
        self,
        dim: int = 128,
        num_blocks: int = 2,
        num_heads: int = 2,
        inner_dim: int = 512,
        dropout: float = 0.1,
        max_length: int = 10,
    ) -> None:
        super().__init__()
        dim, num_heads = checks.integer("dim", dim, 1), checks.integer("num_heads", num_heads, 1)
        num_blocks, inner_dim = checks.integer("num_blocks", num_blocks, 0), checks.integer("inner_dim", inner_dim, 1)
        max_length = checks.integer("max_length", max_length, 1)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, but is {num_heads}")
        self.dim, self.num_heads, self.inner_dim, self.max_length = dim, num_heads, inner_dim, max_length
        self.positions = nn.Embedding(max_length, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, inner_dim, dropout) for _ in range(num_blocks))
        self.reset_parameters()

    def config(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "num_blocks": len(self.blocks),
            "num_heads": self.num_heads,
            "inner_dim": self.inner_dim,
            "dropout": self.dropout.p,
            "max_length": self.max_length,
        }

    def reset_parameters(self) -> None:
        """Draw the published initial weights: Xavier normal, zero bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, items: Tensor, offsets: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """Return the query of each item for the item that follows it.

        Args:
            items: (M, dim), the concatenated item embeddings of all sequences. Rows after the last sequence are
                padding; the other rows do not depend on them.
            offsets: (B + 1,) int64; sequence b is the rows offsets[b]:offsets[b + 1], at most `max_length`.
            lengths: the sequences' lengths on the host. xformers attention on CUDA requires them.

        Returns:
            (M, dim).
        """
        if checks.values_visible(offsets) and not torch.compiler.is_compiling():
            longest = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
            if longest > self.max_length:
                raise ValueError(f"offsets define a sequence of {longest} items, but max_length is {self.max_length}")
        row = torch.arange(items.shape[0], device=items.device)
        ends = offsets[1:].contiguous()
        sequence = torch.searchsorted(ends, row, right=True).clamp_(max=ends.shape[0] - 1)
        # A padding row comes after the end of its sequence, where no position exists: clamp it.
        position = (self.max_length - ends[sequence] + row).clamp_(max=self.max_length - 1)
        x = self.dropout(self.norm(items + self.positions(position)))
        for block in self.blocks:
            x = block(x, offsets, self.max_length, lengths)
        return x


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each followed by a residual addition and a LayerNorm."""

    def __init__(self, dim: int, num_heads: int, inner_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.attention_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.inner = nn.Linear(dim, inner_dim)
        self.outer = nn.Linear(inner_dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, offsets: Tensor, max_length: int, lengths: Sequence[int] | None) -> Tensor:
        """Transform (M, dim) to (M, dim)."""
        q, k, v = (rows.unflatten(1, (self.num_heads, -1)) for rows in self._projected(x))
        attended = packed_attention(
            q,
            k,
            v,
            offsets,
            max_length=max_length,
            lengths=lengths,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        x = self.attention_norm(x + self.dropout(self.output(attended.flatten(1))))
        return self.feed_forward_norm(x + self.dropout(self.outer(functional.relu(self.inner(x)))))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (M, dim) each."""
        layers = self.query, self.key, self.value
        # In float32 on a CPU one wide product is not faster, and its gradient would have to be concatenated.
        narrow = x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        if narrow and all(map(_is_plain, layers)):
            return functional.linear(x, torch.cat([layer.weight for layer in layers])).chunk(3, dim=1)
        return tuple(layer(x) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is a plain `nn.Linear` without hooks."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
