"""Merging of a little-used expert into another one."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xsmoe.nn.experts import ExpertBank


def merge_into_nearest(bank: "ExpertBank", expert: int, shares: Tensor) -> int:
    """Replace the expert nearest to `expert` by their weighted mean, in place; `expert` itself does not change.

    Gate rows are averaged with the same weights. The gate's offset becomes the logaddexp of both offsets, so the new
    gate is the sum of both gates. Call this function under `torch.no_grad`.

    Args:
        bank: a bank with at least two experts.
        expert: the index of the expert to be dropped.
        shares: (E,), each expert's share of the utilization, which is its weight in the mean.

    Returns:
        The index of the expert that was replaced.
    """
    down, up = torch.cat([bank.frozen_down, bank.down]), torch.cat([bank.frozen_up, bank.up])
    flat = torch.cat([down.flatten(1), up.flatten(1)], dim=1).double()
    distances = (flat - flat[expert]).norm(dim=1)
    distances[expert] = math.inf
    into = int(distances.argmin())
    used = float(shares[expert] + shares[into])
    weight = float(shares[expert]) / used if used else 0.5
    bank.frozen_down, bank.frozen_up = bank.frozen_down.clone(), bank.frozen_up.clone()
    held, place = (
        ((bank.frozen_down, bank.frozen_up), into)
        if into < bank.num_frozen
        else ((bank.down, bank.up), into - bank.num_frozen)
    )
    for weights, experts in zip(held, (down, up), strict=True):
        weights[place] = torch.lerp(experts[into], experts[expert], weight)
    bank.router[into + 1] = torch.lerp(bank.router[into + 1], bank.router[expert + 1], weight)
    offset = bank.offsets()
    offset[into + 1] = torch.logaddexp(offset[into + 1], offset[expert + 1])
    bank.gate_offset = offset
    return into
