"""Before a window is timed: is a step right, and what memory does it take? Copies answer, so that no run is disturbed.

A published model with our weights stands beside ours, in float64 as the truth and in the window's dtype as the measure.
Routing to k experts is not published: there the truth is our plain PyTorch reference in float64.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench import published
from bench.gate import Verdict, judge
from bench.kinks import smooth_users
from bench.peak import measure_peak
from bench.published_names import as_ours, canonical, counters, published_counters, take_weights
from bench.steps.model import PLACES, drop_out
from bench.steps.published_step import popularity
from bench.steps.training_step import TrainingStep
from bench.stream import published_run
from bench.stream.runs import OurRun
from bench.stream.settings import Settings
from bench.stream.streams import Drawn
from xsmoe.data import Sequences
from xsmoe.nn import Recommender
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.growth import count_padding
from xsmoe.stream.precision import autocast, hidden_dtype
from xsmoe.stream.state.seeds import seeded
from xsmoe_kernels import use_backend

USERS = 64
"""Of the batch that is judged: float64 takes its time."""


class Checked(NamedTuple):
    """What a run's step gave.

    Attributes:
        verdict: whether its loss, gradients and counters are right.
        peak_bytes: by how much the allocator grew in a step's forward and backward; None if it was refused.
    """

    verdict: Verdict
    peak_bytes: int | None


class Check:
    """One window's.

    Args:
        settings: of the stream.
        drawn: the stream.
        batch: the users of a step.
        share: (I,) each item's share of the training sequences.
    """

    def __init__(self, settings: Settings, drawn: Drawn, batch: Sequences, share: np.ndarray) -> None:
        self.settings, self.config, self.drawn, self.batch = settings, settings.config(), drawn, batch
        self.device = torch.device(settings.device)
        self.popularity = popularity(share).to(self.device)
        with np.errstate(divide="ignore"):
            self.log_share = np.log(share)

    def ours(self, run: OurRun) -> Checked:
        """Judges and measures a run of ours."""
        model, few = run.copy(), self._judged(run)
        for _, _, bank in model.items.banks():
            bank.count_in_eval = True
        found = self._our_results(model, few)
        if run.top_k is None:
            exact = self._published_results(self._published(run).double(), few)
            reference = self._published_results(self._published(run), few)
        else:
            with use_backend("reference"):
                reference = self._our_results(run.copy(), few)
                exact = self._our_results(run.copy().double(), few, torch.float64)
        dtype = torch.bfloat16 if self.settings.half else torch.float32
        verdict = judge(found, exact, reference, dtype, TrainingStep.operators)
        if verdict.refused:
            return Checked(verdict, None)

        def step() -> Tensor:
            given = self._given(model, self.batch)
            with autocast(self.config):
                loss: Tensor = model(given.hidden, given.batch)
            return loss

        return Checked(verdict, self._peak(model, step))

    def _judged(self, run: OurRun) -> Sequences:
        few = self.batch.take(np.arange(min(USERS, len(self.batch))))
        if self.settings.half:
            # The measure has the same jumps, and many of them.
            return few
        model = run.copy().double()
        drop_out(model, 0.0)
        smooth = smooth_users(model, self._given(model, few, torch.float64)).cpu().numpy()
        return few.take(np.flatnonzero(smooth)) if smooth.any() else few

    def published_peak(self, run: OurRun) -> int:
        """What a step of the published formulation takes that has as many experts as this run."""
        model = self._published(run)
        ids = self._ids(self.batch)

        def step() -> Tensor:
            with autocast(self.config):
                return model(published_run.gather(self.drawn.table, ids, self.popularity))

        return self._peak(model, step)

    def _peak(self, model: nn.Module, step: Callable[[], Tensor]) -> int:
        drop_out(model, self.settings.dropout)
        model.train()

        def whole() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            step().backward()
            return []

        model.zero_grad(set_to_none=True)
        with seeded(self.settings.seed, self.device):
            return measure_peak(whole, self.device).growth

    def _published(self, run: OurRun) -> published.Recommender:
        (count,) = {bank.num_experts for _, _, bank in run.model.items.banks()}
        model = published_run.build(self.settings, list(self.drawn.table), count)
        take_weights(model, run.model.state_dict())
        return model.to(self.device).train()

    def _our_results(self, model: Recommender, users: Sequences, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        drop_out(model, 0.0)
        model.items.reset_utilization()
        given = self._given(model, users, dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half and dtype is None):
            loss: Tensor = model(given.hidden, given.batch)
        loss.backward()
        count_padding(model.items, given.batch.num_padding(PLACES))
        return _results(loss, model, lambda name: name, lambda name, gradient: gradient, counters(model.items))

    def _published_results(self, model: published.Recommender, users: Sequences) -> dict[str, Tensor]:
        drop_out(model, 0.0)
        batch = published_run.gather(self.drawn.table, self._ids(users), self.popularity)
        double = next(model.parameters()).dtype == torch.float64
        if double:
            batch = batch._replace(hidden={name: rows.double() for name, rows in batch.hidden.items()})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half and not double):
            loss = model(batch)
        loss.backward()
        return _results(loss, model, canonical, as_ours, published_counters(model.item_encoder))

    def _given(self, model: Recommender, users: Sequences, dtype: torch.dtype | None = None) -> StepInput:
        features, modalities = self.drawn.features, model.items.modalities
        built = StepInput.build(features, modalities, users, self.log_share, dtype or hidden_dtype(model, self.config))
        return built.to(self.device)

    def _ids(self, users: Sequences) -> Tensor:
        return published_run.padded(users.items, users.offsets, PLACES)


def _results(
    loss: Tensor,
    model: nn.Module,
    name_of: Callable[[str], str],
    shaped: Callable[[str, Tensor], Tensor],
    counted: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Loss, gradients and counters under our names, on the host."""
    found = {"loss": loss.detach()}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[name_of(key)] = shaped(name_of(key), parameter.grad)
    return {name: value.cpu() for name, value in (found | dict(counted)).items()}
