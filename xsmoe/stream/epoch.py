"""One epoch over the training sequences of a window."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xsmoe.data import Sequences
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import LazyAdam, Recommender
from xsmoe.stream.batches.builder import StepInput
from xsmoe.stream.batches.id_dropout import IdDropout
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.batches.prefetch import feed
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.graph_steps import CapturedSteps, wanted
from xsmoe.stream.growth import count_padding
from xsmoe.stream.precision import LossScaler, autocast, divergence, hidden_dtype, steps_taken
from xsmoe.stream.state.seeds import derive, seeded
from xsmoe_kernels.runtime.profiler_ranges import each, named_range


class TrainingDiverged(ValueError):
    """The loss or the weights are no longer finite; a checkpoint never holds such weights."""


def train_epoch(
    model: Recommender,
    features: ItemFeatures,
    sequences: Sequences,
    log_share: np.ndarray,
    optimizer: torch.optim.Optimizer,
    config: StreamConfig,
    scaler: LossScaler | None = None,
    *,
    window: int,
    epoch: int,
    on_batch: Callable[[int, int], None],
    graphs: CapturedSteps | None = None,
) -> dict[str, Any]:
    """Trains on every sequence once, in an order drawn from the seed, the window and the epoch.

    On CUDA the host waits for the device once, at the end, where nothing is left to run, and when a graph is captured;
    with a scaler, before the first step and a few times more at the end.

    Args:
        model: trained in place; its counters are reset first.
        features: the items' hidden states.
        sequences: (B,) of at least 2 items each.
        log_share: for every item the log of its share of the training interactions.
        optimizer: from `make_optimizer`; its learning rate is set for this epoch.
        config: learning rate, batch size, precision, protocol.
        scaler: of a float16 loss; changed in place.
        window, epoch: where in the stream this is.
        on_batch: told how many batches are done, and of how many; on CUDA, how many were launched.
        graphs: of this window; its batches are padded, and its steps are replayed where they can be. None does neither.

    Returns:
        "lr", "steps", and the mean "loss" over all positions; with a scaler also "skipped_steps" and the "loss_scale"
        after the last step, and the mean is that of the finite losses.

    Raises:
        TrainingDiverged: the loss of some step, or a weight after the last one, is not finite; with a scaler see
            `divergence`.
    """
    device = torch.device(config.device)
    rate = max(config.min_lr, config.lr * config.lr_decay**epoch)
    _set_rate(optimizer, rate)
    model.items.reset_utilization()
    model.train()
    order = np.random.default_rng(derive(config.seed, window, epoch, "order")).permutation(len(sequences))
    size = config.batch_for(len(sequences))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    losses, rows = [], []
    dtype = hidden_dtype(model, config)
    before = 0 if scaler is None else steps_taken(optimizer)
    capacity = None
    if graphs is not None:
        capacity = Capacity(min(size, len(sequences)), config.max_inputs)
        graphs.forget_if_moved()

    dropout = IdDropout(config.id_dropout, config.seed, window, epoch)

    def build(numbered: tuple[int, np.ndarray]) -> StepInput:
        number, chosen = numbered
        ids = partial(dropout, step=number) if model.items.with_ids else None
        modalities, taken = model.items.modalities, sequences.take(chosen)
        return StepInput.build(features, modalities, taken, log_share, dtype, capacity, ids)

    def step(given: StepInput) -> Tensor:
        return train_step(model, given.gathered(features, dtype), optimizer, config, scaler)

    with seeded(derive(config.seed, window, epoch, "dropout"), device):
        for place, given in enumerate(each("data", feed(build, enumerate(batches), device))):
            losses.append(step(given) if graphs is None else graphs(step, given))
            rows.append(given.num_inputs)
            if config.protocol == "paper":
                with named_range("counters"):
                    count_padding(model.items, given.num_users * config.max_inputs - given.num_inputs)
            on_batch(place + 1, len(batches))
    # Looked at once an epoch, because reading makes the host wait for a GPU.
    sound = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    *read, finite_weights = torch.cat([torch.stack(losses).double(), sound[None].double()]).tolist()
    values = np.array(read)
    if (what := divergence(values, bool(finite_weights), scaler)) is not None:
        raise TrainingDiverged(
            f"window {window}, epoch {epoch}: the {what} of {len(values)}. Everything saved is from before this epoch; "
            f"start another run with a lower lr than {config.lr}, or with float32 precision"
        )
    finite = np.isfinite(values)
    trained = {"lr": rate, "steps": len(batches)}
    trained["loss"] = float(np.average(values[finite], weights=np.array(rows)[finite]))
    if scaler is not None:
        trained["skipped_steps"] = len(batches) - (steps_taken(optimizer) - before)
        trained["loss_scale"] = scaler.scale()
    return trained


def make_optimizer(model: Recommender, config: StreamConfig) -> torch.optim.Optimizer:
    """Adam over all that is trained, lazy on the ID table.

    Where steps may be captured, its learning rate lies on the device.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    rate = torch.tensor(config.lr, device=config.device) if wanted(config) else config.lr
    return LazyAdam(parameters, lr=rate)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over the moments of a `state_dict`, which may come from a run without graphs, or from another device."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            # A graph reads it where it lies.
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def train_step(
    model: Recommender,
    given: StepInput,
    optimizer: torch.optim.Optimizer,
    config: StreamConfig,
    scaler: LossScaler | None = None,
) -> Tensor:
    """One step of the optimizer.

    Args:
        model: trained in place, in the mode it is in.
        given: the batch and its hidden states, on the model's device.
        optimizer: over the model's trainable parameters.
        config: the precision.
        scaler: of a float16 loss.

    Returns:
        The loss before the step, a scalar on the device, which nothing has waited for.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(config):
        loss: Tensor = model(given.hidden, given.batch)
    if scaler is not None:
        scaler.step(loss, optimizer)
    else:
        with named_range("backward"):
            loss.backward()
        with named_range("optimizer"):
            optimizer.step()
    return loss.detach()
