"""The training step of the paper's formulation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.core.benchmark import Implementation, Tensors
from bench.e2e.models import paper_popularity, set_dropout
from bench.paper import model as paper
from bench.paper.parameter_names import paper_counters, recommender_name, to_our_layout

CHECK_LOSS_SCALE = 1024.0
"""Scale of float16 gradients in the correctness check. The timed step uses torch's own loss scaler."""


class PaperStep:
    """A model, its optimizer, and the input of its steps.

    Args:
        model: on its device.
        hidden: for each modality (I + 1, levels, D); row 0 is zeros, for padding, and item i is row i + 1.
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
        """Return the loss of users at a dropout rate; "items" (B, places) are their items, -1 for padding."""
        set_dropout(self.model, dropout)
        ids = inputs["items"] + 1
        hidden = {key: table[ids.flatten()].to(self._device) for key, table in self._hidden.items()}
        if self._dtype == torch.float64:
            hidden = {key: states.double() for key, states in hidden.items()}
        with torch.autocast(self._device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            loss: Tensor = self.model(paper.Batch(hidden, ids.to(self._device), self._popularity))
        return loss

    def train(self, inputs: Tensors) -> Tensor:
        """Run a training step; return its loss."""
        self.optimizer.zero_grad()
        loss = self.loss(inputs, self.dropout)
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return loss.detach()

    def implementation(self, *, counted: bool = True) -> Implementation:
        """Return the step for the correctness check, with counters if they are `counted`, and for times."""

        def whole_step(inputs: Tensors) -> None:
            self.train(inputs)

        return Implementation(
            self._checked_loss,
            leaves=lambda _: self.leaves,
            # The paper's counters are on the host.
            counters=lambda: {
                name: mass.to(self._device) for name, mass in paper_counters(self.items).items() if counted
            },
            reset=self.items.reset,
            normalize=self._normalize,
            owned=lambda: [*self.model.parameters(), *self.model.buffers()],
            whole_step=whole_step,
        )

    def _checked_loss(self, inputs: Tensors) -> Tensors:
        """Return the loss without dropout for the correctness check; `_normalize` converts its gradients."""
        if self._compile_first:
            # The timed step has to be compiled here, and its dropout rate is part of the compiled code.
            self._compile_first = False
            torch.autograd.grad(self.loss(inputs, self.dropout), list(self.leaves.values()))
            self.items.reset()
        loss = self.loss(inputs, 0.0)
        return {"y": _ScaleGradient.apply(loss) if self._scaled else loss}

    def _normalize(self, key: str, gradient: Tensor) -> Tensor:
        """Return a gradient of `_checked_loss` in our layout and scale."""
        return to_our_layout(key, gradient / CHECK_LOSS_SCALE if self._scaled else gradient)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * CHECK_LOSS_SCALE
