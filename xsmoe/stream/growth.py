"""What happens to the experts between two windows: little-used ones are dropped, then each level gets a new one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from xsmoe.nn import XSMoE
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.state.seeds import derive

NOVELTY_METRIC = "NDCG@10"
NOVELTY_ERRORS = 2.0


def novelty(tested: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], window: int) -> dict[str, Any]:
    """Compare a model's test on a new window with its validation on the window that it was trained on.

    The window is novel where the metric falls by more than `NOVELTY_ERRORS` standard errors of the difference. It is
    also novel where one of the two is missing, so that nothing shows that the model serves it. The result depends on
    recorded metrics only, so that a resumed run decides alike.

    Args:
        tested: the summary of the test on the window (see `summarize`).
        metrics: the lines of metrics.jsonl so far.
        window: the window that is about to be trained on.

    Returns:
        "before" and "now", the metric then and now, "noise", what a fall has to exceed, and "novel".
    """
    validated = [
        line["validation"]
        for line in metrics
        if line["kind"] in ("epoch", "window") and line["window"] == window - 1 and line["validation"] is not None
    ]
    before = _with_error(validated[-1]) if validated else None
    now = _with_error(tested)
    noise = None if before is None or now is None else NOVELTY_ERRORS * math.hypot(before[1], now[1])
    return {
        "before": before and before[0],
        "now": now and now[0],
        "noise": noise,
        "novel": before is None or now is None or noise is None or before[0] - now[0] > noise,
    }


def _with_error(summary: Mapping[str, Any]) -> tuple[float, float] | None:
    """A summary's metric and its standard error; None where fewer than two users were ranked."""
    error = summary["se"][NOVELTY_METRIC]
    return None if error is None else (summary[NOVELTY_METRIC], error)


def grow(
    items: XSMoE,
    config: StreamConfig,
    window: int,
    *,
    trains: bool,
    novel: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prunes and then expands every level, as far as the configuration has them on; a model that was not used stays.

    Args:
        items: changed in place; its counters say how much each expert was used. A level whose counters are not finite,
            as after an overflow in float16, loses none, and they start again.
        config: thresholds and switches.
        window: the window that is about to be trained on.
        trains: whether it has anyone to train on.
        novel: whether experts may change at all in this window.
        tell: told of such levels.

    Returns:
        "pruned" and "expanded": by modality, what was done at each level, as plain values.
    """
    if not trains or not novel or not any(bank.utilization.gate.any() for _, _, bank in items.banks()):
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
        pruned = items.prune(config.prune_threshold, rule=config.prune_rule)
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
