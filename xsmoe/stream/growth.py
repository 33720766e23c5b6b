"""Growth between two windows: little-used experts are pruned, then each level gets a new expert."""

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
    """Compare a model's test on a new window with its validation on the previous window.

    The window is novel if the metric decreases by more than `NOVELTY_ERRORS` standard errors of the difference. It is
    also novel if one of the two results is missing. The result depends only on recorded metrics, so a resumed run
    decides in the same way.

    Args:
        tested: summary of the test on the window (see `summarize`).
        metrics: lines of metrics.jsonl so far.
        window: the next window to train on.

    Returns:
        "before" and "now", the metric on the previous and on the new window; "noise", the threshold for a decrease;
        and "novel".
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
    """Return a summary's metric and its standard error; None if fewer than two users were ranked."""
    error = summary["se"][NOVELTY_METRIC]
    return None if error is None else (summary[NOVELTY_METRIC], error)


def grow(
    items: XSMoE,
    config: StreamConfig,
    window: int,
    *,
    trains: bool,
    novel: bool = True,
    warn: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prune and then expand every level, if the settings enable this. A model without utilization does not change.

    Args:
        items: changed in place. Its counters hold the utilization of each expert. A level whose counters are not
            finite, as after an overflow in float16, is not pruned, and its counters are reset.
        config: thresholds and switches.
        window: the next window to train on.
        trains: whether the window has training sequences.
        novel: whether experts may change in this window.
        warn: called with a message about levels whose counters are not finite.

    Returns:
        "pruned" and "expanded": the changes at each level by modality, as plain values.
    """
    if not trains or not novel or not any(bank.utilization.gate.any() for _, _, bank in items.banks()):
        # An untrained random gate, or another copy of the same mean, would only reduce quality.
        return {"pruned": {}, "expanded": {}}
    pruned = {}
    if config.prune:
        banks = ((f"{name} {level}", bank) for name, level, bank in items.banks() if bank.num_experts > 1)
        if uncounted := {level: bank for level, bank in banks if not bank.counts_are_finite()}:
            levels = ", ".join(uncounted)
            warn(f"window {window} does not prune {levels}: the utilization counters are not finite")
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
    """Extend the ID table, if the model has one, to at least `num_items` rows."""
    if items.ids is not None:
        items.grow_ids(max(num_items, items.ids.num_items))


def count_padding(items: XSMoE, rows: int) -> None:
    """Count padding rows like the published code: zeros have a uniform gate and add nothing to the norms."""
    for _, _, bank in items.banks():
        bank.utilization.gate += rows / (bank.num_experts + 1)


def shares(items: XSMoE) -> dict[str, Any]:
    """Return the shares of each expert's utilization and of each gate by modality and level; None without counts."""
    experts: dict[str, list[list[float | None]]] = {name: [] for name in items.modalities}
    gates: dict[str, list[list[float | None]]] = {name: [] for name in items.modalities}
    for modality, _, bank in items.banks():
        experts[modality].append(_plain(bank.utilization.shares()))
        gates[modality].append(_plain(bank.utilization.gate_shares()))
    return {"shares": experts, "gate_shares": gates}


def _plain(values: torch.Tensor) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]
