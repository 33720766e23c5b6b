"""A stream as the trainer takes it: windows of integer ids, and the items' hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from xsmoe.data import DataError, Interactions, Window, make_windows
from xsmoe.encoders import HiddenStateStore, ItemFeatures
from xsmoe.stream.config import Protocol

Missing = Literal["drop", "zero"]


@dataclass(frozen=True)
class Dropped:
    """Interactions that did not enter the stream, by reason."""

    not_encoded: int = 0
    lacking_modality: int = 0


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
    ) -> "Stream":
        """Cuts interactions into windows of equal count.

        Args:
            interactions: the log.
            store: the items' hidden states.
            num_windows: at least 2.
            modalities: those that the model uses; default all of the store's.
            missing: "drop" leaves out items that lack one of them, "zero" gives them rows of zeros.
            protocol: "paper" sorts timestamps as strings, as the published code does.

        Raises:
            DataError: nothing is left of the log.
            ValueError: too few windows, or more than interactions.
        """
        users, items, times, user_ids, dropped = _encode(interactions, store, modalities, missing, np.empty(0, object))
        windows = make_windows(users, items, times, num_windows, string_sort=protocol == "paper")
        return cls(windows, store, user_ids, dropped, protocol)

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
    ) -> "Stream":
        """One window of all the interactions, for a run that goes on.

        Args:
            number: the window's place in the stream.
            user_ids: the users known to the run; new ones are put behind them.
            interactions, store, modalities, missing, protocol: as for `build`.
        """
        users, items, times, user_ids, dropped = _encode(interactions, store, modalities, missing, user_ids)
        order = np.argsort(times.astype(str)) if protocol == "paper" else np.argsort(times, kind="stable")
        window = Window(number, users[order], items[order], times[order])
        return cls([window], store, user_ids, dropped, protocol)


def _encode(
    interactions: Interactions,
    store: HiddenStateStore,
    modalities: Sequence[str] | None,
    missing: Missing,
    user_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Dropped]:
    if missing not in ("drop", "zero"):
        raise ValueError(f"missing must be 'drop' or 'zero', not {missing!r}")
    used = store.modalities if modalities is None else modalities
    if unknown := set(used) - set(store.modalities):
        raise DataError(f"the store has no {', '.join(sorted(unknown))}, only {', '.join(store.modalities)}")
    distinct, codes = _factorize(interactions.items)
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
    users, names = _number_users(interactions.users[keep], user_ids)
    return users, rows[keep].astype(np.int64), interactions.timestamps[keep], names, dropped


def _number_users(users: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each user's number: known ones keep theirs, new ones follow in the order in which they first appear."""
    distinct, codes = _factorize(users)
    numbers = {name: number for number, name in enumerate(known.tolist())}
    fresh = [name for name in distinct if name not in numbers]
    numbers |= {name: len(known) + place for place, name in enumerate(fresh)}
    renumbered = np.array([numbers[name] for name in distinct], dtype=np.int64)
    return renumbered[codes], np.array([*known.tolist(), *fresh], dtype=object)


def _factorize(names: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The distinct names in the order in which they first appear, and for each name its place among them."""
    encoded = pa.array(names, pa.string()).dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
