"""Input of the trainer: windows of interactions with integer ids, and the items' hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from xsmoe.data import DataError, Interactions, Window, make_windows
from xsmoe.data.repeats import exact_duplicates, factorize
from xsmoe.data.ties import tie_keys
from xsmoe.data.windows import time_order
from xsmoe.encoders import HiddenStateStore, ItemFeatures
from xsmoe.stream.config import Duplicates, Protocol, StreamConfig, Ties

Missing = Literal["drop", "zero"]


@dataclass(frozen=True)
class Dropped:
    """Numbers of interactions that are not part of the stream, by reason."""

    not_encoded: int = 0
    lacking_modality: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Stream:
    """Windows of interactions in time order, and the hidden states of their items.

    Attributes:
        windows: item ids are rows of `features`.
        features: the items' hidden states.
        user_ids: the user name for each integer id; empty if users have no names.
        dropped: numbers of interactions that were left out.
        protocol: "paper" if timestamps were sorted as strings, like in the published code.
    """

    windows: Sequence[Window]
    features: ItemFeatures
    user_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=object))
    dropped: Dropped = Dropped()
    protocol: Protocol = "default"

    @classmethod
    def build(
        cls,
        interactions: Interactions,
        store: HiddenStateStore,
        num_windows: int,
        *,
        modalities: Sequence[str] | None = None,
        missing: Missing = "drop",
        protocol: Protocol = "default",
        ties: Ties | None = None,
        duplicates: Duplicates | None = None,
        seed: int = 0,
    ) -> "Stream":
        """Cut interactions into windows of equal count.

        Args:
            interactions: the log.
            store: the items' hidden states.
            num_windows: number of windows, at least 2.
            modalities: modalities of the model; None uses all modalities of the store.
            missing: "drop" leaves out items that lack a modality, "zero" uses rows of zeros for them.
            protocol: "paper" sorts timestamps as strings, like the published code.
            ties: "hash" orders interactions with equal time by a seeded hash of user and item. Then neither their order
                nor the users' numbers depend on the file's order. "file" keeps the log's order. None: "hash"; with
                "paper": "file".
            duplicates: "drop" leaves out interactions with the same user, item and time as another one. None: "drop";
                with "paper": "keep".
            seed: seed of the hash.

        Raises:
            DataError: no interaction is left.
            ValueError: `num_windows` is below 2 or above the number of interactions, or a setting is invalid.
        """
        settings = StreamConfig.from_dict({"protocol": protocol, "ties": ties, "duplicates": duplicates, "seed": seed})
        log = _resolve(interactions, store, modalities, missing, settings, np.empty(0, object))
        windows = make_windows(
            log.users, log.items, log.times, num_windows, string_sort=protocol == "paper", ties=log.ties
        )
        return cls(windows, store, log.user_ids, log.dropped, protocol)

    @classmethod
    def next_window(
        cls,
        interactions: Interactions,
        store: HiddenStateStore,
        number: int,
        user_ids: np.ndarray,
        *,
        modalities: Sequence[str] | None = None,
        missing: Missing = "drop",
        protocol: Protocol = "default",
        ties: Ties | None = None,
        duplicates: Duplicates | None = None,
        seed: int = 0,
    ) -> "Stream":
        """Make one window of all the interactions, for an existing run.

        Args:
            number: position of the window in the stream.
            user_ids: users of the run so far. New users are appended.
            interactions, store, modalities, missing, protocol, ties, duplicates, seed: see `build`.
        """
        settings = StreamConfig.from_dict({"protocol": protocol, "ties": ties, "duplicates": duplicates, "seed": seed})
        log = _resolve(interactions, store, modalities, missing, settings, user_ids)
        order = time_order(log.times, string_sort=protocol == "paper", ties=log.ties)
        window = Window(number, log.users[order], log.items[order], log.times[order])
        return cls([window], store, log.user_ids, log.dropped, protocol)


@dataclass(frozen=True)
class _Log:
    """Interactions of a stream as (N,) integer arrays. `ties` are the sort keys of interactions with equal time."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ties: np.ndarray | None
    user_ids: np.ndarray
    dropped: Dropped


def _resolve(
    interactions: Interactions,
    store: HiddenStateStore,
    modalities: Sequence[str] | None,
    missing: Missing,
    settings: StreamConfig,
    user_ids: np.ndarray,
) -> _Log:
    """Drop unusable interactions, resolve duplicates and ties, and number the users."""
    rows, keep, dropped = _encode(interactions, store, modalities, missing)
    users, items, times = interactions.users[keep], interactions.items[keep], interactions.timestamps[keep]
    rows = rows[keep].astype(np.int64)
    if settings.duplicates == "drop":
        once = ~exact_duplicates(factorize(users)[1], rows, times)
        dropped = replace(dropped, duplicates=int((~once).sum()))
        users, items, times, rows = users[once], items[once], times[once], rows[once]
    ties = None
    if settings.ties == "hash":
        ties = tie_keys(users, items, settings.seed)
        order = time_order(times, ties=ties)
        # Users are numbered in this order too, so their numbers do not depend on the file's order.
        users, times, rows, ties = users[order], times[order], rows[order], ties[order]
    numbers, names = _number_users(users, user_ids)
    return _Log(numbers, rows, times, ties, names, dropped)


def _encode(
    interactions: Interactions, store: HiddenStateStore, modalities: Sequence[str] | None, missing: Missing
) -> tuple[np.ndarray, np.ndarray, Dropped]:
    """Return each interaction's row of the store, whether it is usable, and the numbers of unusable ones."""
    if missing not in ("drop", "zero"):
        raise ValueError(f"missing must be 'drop' or 'zero', not {missing!r}")
    used = store.modalities if modalities is None else modalities
    if unknown := set(used) - set(store.modalities):
        raise DataError(f"the store has no modality {', '.join(sorted(unknown))}; it has {', '.join(store.modalities)}")
    distinct, codes = factorize(interactions.items)
    rows = store.index_of(distinct)[codes]
    present = np.stack([store.present(name) for name in used])
    usable = (np.logical_and if missing == "drop" else np.logical_or).reduce(present, axis=0)
    encoded = rows >= 0
    keep = encoded.copy()
    keep[encoded] = usable[rows[encoded]]
    dropped = Dropped(int((~encoded).sum()), int((encoded & ~keep).sum()))
    if not keep.any():
        raise DataError(
            f"no interaction is left: the items of {dropped.not_encoded} are not in the store, the items of "
            f"{dropped.lacking_modality} lack {' or '.join(used)}; encode the items first (use --items with "
            "`xsmoe update`), or start the run with missing='zero'"
        )
    return rows, keep, dropped


def _number_users(users: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the users. Known users keep their numbers; new users follow in the order of their first appearance."""
    distinct, codes = factorize(users)
    numbers = {name: number for number, name in enumerate(known.tolist())}
    fresh = [name for name in distinct if name not in numbers]
    numbers |= {name: len(known) + place for place, name in enumerate(fresh)}
    renumbered = np.array([numbers[name] for name in distinct], dtype=np.int64)
    return renumbered[codes], np.array([*known.tolist(), *fresh], dtype=object)
