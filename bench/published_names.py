"""Which parameter of the published formulation is which of ours, and how one becomes the other."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench import published
from xsmoe.nn import XSMoE

_SUBLAYERS = {
    "attention.w_q.": "query.",
    "attention.w_k.": "key.",
    "attention.w_v.": "value.",
    "attention.fc.": "output.",
    "attention.layer_norm.": "attention_norm.",
    "feed_forward.w_1.": "inner.",
    "feed_forward.w_2.": "outer.",
    "feed_forward.layer_norm.": "feed_forward_norm.",
}
_TOP = {"position_embedding.": "positions.", "layer_norm.": "norm."}


def our_name(published: str) -> str:
    """`blocks.0.attention.w_q.weight` of the user encoder is our `blocks.0.query.weight`."""
    for theirs, ours in (_SUBLAYERS if published.startswith("blocks.") else _TOP).items():
        if theirs in published:
            return published.replace(theirs, ours, 1)
    raise KeyError(published)


def canonical(published: str) -> str:
    """Our recommender's name of a parameter; an expert's is that of its bank's weight."""
    if published.startswith("user_encoder."):
        return "users." + our_name(published.removeprefix("user_encoder."))
    name = published.removeprefix("item_encoder.")
    if name.startswith("projection."):
        return f"items.{name}"
    _, modality, kind, level, *rest = name.split(".")
    part = "router" if kind == "routers" else rest[-2].removeprefix("fc_")
    return f"items.sides.{modality}.banks.{level}.{part}"


def as_ours(name: str, gradient: Tensor) -> Tensor:
    """A gradient of the published formulation in the shape of ours, for a bank with one trainable expert."""
    if name.endswith(".down"):
        return gradient[None]
    return gradient.T[None] if name.endswith(".up") else gradient


def published_levels(items: published.ItemEncoder) -> Iterator[tuple[str, Any]]:
    """The experts of every level, under our name for it."""
    ladders: dict[str, Any] = dict(items.ladders.items())
    for modality, ladder in ladders.items():
        for level, moe in enumerate(ladder.moes):
            yield f"sides.{modality}.banks.{level}", moe


def counters(items: XSMoE) -> dict[str, Tensor]:
    """The counters of all our levels."""
    return {
        f"sides.{modality}.banks.{level} {part}": mass
        for modality, level, bank in items.banks()
        for part, mass in (("norm", bank.utilization.norm), ("gate", bank.utilization.gate))
    }


def published_counters(items: published.ItemEncoder) -> dict[str, Tensor]:
    """The same of the published formulation, which keeps them on the host."""
    return {
        f"{key} {part}": mass
        for key, moe in published_levels(items)
        for part, mass in (("norm", moe.norm_mass), ("gate", moe.gate_mass))
    }


def take_weights(model: published.Recommender, weights: Mapping[str, Tensor]) -> None:
    """Gives the published model, of the same numbers of experts, our recommender's state; what is frozen stays so."""
    state = {}
    for key in model.state_dict():
        name = canonical(key)
        if ".experts." not in key:
            state[key] = weights[name]
            continue
        bank, _, part = name.rpartition(".")
        every = torch.cat([weights[f"{bank}.frozen_{part}"], weights[f"{bank}.{part}"]])
        weight = every[int(key.split(".experts.")[1].split(".")[0])]
        state[key] = weight.T if part == "up" else weight
    model.load_state_dict(state)
    for key, moe in published_levels(model.item_encoder):
        moe.experts[: weights[f"items.{key}.frozen_down"].shape[0]].requires_grad_(False)
