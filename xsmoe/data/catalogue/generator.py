"""The log of the drifting catalogue: synthetic items, users and what these take, all from one seed."""

from dataclasses import dataclass

import numpy as np

from xsmoe.data.catalogue.attributes import ATTRIBUTES
from xsmoe.data.interactions import Interactions

WINDOW_SECONDS = 30 * 24 * 3600
FIRST_SECOND = 1_700_006_400
LEAST_TAKEN, MOST_TAKEN = 6, 15

_USERS_LEAVING = 0.15
_CHANGE_OF_TASTE = 0.2
_CHANGE_OF_ORDER = 0.5
_NEWEST_SHARE = 0.4
_SALIENCE_SWING = 0.25
_SALIENCE_PERIOD = 6


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
    *, seed: int = 0, num_windows: int = 6, users: int = 1000, items: int = 600, new_items: int = 80
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

    Args:
        seed: at least 0; two calls with the same arguments return the same catalogue.
        num_windows: windows of 30 days; at least 2. All have equally many interactions.
        users: active in each window, each with 6 to 15 interactions in it.
        items: on sale at the start; at least 16 per window, so that no user runs out of new ones.
        new_items: arrive with each later window; half as many retire, but never more than half of all.

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
    simulation = _Simulation(np.random.default_rng(seed), num_windows, users, items, new_items)
    logs = [simulation.advance(window) for window in range(num_windows)]
    log = np.concatenate(logs, axis=1)
    log = log[:, np.argsort(log[2], kind="stable")]
    return Catalogue(simulation.attributes, simulation.arrival, simulation.retirement, log[0], log[1], log[2])


class _Simulation:
    """The state of the synthetic world between windows."""

    def __init__(self, rng: np.random.Generator, num_windows: int, users: int, items: int, new_items: int) -> None:
        self.rng = rng
        self.num_windows = num_windows
        self.new_items = new_items
        self.orders = [rng.permutation(attribute.released) for attribute in ATTRIBUTES]
        self.fashion = [rng.normal(0, 0.5, len(attribute.values)) for attribute in ATTRIBUTES]

        self.attributes = np.empty((0, len(ATTRIBUTES)), np.int64)
        self.arrival = np.empty(0, np.int64)
        self.retirement = np.empty(0, np.int64)
        self.appeal = np.empty(0)
        self._add_items(items, window=0, newest=np.zeros(len(ATTRIBUTES), bool))

        self.active = np.arange(users)
        self.num_users = users
        self.tastes = self._tastes(users)
        self.taken = np.zeros((users, items), bool)

    def advance(self, window: int) -> np.ndarray:
        """Lets the world drift into this window; returns its log, rows of users, items and timestamps."""
        if window > 0:
            self._drift(window)
        counts = self._counts(len(self.active))
        chosen = self._take(window, counts)
        seconds = self._seconds(counts) + FIRST_SECOND + window * WINDOW_SECONDS
        valid = np.arange(MOST_TAKEN) < counts[:, None]
        return np.stack([np.repeat(self.active, counts), chosen[valid], seconds[valid]])

    def _drift(self, window: int) -> None:
        rng = self.rng
        newest = np.zeros(len(ATTRIBUTES), bool)
        for place, attribute in enumerate(ATTRIBUTES):
            order = self.orders[place]
            if attribute.move and rng.random() < _CHANGE_OF_ORDER:
                first, second = rng.choice(len(order), 2, replace=False)
                order[[first, second]] = order[[second, first]]
            if len(order) < len(attribute.values):
                self.orders[place] = np.insert(order, rng.integers(len(order) + 1), len(order))
                newest[place] = True
            self.fashion[place] += rng.normal(0, 0.5, len(attribute.values))

        on_sale = np.flatnonzero(self.retirement == self.num_windows)
        retiring = rng.permutation(on_sale)[: min(self.new_items, len(on_sale)) // 2]
        self.retirement[retiring] = window
        self._add_items(self.new_items, window, newest)

        leaving = rng.permutation(len(self.active))[: round(len(self.active) * _USERS_LEAVING)]
        self.active[leaving] = self.num_users + np.arange(len(leaving))
        self.num_users += len(leaving)
        self.taken[leaving] = False
        self.taken = np.pad(self.taken, ((0, 0), (0, self.new_items)))
        changing = rng.random(self.tastes.shape) < _CHANGE_OF_TASTE
        changing[leaving] = True
        self.tastes = np.where(changing, self._tastes(len(self.active)), self.tastes)

    def _add_items(self, count: int, window: int, newest: np.ndarray) -> None:
        columns = []
        for place, order in enumerate(self.orders):
            values = self.rng.integers(len(order), size=count)
            if newest[place]:
                values[self.rng.random(count) < _NEWEST_SHARE] = len(order) - 1
            columns.append(values)
        self.attributes = np.concatenate([self.attributes, np.stack(columns, axis=1)])
        self.arrival = np.concatenate([self.arrival, np.full(count, window)])
        self.retirement = np.concatenate([self.retirement, np.full(count, self.num_windows)])
        self.appeal = np.concatenate([self.appeal, self.rng.normal(0, 0.5, count)])

    def _tastes(self, count: int) -> np.ndarray:
        columns = []
        for order, fashion in zip(self.orders, self.fashion, strict=True):
            share = np.exp(fashion[: len(order)])
            columns.append(self.rng.choice(len(order), size=count, p=share / share.sum()))
        return np.stack(columns, axis=1)

    def _counts(self, users: int) -> np.ndarray:
        """How many items each user takes: a fixed total, so that windows of equal count are the windows meant here."""
        counts = self.rng.integers(LEAST_TAKEN, MOST_TAKEN + 1, size=users)
        excess = int(counts.sum()) - users * (LEAST_TAKEN + MOST_TAKEN) // 2
        while excess:
            step = 1 if excess > 0 else -1
            movable = np.flatnonzero(counts > LEAST_TAKEN if excess > 0 else counts < MOST_TAKEN)
            counts[self.rng.permutation(movable)[: abs(excess)]] -= step
            excess -= step * min(abs(excess), len(movable))
        return counts

    def _take(self, window: int, counts: np.ndarray) -> np.ndarray:
        """What the active users take, (users, MOST_TAKEN) int64: each row in order, 0 past a user's count."""
        rng = self.rng
        on_sale = np.flatnonzero(self.retirement > window)
        contents = self.attributes[on_sale]
        appeal = np.exp(self.appeal[on_sale] + rng.normal(0, 0.5, len(on_sale))).astype(np.float32)
        factors = [
            np.where(np.arange(len(order))[:, None] == contents[:, place], factor, 1).astype(np.float32)
            for place, (order, factor) in enumerate(zip(self.orders, np.exp(_salience(window)), strict=True))
        ]
        successors = [_successors(order) for order in self.orders]

        wanted = self.tastes.copy()
        chosen = np.zeros((len(counts), MOST_TAKEN), np.int64)
        for step in range(MOST_TAKEN):
            rows = np.flatnonzero(counts > step)
            chances = np.tile(appeal, (len(rows), 1))
            for place, factor in enumerate(factors):
                chances *= factor[wanted[rows, place]]
            # The least of exponential variables with these rates is item i with probability chances_i / sum.
            waits = rng.standard_exponential(chances.shape, np.float32) / chances
            waits[self.taken[np.ix_(rows, on_sale)]] = np.inf
            picks = np.argmin(waits, axis=1)
            chosen[rows, step] = on_sale[picks]
            self.taken[rows, on_sale[picks]] = True
            for place, attribute in enumerate(ATTRIBUTES):
                if attribute.move:
                    own = contents[picks, place]
                    moves = rng.random(len(rows)) < attribute.move
                    wanted[rows, place] = np.where(moves, successors[place][own], own)
        return chosen

    def _seconds(self, counts: np.ndarray) -> np.ndarray:
        """When, within the window, (users, MOST_TAKEN) int64: each user is around for a fifth to three fifths of it."""
        gaps = np.cumsum(self.rng.standard_exponential((len(counts), MOST_TAKEN + 1)), axis=1)
        within = gaps[:, :-1] / np.take_along_axis(gaps, counts[:, None], axis=1)
        span = self.rng.uniform(0.2, 0.6, (len(counts), 1))
        start = self.rng.random((len(counts), 1)) * (1 - span)
        return ((start + span * within) * WINDOW_SECONDS).astype(np.int64)


def _successors(order: np.ndarray) -> np.ndarray:
    """The value after each value, (V,) int64, in this order of all V values, which closes to a circle."""
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)
    return following


def _salience(window: int) -> np.ndarray:
    """Log of the factor for a wanted value, per attribute: the visual and the textual ones take turns in mattering."""
    strengths = np.array([attribute.strength for attribute in ATTRIBUTES])
    side = np.repeat([1.0, -1.0], len(ATTRIBUTES) // 2)
    return strengths * (1 + side * _SALIENCE_SWING * np.cos(2 * np.pi * window / _SALIENCE_PERIOD))


def _names(kind: str, count: int) -> np.ndarray:
    return np.array([f"{kind}-{number:05d}" for number in range(count)], dtype=object)
