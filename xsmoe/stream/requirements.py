"""What a run requires of its model, its stream and its next window, checked before anything changes."""

from xsmoe.data import Window
from xsmoe.nn import Recommender
from xsmoe.stream.config import StreamConfig
from xsmoe.stream.source import Stream
from xsmoe.stream.state.progress import Progress
from xsmoe.stream.state.run_folder import window_digest

MAX_USERS = 1 << 31
"""What a `History` can hold."""


def require_fitting(model: Recommender, stream: Stream, config: StreamConfig) -> None:
    """Raise ValueError, naming the argument, where model, stream and settings do not go together."""
    if model.users.max_length < config.max_inputs:
        raise ValueError(
            f"max_inputs is {config.max_inputs}, but the user encoder takes {model.users.max_length} at most"
        )
    if stream.windows and stream.protocol != config.protocol:
        raise ValueError(
            f"stream was cut for protocol {stream.protocol!r}, but config.protocol is {config.protocol!r}; "
            "build the stream with the same protocol"
        )
    if missing := set(model.items.modalities) - set(stream.features.modalities):
        raise ValueError(f"stream.features lacks {', '.join(sorted(missing))}, which the model encodes")
    if config.expand and config.new_gate == "copy" and model.items.top_k is not None:
        raise ValueError(
            "config.new_gate is 'copy', which needs a model that mixes all experts, but its top_k is "
            f"{model.items.top_k}; use new_gate 'random' or 'mean', or top_k None"
        )


def require_next(window: Window, progress: Progress, config: StreamConfig, num_items: int) -> None:
    """Raise ValueError unless a run can take a window next.

    Args:
        window: what is to be trained on.
        progress: of the run.
        config: of the run.
        num_items: items that have hidden states.
    """
    resuming, digest = progress.epoch is not None, window_digest(window)
    for name, ids, bound in (("users", window.users, MAX_USERS), ("items", window.items, num_items)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < bound:
            raise ValueError(f"window.{name} must lie in [0, {bound}), but goes from {ids.min()} to {ids.max()}")
    # The published sort of timestamps as strings need not ascend.
    if config.protocol != "paper" and (window.timestamps[1:] < window.timestamps[:-1]).any():
        raise ValueError("window.timestamps must ascend; sort the window's interactions by time first")
    if resuming and digest != progress.digests[-1]:
        raise ValueError(f"the training of window {progress.windows_done} was cut short; go on with that window first")
    if not resuming and digest in progress.digests:
        raise ValueError(f"the run has taken these interactions as window {progress.digests.index(digest)}")
