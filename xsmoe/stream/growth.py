"""What happens to the experts between two windows: little-used ones are dropped, then each level gets a new one."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from xsmoe.nn import XSMoE
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.seeds import derive


def grow(
    items: XSMoE, config: StreamConfig, window: int, *, trains: bool, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Prunes and then expands every level, as far as the configuration has them on; a model that was not used stays.

    Args:
        items: changed in place; its counters say how much each expert was used. A level whose counters are not finite,
            as after an overflow in float16, loses none, and they start again.
        config: thresholds and switches.
        window: the window that is about to be trained on.
        trains: whether it has anyone to train on.
        tell: told of such levels.

    Returns:
        "pruned" and "expanded": by modality, what was done at each level, as plain values.
    """
    if not trains or not any(bank.utilization.gate.any() for _, _, bank in items.banks()):
        # A random gate that is never trained, or another copy of the same mean, would only do harm.
        return {"pruned": {}, "expanded": {}}
    pruned = {}
    if config.prune:
        banks = ((f"{name} {level}", bank) for name, level, bank in items.banks() if bank.num_experts > 1)
        if uncounted := {level: bank for level, bank in banks if not bank.counts_are_finite()}:
            levels = ", ".join(uncounted)
            tell(f"window {window} prunes nothing of {levels}: rows that were not finite are in the counters")
            for bank in uncounted.values():
                bank.utilization.reset()
        pruned = items.prune(config.prune_threshold)
    generator = torch.Generator().manual_seed(derive(config.seed, window, 0, "growth"))
    expanded = items.expand(new_gate=config.new_gate, generator=generator) if config.expand else {}
    return {
        "pruned": {modality: [asdict(done) for done in levels] for modality, levels in pruned.items()},
        "expanded": {modality: [asdict(done) for done in levels] for modality, levels in expanded.items()},
    }


def grow_ids(items: XSMoE, num_items: int) -> None:
    """Give every item a row of the ID table, if the model has one; a table that is longer stays as it is."""
    if items.ids is not None:
        items.grow_ids(max(num_items, items.ids.num_items))


def count_padding(items: XSMoE, rows: int) -> None:
    """Counts rows of padding as the published code does: zeros get a uniform gate, and add nothing to the norms."""
    for _, _, bank in items.banks():
        bank.utilization.gate += rows / (bank.num_experts + 1)


def shares(items: XSMoE) -> dict[str, Any]:
    """Each expert's utilization share and each gate's, by modality and level; None where nothing was counted."""
    experts: dict[str, list[list[float | None]]] = {name: [] for name in items.modalities}
    gates: dict[str, list[list[float | None]]] = {name: [] for name in items.modalities}
    for modality, _, bank in items.banks():
        experts[modality].append(_plain(bank.utilization.shares()))
        gates[modality].append(_plain(bank.utilization.gate_shares()))
    return {"shares": experts, "gate_shares": gates}


def _plain(values: torch.Tensor) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]
