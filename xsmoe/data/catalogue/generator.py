"""The log of the drifting catalogue: synthetic items, users and interactions, all generated from one seed."""

from dataclasses import dataclass

import numpy as np

from xsmoe.data.catalogue.returning import ReturningSimulation
from xsmoe.data.catalogue.simulation import Simulation
from xsmoe.data.interactions import Interactions


@dataclass(frozen=True)
class Catalogue:
    """Synthetic items, and the interactions of synthetic users with them.

    Attributes:
        attributes: (I, len(ATTRIBUTES)) int64, the index of each item's value among its attribute's values.
        arrival: (I,) int64, the first window with the item.
        retirement: (I,) int64, the first window after arrival without the item; the number of windows if it stays.
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
        """Return the items' names, (I,) object array of str."""
        return _names("item", len(self.attributes))

    def interactions(self) -> Interactions:
        """Return the log with names for users and items."""
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
    """Generate a catalogue and its log. All of it is synthetic.

    Every user has a taste: one wanted value of each attribute. The probability that a user chooses an item is
    proportional to the item's appeal, which varies widely, times a factor for each attribute that has the wanted value.
    No user chooses an item twice. After each item, the user often wants the next colour and the next category after the
    item's own, in an order that all users share. The wanted texture, shape, material and style stay. Therefore the
    contents of a user's earlier items predict the next item well, and popularity hardly does.

    The distribution drifts from window to window. New items arrive, and some of them have colours, textures, categories
    and materials that did not exist before. Other items retire. The shared orders change in some positions. Tastes
    follow a fashion, which is a random walk. Users leave and new ones arrive. The visual attributes have more weight at
    first and the textual attributes have more weight later; they go on alternating.

    With `returning` regimes the distribution alternates instead: window w has regime w modulo their number. A regime
    has its own users, shared orders, fashion and attribute strengths. They are the same in its next window as in its
    last one, except that some of its users leave and as many arrive. All regimes share the items, which arrive and
    retire as in the drift.

    Args:
        seed: at least 0. Two calls with the same arguments return the same catalogue.
        num_windows: number of windows, at least 2. A window has 30 days. All have equally many interactions.
        users: number of active users in each window. Each has 6 to 15 interactions in it.
        items: number of items at the start, at least 16 per window. Otherwise a user could run out of new items.
        new_items: number of items that arrive with each later window. Half as many retire, but at most half of all.
        returning: number of regimes that alternate, at least 2 and fewer than the windows; 0 selects the drift.

    Raises:
        ValueError: an argument is out of its range.
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
            f"returning must be 0, or at least 2 and less than num_windows = {num_windows} (otherwise no regime "
            f"returns), not {returning}"
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
