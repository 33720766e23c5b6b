"""One training epoch over the sequences of a window."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xsmoe.data import Sequences
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import LazyAdam, Recommender
from xsmoe.stream.batches.builder import IdDropout, StepInput
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.batches.prefetch import prefetch
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.graph_steps import GraphedSteps, graphs_requested
from xsmoe.stream.growth import count_padding
from xsmoe.stream.precision import LossScaler, autocast, divergence, hidden_dtype, steps_taken
from xsmoe.stream.state.seeds import derive, seeded
from xsmoe_kernels.runtime.profiler_ranges import each, named_range


class TrainingDiverged(ValueError):
    """The loss or the weights are not finite. These weights are not saved in a checkpoint."""


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
    graphs: GraphedSteps | None = None,
) -> dict[str, Any]:
    """Train on every sequence once. The order depends on the seed, the window and the epoch.

    On CUDA the host synchronizes with the device once, at the end, and at each capture of a graph. With a scaler it
    also synchronizes before the first step and a few times at the end.

    Args:
        model: trained in place. Its counters are reset first.
        features: the items' hidden states.
        sequences: (B,) sequences of at least 2 items each.
        log_share: for every item the log of its share of the training interactions.
        optimizer: from `make_optimizer`. Its learning rate is set for this epoch.
        config: learning rate, batch size, precision, protocol.
        scaler: loss scaler for float16, changed in place.
        window, epoch: position in the stream.
        on_batch: called with the number of finished batches (on CUDA: launched batches) and the number of all batches.
        graphs: graphs of this window. Batches are padded, and steps are replayed where possible. None does neither.

    Returns:
        "lr", "steps", and the mean "loss" over all positions. With a scaler also "skipped_steps" and the "loss_scale"
        after the last step; the mean then covers the finite losses.

    Raises:
        TrainingDiverged: the loss of a step, or a weight after the last step, is not finite; with a scaler see
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
        graphs.drop_if_moved()

    dropout = IdDropout(config.id_dropout, config.seed, window, epoch)

    def build(numbered: tuple[int, np.ndarray]) -> StepInput:
        number, chosen = numbered
        ids = partial(dropout, step=number) if model.items.with_ids else None
        modalities, batch = model.items.modalities, sequences.take(chosen)
        return StepInput.build(features, modalities, batch, log_share, dtype, capacity, ids)

    def step(given: StepInput) -> Tensor:
        return train_step(model, given.with_hidden(features, dtype), optimizer, config, scaler)

    with seeded(derive(config.seed, window, epoch, "dropout"), device):
        for place, given in enumerate(each("data", prefetch(build, enumerate(batches), device))):
            losses.append(step(given) if graphs is None else graphs(step, given))
            rows.append(given.num_inputs)
            if config.protocol == "paper":
                with named_range("counters"):
                    count_padding(model.items, given.num_users * config.max_inputs - given.num_inputs)
            on_batch(place + 1, len(batches))
    # Read once per epoch, because reading synchronizes with the GPU.
    finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    *read, finite_weights = torch.cat([torch.stack(losses).double(), finite[None].double()]).tolist()
    values = np.array(read)
    if (what := divergence(values, bool(finite_weights), scaler)) is not None:
        raise TrainingDiverged(
            f"window {window}, epoch {epoch}: {what}. All saved files are from before this epoch; start another run "
            f"with a lower lr than {config.lr}, or with float32 precision"
        )
    valid = np.isfinite(values)
    trained = {"lr": rate, "steps": len(batches)}
    trained["loss"] = float(np.average(values[valid], weights=np.array(rows)[valid]))
    if scaler is not None:
        trained["skipped_steps"] = len(batches) - (steps_taken(optimizer) - before)
        trained["loss_scale"] = scaler.scale()
    return trained


def make_optimizer(model: Recommender, config: StreamConfig) -> torch.optim.Optimizer:
    """Return Adam over all trainable parameters, lazy on the ID table.

    If steps may be captured as CUDA graphs, its learning rate is a tensor on the device.
    """
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    rate = torch.tensor(config.lr, device=config.device) if graphs_requested(config) else config.lr
    return LazyAdam(parameters, lr=rate)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments of a `state_dict`. It may be from a run without graphs, or from another device."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            # Changed in place, because a CUDA graph reads this tensor.
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
    """Run one training step: forward, backward and optimizer.

    Args:
        model: trained in place. Its training or evaluation mode is not changed.
        given: the batch and its hidden states, on the model's device.
        optimizer: optimizer of the model's trainable parameters.
        config: the precision.
        scaler: loss scaler for float16.

    Returns:
        The loss before the step, a scalar on the device. The host does not synchronize.
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
