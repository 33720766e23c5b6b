"""Checks that the parts of a run fit together: model, stream, settings, the next window and a checkpoint."""

from pathlib import Path
from typing import Any

from xsmoe.data import Window
from xsmoe.encoders import ItemFeatures
from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig, result_settings, upgrade_model_config
from xsmoe.stream.source import Stream
from xsmoe.stream.state.progress import Progress
from xsmoe.stream.state.run_folder import window_digest

MAX_USERS = 1 << 31
"""Number of users that a `History` supports."""


def require_compatible_run(model: Recommender, stream: Stream, config: StreamConfig) -> None:
    """Raise ValueError, naming the argument, if model, stream and settings do not fit together."""
    if model.users.max_length < config.max_inputs:
        raise ValueError(
            f"max_inputs is {config.max_inputs}, but the user encoder supports at most {model.users.max_length}; use a "
            "smaller max_inputs, or a user encoder with a larger max_length"
        )
    if stream.windows and stream.protocol != config.protocol:
        raise ValueError(
            f"stream was built with protocol {stream.protocol!r}, but config.protocol is {config.protocol!r}; "
            "build the stream with the same protocol"
        )
    if missing := set(model.items.modalities) - set(stream.features.modalities):
        raise ValueError(
            f"stream.features has no modality {', '.join(sorted(missing))}, which the model needs; add it, or build "
            "the model without it"
        )
    if config.expand and config.new_gate == "copy" and model.items.top_k is not None:
        raise ValueError(
            "config.new_gate is 'copy', which needs a model that mixes all experts, but its top_k is "
            f"{model.items.top_k}; use new_gate 'random' or 'mean', or top_k None"
        )


def require_trainable_window(window: Window, progress: Progress, config: StreamConfig, num_items: int) -> None:
    """Raise ValueError unless a run can train on a window next.

    Args:
        window: the next window.
        progress: position of the run.
        config: settings of the run.
        num_items: number of items that have hidden states.
    """
    resuming, digest = progress.epoch is not None, window_digest(window)
    for name, ids, bound in (("users", window.users, MAX_USERS), ("items", window.items, num_items)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < bound:
            raise ValueError(f"window.{name} must be in [0, {bound}), but ranges from {ids.min()} to {ids.max()}")
    # The published code sorts timestamps as strings, so they need not be in ascending order.
    if config.protocol != "paper" and (window.timestamps[1:] < window.timestamps[:-1]).any():
        raise ValueError("window.timestamps must be in ascending order; sort the window's interactions by time first")
    if resuming and digest != progress.digests[-1]:
        raise ValueError(f"training of window {progress.windows_done} was interrupted; finish that window first")
    if not resuming and digest in progress.digests:
        raise ValueError(
            f"the run was already trained on these interactions, as window {progress.digests.index(digest)}; "
            "pass a new window"
        )


def compatibility_record(
    config: StreamConfig, model: Recommender, features: ItemFeatures, num_items: int | None = None
) -> dict[str, Any]:
    """Return the checkpoint entries that identify a run.

    Args:
        config, model: of the run.
        features: the items' hidden states.
        num_items: number of items that the run uses; None uses all items of `features`.
    """
    num_items = features.num_items if num_items is None else num_items
    return {
        "num_items": num_items,
        "config": config.to_dict(),
        "model_config": model.config(),
        "features": features.fingerprint(num_items),
    }


def require_compatible_checkpoint(
    folder: Path, state: dict[str, Any], config: StreamConfig, model: Recommender, features: ItemFeatures
) -> None:
    """Raise ValueError, naming the differences, if a checkpoint in `folder` belongs to another run."""
    if features.num_items < state["num_items"]:
        raise ValueError(
            f"the run in {folder} was trained on {state['num_items']} items, but stream.features has "
            f"{features.num_items}; use the features that the run was started with, or features with more items"
        )
    current = compatibility_record(config, model, features, state["num_items"])
    if state["features"] != current["features"]:
        raise ValueError(
            f"the run in {folder} was trained on other hidden states: stream.features has another encoder, other "
            "levels or another order of items; use the store that the run was started with"
        )
    saved = {**state, "config": result_settings(StreamConfig.from_saved(state["config"]).to_dict())}
    saved["model_config"] = upgrade_model_config(state["model_config"])
    current["config"] = result_settings(current["config"])
    for name in ("config", "model_config"):
        if changes := differences(name, saved[name], current[name]):
            raise ValueError(
                f"the run in {folder} has another configuration: {'; '.join(changes)}; use the settings that it was "
                "started with, or another folder"
            )


def differences(name: str, saved: Any, current: Any) -> list[str]:
    """Return a phrase for each difference between two nested dicts of settings."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = sorted(set(saved) | set(current))
        return [d for key in keys for d in differences(f"{name}.{key}", saved.get(key), current.get(key))]
    return [] if saved == current else [f"{name} was {saved!r}, is now {current!r}"]
