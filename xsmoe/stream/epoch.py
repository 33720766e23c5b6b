"""One epoch over the training sequences of a window."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xsmoe.data import Sequences
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.batches import StepInput, feed
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.growth import count_padding
from xsmoe.stream.precision import LossScaler, autocast, divergence, hidden_dtype, steps_taken
from xsmoe.stream.seeds import derive, seeded
from xsmoe_kernels.ranges import each, named_range


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
) -> dict[str, Any]:
    """Trains on every sequence once, in an order drawn from the seed, the window and the epoch.

    Args:
        model: trained in place; its counters are reset first.
        features: the items' hidden states.
        sequences: (B,) of at least 2 items each.
        log_share: for every item the log of its share of the training interactions.
        optimizer: its learning rate is set for this epoch.
        config: learning rate, batch size, precision, protocol.
        scaler: of a float16 loss; changed in place.
        window, epoch: where in the stream this is.
        on_batch: told how many batches are done, and of how many.

    Returns:
        "lr", "steps", and the mean "loss" over all positions; with a scaler also "skipped_steps" and the "loss_scale"
        after the last step, and the mean is that of the finite losses.

    Raises:
        TrainingDiverged: the loss of some step, or a weight after the last one, is not finite; with a scaler see
            `divergence`.
    """
    device = torch.device(config.device)
    rate = max(config.min_lr, config.lr * config.lr_decay**epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.items.reset_utilization()
    model.train()
    order = np.random.default_rng(derive(config.seed, window, epoch, "order")).permutation(len(sequences))
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    losses, rows = [], []
    dtype = hidden_dtype(model, config)
    before = 0 if scaler is None else steps_taken(optimizer)

    def build(chosen: np.ndarray) -> StepInput:
        return StepInput.build(features, model.items.modalities, sequences.take(chosen), log_share, dtype)

    with seeded(derive(config.seed, window, epoch, "dropout"), device):
        for place, given in enumerate(each("data", feed(build, batches, device))):
            losses.append(train_step(model, given, optimizer, config, scaler))
            rows.append(len(given.batch.inputs))
            if config.protocol == "paper":
                with named_range("counters"):
                    count_padding(model.items, given.batch.num_padding(config.max_inputs + 1))
            on_batch(place + 1, len(batches))
    # Looked at once an epoch, because reading a loss makes the host wait for a GPU.
    values = torch.stack(losses).double().cpu().numpy()
    if (what := divergence(values, model, scaler)) is not None:
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
    """Adam over all that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    return torch.optim.Adam(parameters, lr=config.lr, fused=True)


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
