"""The training step of the paper's formulation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.core.benchmark import Tensors
from bench.e2e.models import paper_popularity, set_dropout
from bench.paper import model as paper
from bench.paper.parameter_names import recommender_name, to_our_layout

CHECK_LOSS_SCALE = 1024.0
"""Scale of float16 gradients in the correctness check. The timed step uses torch's own loss scaler."""


class PaperStep:
    """A model, its optimizer, and the input of its steps.

    Args:
        model: on its device.
        hidden: for each modality (I, levels, D), the content of the store.
        share: (I,) each item's share of the training interactions.
        lr: of Adam.
        dropout: rate in the training step.
        autocast_dtype: dtype of autocast; None disables it. float16 adds float16 hidden states and a loss scaler.
        compiled: whether torch.compile compiles both encoders.
    """

    def __init__(
        self,
        model: paper.Recommender,
        hidden: Mapping[str, Tensor],
        share: np.ndarray,
        *,
        lr: float,
        dropout: float,
        autocast_dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.dropout, self.autocast_dtype = model.train(), dropout, autocast_dtype
        self.items, self.users = model.item_encoder, model.user_encoder
        self.leaves: Tensors = {recommender_name(key): p for key, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(self.leaves.values(), lr=lr)
        if compiled:
            self.items.compile(dynamic=False)
            self.users.compile(dynamic=False)
        self._compile_first = compiled
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._scaled = autocast_dtype == torch.float16
        self._hidden = {key: table.half() for key, table in hidden.items()} if self._scaled else hidden
        self._popularity = paper_popularity(share).to(self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._scaled)

    def loss(self, inputs: Tensors, dropout: float) -> Tensor:
        """Return the loss of users (B, places) at a dropout rate."""
        set_dropout(self.model, dropout)
        ids = inputs["items"]
        hidden = {key: table[ids.flatten()].to(self._device) for key, table in self._hidden.items()}
        if self._dtype == torch.float64:
            hidden = {key: states.double() for key, states in hidden.items()}
        with torch.autocast(self._device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return paper.training_loss(self.items, self.users, hidden, ids.to(self._device) + 1, self._popularity)

    def train(self, inputs: Tensors) -> None:
        """Take a training step."""
        self.optimizer.zero_grad()
        self._scaler.scale(self.loss(inputs, self.dropout)).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def checked_loss(self, inputs: Tensors) -> Tensors:
        """Return the loss without dropout for the correctness check; `normalize` converts its gradients."""
        if self._compile_first:
            # The timed step has to be compiled here, and its dropout rate is part of the compiled code.
            self._compile_first = False
            torch.autograd.grad(self.loss(inputs, self.dropout), list(self.leaves.values()))
            self.items.reset()
        loss = self.loss(inputs, 0.0)
        return {"y": _ScaleGradient.apply(loss) if self._scaled else loss}

    def normalize(self, key: str, gradient: Tensor) -> Tensor:
        """Return a gradient of `checked_loss` in our layout and scale."""
        return to_our_layout(key, gradient / CHECK_LOSS_SCALE if self._scaled else gradient)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * CHECK_LOSS_SCALE
