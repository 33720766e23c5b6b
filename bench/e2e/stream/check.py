"""The correctness check and the peak memory of a step, before a window is timed.

Both use copies of the models, so that the runs are not changed. The exact result is that of the paper's model with our
weights in float64, and the reference is the same model in the dtype of the run. The paper has no top-k routing: there,
our plain-PyTorch reference is used in the same two ways.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.core.benchmark import Tensors
from bench.core.correctness import judge, outcome
from bench.core.memory import measure_peak
from bench.e2e.models import PLACES, set_dropout
from bench.e2e.non_differentiable import differentiable_users
from bench.e2e.step.paper_step import PaperStep
from bench.e2e.step.training_step import TrainingStep
from bench.e2e.stream.data import StreamData
from bench.e2e.stream.records import RunRecord
from bench.e2e.stream.runs import OurRun, log_shares, pad, paper_step, paper_with_weights
from bench.e2e.stream.settings import Settings
from bench.paper.parameter_names import our_counters
from xsmoe.data import Sequences
from xsmoe.nn import Recommender
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.growth import count_padding
from xsmoe.stream.precision import hidden_dtype
from xsmoe.stream.state.seeds import seeded
from xsmoe_kernels import use_backend

CHECKED_USERS = 64
"""Users of the batch that are compared. float64 is slow."""


class WindowCheck:
    """The check of one window: `batch` are the users of a step, and `share` (I,) is each item's share in training."""

    def __init__(self, settings: Settings, data: StreamData, batch: Sequences, share: np.ndarray) -> None:
        self.settings, self.config, self.data, self.batch, self.share = settings, settings.config(), data, batch, share
        self.device, self.log_share = torch.device(settings.device), log_shares(share)

    def check(self, run: OurRun) -> RunRecord:
        """Compare loss, gradients and counters of a step of ours; if they are right, measure its peak memory."""
        model, users = run.copy(), self._compared_users(run)
        for _, _, bank in model.items.banks():
            bank.count_in_eval = True
        found = self._our_results(model, users)
        if run.top_k is None:
            exact, reference = (self._paper_results(run, users, one) for one in (torch.float64, torch.float32))
        else:
            with use_backend("reference"):
                reference = self._our_results(run.copy(), users)
                exact = self._our_results(run.copy().double(), users, torch.float64)
        dtype = torch.bfloat16 if self.settings.half else torch.float32
        record = RunRecord(*judge(found, exact, reference, dtype, TrainingStep.chained_operators))
        if record.refused is None:
            record.peak_bytes = self._peak(model, lambda: self._our_loss(model, self._step_input(model, self.batch)))
        return record

    def paper_peak(self, run: OurRun) -> int:
        """Return the peak memory of a step of the paper's formulation with as many experts as this run."""
        step, inputs = self._paper_step(run), {"items": pad(self.batch.items, self.batch.offsets, PLACES)}
        return self._peak(step.model, lambda: step.loss(inputs, self.settings.dropout))

    def _compared_users(self, run: OurRun) -> Sequences:
        users = self.batch.take(np.arange(min(CHECKED_USERS, len(self.batch))))
        if self.settings.half:
            # In 16 bits the reference has the same errors near non-differentiable points, and there are many of them.
            return users
        model = run.copy().double()
        set_dropout(model, 0.0)
        smooth = differentiable_users(model, self._step_input(model, users, torch.float64)).cpu().numpy()
        return users.take(np.flatnonzero(smooth)) if smooth.any() else users

    def _peak(self, model: nn.Module, loss: Callable[[], Tensor]) -> int:
        set_dropout(model, self.settings.dropout)
        model.train()

        def step() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            loss().backward()
            return []

        model.zero_grad(set_to_none=True)
        with seeded(self.settings.seed, self.device):
            return measure_peak(step, self.device).growth

    def _our_results(self, model: Recommender, users: Sequences, dtype: torch.dtype | None = None) -> Tensors:
        """Return loss, gradients and counters of a step without dropout; `dtype` is that of a model in float64."""
        set_dropout(model, 0.0)
        model.items.reset_utilization()
        step = self._step_input(model, users, dtype)
        loss = self._our_loss(model, step, autocast=dtype is None)
        loss.backward()
        count_padding(model.items, step.batch.num_padding(PLACES))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach()} | gradients | our_counters(model.items)

    def _our_loss(self, model: Recommender, step: StepInput, *, autocast: bool = True) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half and autocast):
            loss: Tensor = model(step.hidden, step.batch)
        return loss

    def _paper_results(self, run: OurRun, users: Sequences, dtype: torch.dtype) -> Tensors:
        """Return the same of the paper's model."""
        inputs = {"items": pad(users.items, users.offsets, PLACES), "grad": torch.ones((), device=self.device)}
        found = outcome(self._paper_step(run, dtype).implementation(), inputs)
        return {"loss": found.pop("y"), **found}

    def _paper_step(self, run: OurRun, dtype: torch.dtype = torch.float32) -> PaperStep:
        (count,) = {bank.num_experts for _, _, bank in run.model.items.banks()}
        model = paper_with_weights(self.settings, self.data, run.model.state_dict(), count).to(self.device, dtype)
        return paper_step(self.settings, self.data.table, self.share, model)

    def _step_input(self, model: Recommender, users: Sequences, dtype: torch.dtype | None = None) -> StepInput:
        features, modalities = self.data.features, model.items.modalities
        built = StepInput.build(features, modalities, users, self.log_share, dtype or hidden_dtype(model, self.config))
        return built.to(self.device)
