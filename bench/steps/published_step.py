"""What the published formulation trains a step with."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import published
from bench.published_names import as_ours, canonical
from bench.steps.model import BLOCKS, LEVELS, OUT_DIM, PLACES, drop_out
from bench.workload import Tensors

GATE_SCALE = 1024.0
"""What gradients in float16 are multiplied by on their way to the gate; the clock sees torch's own scaler."""


class PublishedStep:
    """A model, its optimizer, and what feeds its steps.

    Args:
        model: on its device.
        hidden: for each modality (I, levels, D), what the store holds.
        share: (I,) each item's share of the training interactions.
        lr: of Adam.
        dropout: its rate in a step that trains.
        narrow: what autocast casts to; None for none. float16 comes with a loss scaler, and float16 hidden states.
        compiled: whether torch.compile makes both encoders.
    """

    def __init__(
        self,
        model: published.Recommender,
        hidden: Mapping[str, Tensor],
        share: np.ndarray,
        *,
        lr: float,
        dropout: float,
        narrow: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.dropout, self.narrow = model.train(), dropout, narrow
        self.items, self.users = model.item_encoder, model.user_encoder
        self.leaves: Tensors = {canonical(key): p for key, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(self.leaves.values(), lr=lr)
        if compiled:
            self.items.compile(dynamic=False)
            self.users.compile(dynamic=False)
        self._uncompiled = compiled
        some = next(model.parameters())
        self._device, self._dtype = some.device, some.dtype
        self._scaled = narrow == torch.float16
        self._hidden = {key: table.half() for key, table in hidden.items()} if self._scaled else hidden
        self._popularity = popularity(share).to(self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._scaled)

    def loss(self, rows: Tensors, dropout: float) -> Tensor:
        """Of users (B, places), with dropout at that rate."""
        drop_out(self.model, dropout)
        ids = rows["items"]
        hidden = {key: table[ids.flatten()].to(self._device) for key, table in self._hidden.items()}
        if self._dtype == torch.float64:
            hidden = {key: states.double() for key, states in hidden.items()}
        with torch.autocast(self._device.type, self.narrow, enabled=self.narrow is not None):
            return published.published_loss(self.items, self.users, hidden, ids.to(self._device) + 1, self._popularity)

    def train(self, rows: Tensors) -> None:
        """A step."""
        self.optimizer.zero_grad()
        self._scaler.scale(self.loss(rows, self.dropout)).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def judged(self, rows: Tensors) -> Tensors:
        """What the gate sees: the loss without dropout, whose gradients `tidy` makes those of ours."""
        if self._uncompiled:
            # What is timed has to be compiled by now, and the rate of a dropout is compiled in.
            self._uncompiled = False
            torch.autograd.grad(self.loss(rows, self.dropout), list(self.leaves.values()))
            self.items.reset()
        loss = self.loss(rows, 0.0)
        return {"y": _ScaledGradient.apply(loss) if self._scaled else loss}

    def tidy(self, key: str, gradient: Tensor) -> Tensor:
        """A leaf's gradient of `judged` as ours is."""
        return as_ours(key, gradient / GATE_SCALE if self._scaled else gradient)


class _ScaledGradient(torch.autograd.Function):
    """A result as it is, whose gradient grows."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * GATE_SCALE


def published_model(
    modalities: Iterable[str], dim: int, rank: int, num_experts: int, dropout: float
) -> published.Recommender:
    """The published model of a step's sizes, with all its experts trainable."""
    items = published.ItemEncoder(dict.fromkeys(modalities, dim), LEVELS, rank, OUT_DIM, num_experts)
    users = published.UserEncoder(OUT_DIM, blocks=BLOCKS, dropout=dropout, max_length=PLACES - 1)
    return published.Recommender(items, users)


def popularity(share: np.ndarray) -> Tensor:
    """Each item's share behind that of padding, which is 1: (items + 1,)."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.from_numpy(share)])
