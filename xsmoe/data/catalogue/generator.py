"""The log of the drifting catalogue: synthetic items, users and what these take, all from one seed."""

from dataclasses import dataclass

import numpy as np

from xsmoe.data.catalogue.returning import ReturningSimulation
from xsmoe.data.catalogue.simulation import Simulation
from xsmoe.data.interactions import Interactions


@dataclass(frozen=True)
class Catalogue:
    """Synthetic items, and what synthetic users took.

    Attributes:
        attributes: (I, len(ATTRIBUTES)) int64, the place of each item's value among its attribute's values.
        arrival: (I,) int64, the window that brings the item.
        retirement: (I,) int64, the first window without it; the number of windows if it stays.
        users, items: (N,) int64 in time order.
        timestamps: (N,) int64 seconds.
    """

    attributes: np.ndarray
    arrival: np.ndarray
    retirement: np.ndarray
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray

    def item_ids(self) -> np.ndarray:
        """The items' names, (I,) object array of str."""
        return _names("item", len(self.attributes))

    def interactions(self) -> Interactions:
        """The log, with names for users and items."""
        users = _names("user", int(self.users.max()) + 1)
        return Interactions(users[self.users], self.item_ids()[self.items], self.timestamps)


def generate(
    *,
    seed: int = 0,
    num_windows: int = 6,
    users: int = 1000,
    items: int = 600,
    new_items: int = 80,
    returning: int = 0,
) -> Catalogue:
    """Draws a catalogue and its log. Everything in it is synthetic.

    Every user has a taste: a value wanted of each attribute. An item's chance to be taken is its appeal, which varies
    widely, times a factor for every attribute that has the wanted value. No user takes an item twice. After each item,
    a user often wants the next colour and the next category after the item's own, in an order that all users share;
    the wanted texture, shape, material and style stay. So what a user takes next can be told from the contents of what
    the user took before, and hardly from an item's popularity.

    From window to window the world drifts: new items arrive, some of them with colours, textures, categories and
    materials that did not exist before; others retire; the shared orders change in places; users change their tastes
    towards a wandering fashion, leave and arrive; what is seen matters more at first, what is read matters more later,
    and so on in turn.

    With `returning` regimes the world alternates instead: window w has regime w modulo their number. A regime has
    users, shared orders, a fashion, and strengths of the attributes of its own. In its next window these are what they
    were in its last one, except that some of its users leave and as many arrive; in between, the other regimes have
    their windows. Items are common to all regimes; they arrive and retire as in the drift.

    Args:
        seed: at least 0; two calls with the same arguments return the same catalogue.
        num_windows: windows of 30 days; at least 2. All have equally many interactions.
        users: active in each window, each with 6 to 15 interactions in it.
        items: on sale at the start; at least 16 per window, so that no user runs out of new ones.
        new_items: arrive with each later window; half as many retire, but never more than half of all.
        returning: regimes that alternate, at least 2 and fewer than the windows; 0 for the drift.

    Raises:
        ValueError: an argument out of its range.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("num_windows", num_windows, 2),
        ("users", users, 1),
        ("items", items, 16 * num_windows),
        ("new_items", new_items, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if returning != 0 and not 2 <= returning < num_windows:
        raise ValueError(
            f"returning must be 0, or at least 2 and less than num_windows = {num_windows}, so that a regime returns, "
            f"not {returning}"
        )
    rng = np.random.default_rng(seed)
    simulation = (
        ReturningSimulation(rng, num_windows, users, items, new_items, returning)
        if returning
        else Simulation(rng, num_windows, users, items, new_items)
    )
    logs = [simulation.advance(window) for window in range(num_windows)]
    log = np.concatenate(logs, axis=1)
    log = log[:, np.argsort(log[2], kind="stable")]
    return Catalogue(simulation.attributes, simulation.arrival, simulation.retirement, log[0], log[1], log[2])


def _names(kind: str, count: int) -> np.ndarray:
    return np.array([f"{kind}-{number:05d}" for number in range(count)], dtype=object)
