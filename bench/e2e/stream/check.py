"""The correctness check and the peak memory of a step, before a window is timed.

Both use copies of the models, so that the runs are not changed. The exact result is that of the paper's model with our
weights in float64, and the reference is the same model in the dtype of the run. The paper has no top-k routing: there,
our plain-PyTorch reference is used in the same two ways.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.core.correctness import Verdict, judge
from bench.core.memory import measure_peak
from bench.e2e.models import PLACES, paper_popularity, set_dropout
from bench.e2e.non_differentiable import differentiable_users
from bench.e2e.step.training_step import TrainingStep
from bench.e2e.stream import paper_run
from bench.e2e.stream.data import StreamData
from bench.e2e.stream.runs import OurRun
from bench.e2e.stream.settings import Settings
from bench.paper import model as paper
from bench.paper.parameter_names import copy_weights, our_counters, paper_counters, recommender_name, to_our_layout
from xsmoe.data import Sequences
from xsmoe.nn import Recommender
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.growth import count_padding
from xsmoe.stream.precision import autocast, hidden_dtype
from xsmoe.stream.state.seeds import seeded
from xsmoe_kernels import use_backend

CHECKED_USERS = 64
"""Users of the batch that are compared. float64 is slow."""


class Checked(NamedTuple):
    """The result of a check.

    Attributes:
        verdict: on loss, gradients and counters.
        peak_bytes: growth of the allocator in forward and backward of a step; None if the step was refused.
    """

    verdict: Verdict
    peak_bytes: int | None


class WindowCheck:
    """The check of one window.

    Args:
        settings: of the stream.
        data: the stream.
        batch: the users of a step.
        share: (I,) each item's share of the training sequences.
    """

    def __init__(self, settings: Settings, data: StreamData, batch: Sequences, share: np.ndarray) -> None:
        self.settings, self.config, self.data, self.batch = settings, settings.config(), data, batch
        self.device = torch.device(settings.device)
        self.popularity = paper_popularity(share).to(self.device)
        with np.errstate(divide="ignore"):
            self.log_share = np.log(share)

    def check(self, run: OurRun) -> Checked:
        """Compare a step of one of our runs, and measure its peak memory."""
        model, users = run.copy(), self._compared_users(run)
        for _, _, bank in model.items.banks():
            bank.count_in_eval = True
        found = self._our_results(model, users)
        if run.top_k is None:
            exact = self._paper_results(self._paper_model(run).double(), users)
            reference = self._paper_results(self._paper_model(run), users)
        else:
            with use_backend("reference"):
                reference = self._our_results(run.copy(), users)
                exact = self._our_results(run.copy().double(), users, torch.float64)
        dtype = torch.bfloat16 if self.settings.half else torch.float32
        verdict = judge(found, exact, reference, dtype, TrainingStep.chained_operators)
        if verdict.refused:
            return Checked(verdict, None)

        def loss() -> Tensor:
            step = self._step_input(model, self.batch)
            with autocast(self.config):
                result: Tensor = model(step.hidden, step.batch)
            return result

        return Checked(verdict, self._peak(model, loss))

    def paper_peak(self, run: OurRun) -> int:
        """Return the peak memory of a step of the paper's formulation with as many experts as this run."""
        model = self._paper_model(run)
        ids = self._ids(self.batch)

        def loss() -> Tensor:
            with autocast(self.config):
                return model(paper_run.gather_batch(self.data.table, ids, self.popularity))

        return self._peak(model, loss)

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

    def _paper_model(self, run: OurRun) -> paper.Recommender:
        (count,) = {bank.num_experts for _, _, bank in run.model.items.banks()}
        model = paper_run.build_model(self.settings, self.data, count)
        copy_weights(model, run.model.state_dict())
        return model.to(self.device).train()

    def _our_results(self, model: Recommender, users: Sequences, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        set_dropout(model, 0.0)
        model.items.reset_utilization()
        step = self._step_input(model, users, dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half and dtype is None):
            loss: Tensor = model(step.hidden, step.batch)
        loss.backward()
        count_padding(model.items, step.batch.num_padding(PLACES))
        return _results(loss, model, lambda name: name, lambda name, gradient: gradient, our_counters(model.items))

    def _paper_results(self, model: paper.Recommender, users: Sequences) -> dict[str, Tensor]:
        set_dropout(model, 0.0)
        batch = paper_run.gather_batch(self.data.table, self._ids(users), self.popularity)
        double = next(model.parameters()).dtype == torch.float64
        if double:
            batch = batch._replace(hidden={name: rows.double() for name, rows in batch.hidden.items()})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half and not double):
            loss = model(batch)
        loss.backward()
        return _results(loss, model, recommender_name, to_our_layout, paper_counters(model.item_encoder))

    def _step_input(self, model: Recommender, users: Sequences, dtype: torch.dtype | None = None) -> StepInput:
        features, modalities = self.data.features, model.items.modalities
        built = StepInput.build(features, modalities, users, self.log_share, dtype or hidden_dtype(model, self.config))
        return built.to(self.device)

    def _ids(self, users: Sequences) -> Tensor:
        return paper_run.pad(users.items, users.offsets, PLACES)


def _results(
    loss: Tensor,
    model: nn.Module,
    our_name: Callable[[str], str],
    to_layout: Callable[[str, Tensor], Tensor],
    counters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return loss, gradients and counters under our names, on the host."""
    found = {"loss": loss.detach()}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[our_name(key)] = to_layout(our_name(key), parameter.grad)
    return {name: value.cpu() for name, value in (found | dict(counters)).items()}
