"""One epoch over the training sequences of a window."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from xsmoe.stream.seeds import derive, seeded


class TrainingDiverged(ValueError):
    """The loss or the weights are no longer finite; a checkpoint never holds such weights."""


def train_epoch(
    model: Recommender,
    features: ItemFeatures,
    sequences: Sequences,
    log_share: np.ndarray,
    optimizer: torch.optim.Optimizer,
    config: StreamConfig,
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
        window, epoch: where in the stream this is.
        on_batch: told how many batches are done, and of how many.

    Returns:
        "lr", "steps", and the mean "loss" over all positions.

    Raises:
        TrainingDiverged: the loss of some step, or a weight after the last one, is not finite.
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

    def build(chosen: np.ndarray) -> StepInput:
        return StepInput.build(features, model.items.modalities, sequences.take(chosen), log_share, dtype)

    with seeded(derive(config.seed, window, epoch, "dropout"), device):
        for place, given in enumerate(feed(build, batches, device)):
            losses.append(train_step(model, given, optimizer, config))
            rows.append(len(given.batch.inputs))
            if config.protocol == "paper":
                count_padding(model.items, given.batch.num_padding(config.max_inputs + 1))
            on_batch(place + 1, len(batches))
    # Looked at once an epoch, because reading a loss makes the host wait for a GPU.
    values = torch.stack(losses).double().cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad) or not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        what = (
            f"loss is {values[bad[0]]} at step {bad[0]}" if len(bad) else "weights are not finite after the last step"
        )
        raise TrainingDiverged(
            f"window {window}, epoch {epoch}: the {what} of {len(values)}. Everything saved is from before this epoch; "
            f"start another run with a lower lr than {config.lr}, or with float32 precision"
        )
    return {"lr": rate, "steps": len(batches), "loss": float(np.average(values, weights=rows))}


def make_optimizer(model: Recommender, config: StreamConfig) -> torch.optim.Optimizer:
    """Adam over all that is trained."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    return torch.optim.Adam(parameters, lr=config.lr, fused=True)


def train_step(model: Recommender, given: StepInput, optimizer: torch.optim.Optimizer, config: StreamConfig) -> Tensor:
    """One step of the optimizer.

    Args:
        model: trained in place, in the mode it is in.
        given: the batch and its hidden states, on the model's device.
        optimizer: over the model's trainable parameters.
        config: the precision.

    Returns:
        The loss before the step, a scalar on the device, which nothing has waited for.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(config):
        loss: Tensor = model(given.hidden, given.batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


def hidden_dtype(model: Recommender, config: StreamConfig) -> torch.dtype:
    """The dtype that hidden states are wanted in: the one that the step would cast them to."""
    # Sparse routing takes its logits in float32.
    return torch.bfloat16 if _half(config) and model.items.top_k is None else torch.float32


@contextmanager
def autocast(config: StreamConfig) -> Iterator[None]:
    """The precision that the configuration asks for: bfloat16 on CUDA unless told otherwise, else float32."""
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=_half(config)):
        yield


def _half(config: StreamConfig) -> bool:
    on_cuda = torch.device(config.device).type == "cuda"
    return config.precision == "bfloat16" or (config.precision == "auto" and on_cuda)
