"""A stream as the trainer takes it: windows of integer ids, and the items' hidden states."""

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
    """Interactions that did not enter the stream, by reason."""

    not_encoded: int = 0
    lacking_modality: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Stream:
    """Windows in time order, over the items of a feature source.

    Attributes:
        windows: item ids are rows of `features`.
        features: the items' hidden states.
        user_ids: the user that each integer stands for; empty where users have no names.
        dropped: what was left out on the way.
        protocol: "paper" where timestamps were sorted as strings, as the published code does.
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
            num_windows: at least 2.
            modalities: those that the model uses; default all of the store's.
            missing: "drop" leaves out items that lack one of them, "zero" gives them rows of zeros.
            protocol: "paper" sorts timestamps as strings, as the published code does.
            ties: "hash" orders interactions of equal time by a seeded hash of user and item, so that neither their
                order nor the users' numbers depend on the file's order; "file" keeps the log's order. None: "hash";
                under "paper" "file".
            duplicates: "drop" leaves out interactions that repeat another's user, item and time. None: "drop"; under
                "paper" "keep".
            seed: of the hash.

        Raises:
            DataError: nothing is left of the log.
            ValueError: too few windows, more than interactions, or another value of a setting.
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
        """Make one window of all the interactions, for a run that goes on.

        Args:
            number: the window's place in the stream.
            user_ids: the users known to the run; new ones are put behind them.
            interactions, store, modalities, missing, protocol, ties, duplicates, seed: as for `build`.
        """
        settings = StreamConfig.from_dict({"protocol": protocol, "ties": ties, "duplicates": duplicates, "seed": seed})
        log = _resolve(interactions, store, modalities, missing, settings, user_ids)
        order = time_order(log.times, string_sort=protocol == "paper", ties=log.ties)
        window = Window(number, log.users[order], log.items[order], log.times[order])
        return cls([window], store, log.user_ids, log.dropped, protocol)


@dataclass(frozen=True)
class _Log:
    """The interactions that enter a stream, in numbers: (N,) arrays. `ties` are what equal times are ordered by."""

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
    """Leave out what cannot enter, resolve duplicates and ties, and number the users."""
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
        # Users are numbered in this order too, so that their numbers do not depend on the file's.
        users, times, rows, ties = users[order], times[order], rows[order], ties[order]
    numbers, names = _number_users(users, user_ids)
    return _Log(numbers, rows, times, ties, names, dropped)


def _encode(
    interactions: Interactions, store: HiddenStateStore, modalities: Sequence[str] | None, missing: Missing
) -> tuple[np.ndarray, np.ndarray, Dropped]:
    """Each interaction's row of the store, whether it can be used, and how many cannot."""
    if missing not in ("drop", "zero"):
        raise ValueError(f"missing must be 'drop' or 'zero', not {missing!r}")
    used = store.modalities if modalities is None else modalities
    if unknown := set(used) - set(store.modalities):
        raise DataError(f"the store has no {', '.join(sorted(unknown))}, only {', '.join(store.modalities)}")
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
            f"no interaction is left: the items of {dropped.not_encoded} are not in the store, those of "
            f"{dropped.lacking_modality} lack {' or '.join(used)}; encode the items first (`xsmoe update` takes new "
            "ones with --items), or start with missing='zero'"
        )
    return rows, keep, dropped


def _number_users(users: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each user's number: known ones keep theirs, new ones follow in the order in which they first appear."""
    distinct, codes = factorize(users)
    numbers = {name: number for number, name in enumerate(known.tolist())}
    fresh = [name for name in distinct if name not in numbers]
    numbers |= {name: len(known) + place for place, name in enumerate(fresh)}
    renumbered = np.array([numbers[name] for name in distinct], dtype=np.int64)
    return renumbered[codes], np.array([*known.tolist(), *fresh], dtype=object)
