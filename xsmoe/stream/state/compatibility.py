"""Whether a checkpoint was made by the same run: with the same settings, the same model and the same items."""

from pathlib import Path
from typing import Any

from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig, decisive, saved_model


def identity(
    config: StreamConfig, model: Recommender, features: ItemFeatures, num_items: int | None = None
) -> dict[str, Any]:
    """What a checkpoint says of the run that it belongs to.

    Args:
        config, model: of the run.
        features: the items' hidden states.
        num_items: of them, those that the run knows; None for all.
    """
    num_items = features.num_items if num_items is None else num_items
    return {
        "num_items": num_items,
        "config": config.to_dict(),
        "model_config": model.config(),
        "features": features.fingerprint(num_items),
    }


def require_same(
    folder: Path, state: dict[str, Any], config: StreamConfig, model: Recommender, features: ItemFeatures
) -> None:
    """Raises ValueError, naming what differs, if a checkpoint in `folder` belongs to another run."""
    if features.num_items < state["num_items"]:
        raise ValueError(
            f"{folder} was trained on {state['num_items']} items, but stream.features has {features.num_items}; use "
            "the features that it was started with, or longer ones"
        )
    mine = identity(config, model, features, state["num_items"])
    if state["features"] != mine["features"]:
        raise ValueError(
            f"{folder} was trained on other hidden states: stream.features comes from another encoder, other levels or "
            "another order of items; use the store that the run was started with"
        )
    saved = {**state, "config": decisive(StreamConfig.from_saved(state["config"]).to_dict())}
    saved["model_config"] = saved_model(state["model_config"])
    mine["config"] = decisive(mine["config"])
    for name in ("config", "model_config"):
        if changes := differences(name, saved[name], mine[name]):
            raise ValueError(
                f"{folder} holds a run of another configuration: {'; '.join(changes)}; use the settings that it was "
                "started with, or another folder"
            )


def differences(name: str, saved: Any, mine: Any) -> list[str]:
    """What differs between two nested dicts of settings, a phrase each."""
    if isinstance(saved, dict) and isinstance(mine, dict):
        keys = sorted(set(saved) | set(mine))
        return [d for key in keys for d in differences(f"{name}.{key}", saved.get(key), mine.get(key))]
    return [] if saved == mine else [f"{name} was {saved!r}, is now {mine!r}"]
