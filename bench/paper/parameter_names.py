"""Our names for the parameters of the paper's formulation, and the conversion between both layouts."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.paper import model as paper
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


def user_encoder_name(name: str) -> str:
    """Return our name: `blocks.0.attention.w_q.weight` of the user encoder is our `blocks.0.query.weight`."""
    for theirs, ours in (_SUBLAYERS if name.startswith("blocks.") else _TOP).items():
        if theirs in name:
            return name.replace(theirs, ours, 1)
    raise KeyError(name)


def recommender_name(name: str) -> str:
    """Return the name in our recommender. An expert's parameter has the name of the bank's stacked parameter."""
    if name.startswith("user_encoder."):
        return "users." + user_encoder_name(name.removeprefix("user_encoder."))
    name = name.removeprefix("item_encoder.")
    if name.startswith("projection."):
        return f"items.{name}"
    _, modality, kind, level, *rest = name.split(".")
    part = "router" if kind == "routers" else rest[-2].removeprefix("fc_")
    return f"items.sides.{modality}.banks.{level}.{part}"


def to_our_layout(name: str, gradient: Tensor) -> Tensor:
    """Return a gradient of the paper's formulation in our shape, for a bank with one trainable expert."""
    if name.endswith(".down"):
        return gradient[None]
    return gradient.T[None] if name.endswith(".up") else gradient


def paper_levels(items: paper.ItemEncoder) -> Iterator[tuple[str, Any]]:
    """Yield the experts of each level with our name for the level."""
    sides: dict[str, Any] = dict(items.sides.items())
    for modality, side in sides.items():
        for level, moe in enumerate(side.moes):
            yield f"sides.{modality}.banks.{level}", moe


def our_counters(items: XSMoE) -> dict[str, Tensor]:
    """Return the utilization counters of all our levels."""
    return {
        f"sides.{modality}.banks.{level} {part}": mass
        for modality, level, bank in items.banks()
        for part, mass in (("norm", bank.utilization.norm), ("gate", bank.utilization.gate))
    }


def paper_counters(items: paper.ItemEncoder) -> dict[str, Tensor]:
    """Return the utilization counters of the paper's formulation under the same names. They are on the host."""
    return {
        f"{key} {part}": mass
        for key, moe in paper_levels(items)
        for part, mass in (("norm", moe.norm_mass), ("gate", moe.gate_mass))
    }


def copy_weights(model: paper.Recommender, state: Mapping[str, Tensor]) -> None:
    """Load our recommender's state into the paper's model with as many experts, and freeze what is frozen in ours."""
    converted = {}
    for key in model.state_dict():
        name = recommender_name(key)
        if ".experts." not in key:
            converted[key] = state[name]
            continue
        bank, _, part = name.rpartition(".")
        stacked = torch.cat([state[f"{bank}.frozen_{part}"], state[f"{bank}.{part}"]])
        weight = stacked[int(key.split(".experts.")[1].split(".")[0])]
        converted[key] = weight.T if part == "up" else weight
    model.load_state_dict(converted)
    for key, moe in paper_levels(model.item_encoder):
        moe.experts[: state[f"items.{key}.frozen_down"].shape[0]].requires_grad_(False)
