"""The variants that `python -m bench quality` compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BASE = "base"
GROWTH = "growth"
Kind = Literal["side", "static", "linear"]


@dataclass(frozen=True)
class QualityVariant:
    """A choice of settings.

    Attributes:
        name: used in tables and files.
        sentence: describes the variant to the reader.
        settings: the settings that differ from the defaults, by the names that `RunConfig.new` accepts.
        kind: the item encoder: "side", the side network; "static", a side network that starts with the final number of
            experts of the run with growth; "linear", a linear head on the last level.
    """

    name: str
    sentence: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "side"


_GROWTH_SETTINGS = {"expand": True, "prune": True}

VARIANTS = {
    one.name: one
    for one in (
        QualityVariant(BASE, "The defaults."),
        QualityVariant(
            GROWTH,
            "Every window adds an expert, and little-used experts are dropped, as in the paper.",
            _GROWTH_SETTINGS,
        ),
        QualityVariant(
            "static",
            "The experts that growth has at its end, with the same seed, exist from the start.",
            kind="static",
        ),
        QualityVariant("no-prune", "Experts are added and none is dropped.", {"expand": True}),
        QualityVariant(
            "mean-gate",
            "The gate row of a new expert is the mean of the other rows.",
            _GROWTH_SETTINGS | {"new_gate": "mean"},
        ),
        QualityVariant(
            "copy",
            "A new expert splits the most used one, which leaves the function unchanged.",
            _GROWTH_SETTINGS | {"new_gate": "copy"},
        ),
        QualityVariant(
            "merge",
            "A little-used expert is merged into the nearest one.",
            _GROWTH_SETTINGS | {"prune_rule": "merge"},
        ),
        QualityVariant(
            "copy-merge",
            "New experts are splits, and little-used ones are merged.",
            _GROWTH_SETTINGS | {"new_gate": "copy", "prune_rule": "merge"},
        ),
        QualityVariant(
            "novelty",
            "Experts change only in windows with data that the model does not fit yet.",
            _GROWTH_SETTINGS | {"grow": "novelty"},
        ),
        QualityVariant("condition-none", "Hidden states are not conditioned.", {"condition": "none"}),
        QualityVariant("condition-standardize", "Hidden states are standardized.", {"condition": "standardize"}),
        QualityVariant("no-ids", "Items have no ID embedding.", {"ids": False}),
        QualityVariant("history-last", "Only the last sequence of a user in a window is used.", {"history": "last"}),
        QualityVariant("keep-best", "The best epoch by validation is kept.", {"keep": "best"}),
        QualityVariant("keep-last", "The last epoch is kept, not the average of the epochs.", {"keep": "last"}),
        QualityVariant(
            "linear",
            "A linear head on the conditioned last level, with IDs and history, without a side network.",
            kind="linear",
        ),
        QualityVariant(
            "paper",
            "Protocol, conditioning and IDs as in the paper; epochs, batches and sizes are those of the stream.",
            {"protocol": "paper"},
        ),
    )
}


def select_variants(names: str) -> list[QualityVariant]:
    """Return the variants of a comma-separated list, or of "all". The base is first, and "static" adds growth.

    Raises:
        ValueError: a name is unknown.
    """
    asked = list(VARIANTS) if names == "all" else names.split(",")
    if unknown := [name for name in asked if name not in VARIANTS]:
        raise ValueError(f"no variant is called {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    grown = [GROWTH] if "static" in asked else []
    return [VARIANTS[name] for name in dict.fromkeys([BASE, *grown, *asked])]
