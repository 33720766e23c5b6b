"""The variants that `python -m bench quality` compares: a name, what it says, and what it sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BASE = "base"
Kind = Literal["side", "static", "linear"]


@dataclass(frozen=True)
class Variant:
    """One choice of settings.

    Attributes:
        name: what tables and files call it.
        sentence: what it does, for people.
        settings: what it sets, by the names that `RunConfig.new` takes.
        kind: the item encoder: "side", the side network; "static", one that begins with as many experts as the run with
            growth ended with; "linear", a linear head on the last level.
    """

    name: str
    sentence: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = "side"


GROWTH = "growth"
_GROWN = {"expand": True, "prune": True}

VARIANTS = {
    one.name: one
    for one in (
        Variant(BASE, "The defaults."),
        Variant(GROWTH, "Every window adds an expert, and little-used ones are dropped, as published.", _GROWN),
        Variant(
            "static",
            "As many experts from the start as the run of the same seed with growth ended with.",
            kind="static",
        ),
        Variant("no-prune", "Experts are added and none is dropped.", {"expand": True}),
        Variant("mean-gate", "A new expert's gate row is the mean of the others.", _GROWN | {"new_gate": "mean"}),
        Variant(
            "copy",
            "A new expert is a split of the most used one, which leaves the function unchanged.",
            _GROWN | {"new_gate": "copy"},
        ),
        Variant("merge", "A little-used expert is merged into the nearest one.", _GROWN | {"prune_rule": "merge"}),
        Variant("copy-merge", "Splits, and merges.", _GROWN | {"new_gate": "copy", "prune_rule": "merge"}),
        Variant(
            "novelty", "Experts change in windows only that the model does not serve yet.", _GROWN | {"grow": "novelty"}
        ),
        Variant("condition-none", "Hidden states are not conditioned.", {"condition": "none"}),
        Variant("condition-standardize", "Hidden states are standardized.", {"condition": "standardize"}),
        Variant("no-ids", "Items have no embedding beside their content.", {"ids": False}),
        Variant("history-last", "Only a user's last sequence of a window is trained on.", {"history": "last"}),
        Variant("keep-best", "The best epoch by validation is kept.", {"keep": "best"}),
        Variant("keep-last", "The last epoch is kept, not the average of the epochs.", {"keep": "last"}),
        Variant(
            "linear",
            "A linear head on the conditioned last level, with IDs and history, without a side network.",
            kind="linear",
        ),
        Variant(
            "paper",
            "Protocol, conditioning and IDs as published; epochs, batches and sizes are the stream's.",
            {"protocol": "paper"},
        ),
    )
}


def chosen(names: str) -> list[Variant]:
    """Return the variants of a list with commas, or of "all", the base first, and growth with "static".

    Raises:
        ValueError: a name that there is not.
    """
    asked = list(VARIANTS) if names == "all" else names.split(",")
    if unknown := [name for name in asked if name not in VARIANTS]:
        raise ValueError(f"no variant is called {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    grown = [GROWTH] if "static" in asked else []
    return [VARIANTS[name] for name in dict.fromkeys([BASE, *grown, *asked])]
