"""The simulation of the drifting catalogue: items, users and their tastes, and how they change between windows."""

import numpy as np

from xsmoe.data.catalogue.attributes import ATTRIBUTES

WINDOW_SECONDS = 30 * 24 * 3600
FIRST_SECOND = 1_700_006_400
LEAST_TAKEN, MOST_TAKEN = 6, 15

_USERS_LEAVING = 0.15
_CHANGE_OF_TASTE = 0.2
_CHANGE_OF_ORDER = 0.5
_NEWEST_SHARE = 0.4
_SALIENCE_SWING = 0.25
_SALIENCE_PERIOD = 6
STRENGTHS = np.array([attribute.strength for attribute in ATTRIBUTES])


class Simulation:
    """The state of the simulation between windows."""

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
        """Advance the simulation to this window and return the window's log: rows of users, items and timestamps."""
        if window > 0:
            self._drift(window)
        counts = self._counts(len(self.active))
        chosen = self._take(window, counts)
        seconds = self._seconds(counts) + FIRST_SECOND + window * WINDOW_SECONDS
        valid = np.arange(MOST_TAKEN) < counts[:, None]
        return np.stack([np.repeat(self.active, counts), chosen[valid], seconds[valid]])

    def _drift(self, window: int) -> None:
        newest = self._change_orders(window)
        self._change_items(window, newest)
        self._change_users(window)

    def _change_orders(self, window: int) -> np.ndarray:
        """Change the shared orders and the fashion. Return which attributes get a new value, (attributes,) bool."""
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
        return newest

    def _change_items(self, window: int, newest: np.ndarray) -> None:
        on_sale = np.flatnonzero(self.retirement == self.num_windows)
        retiring = self.rng.permutation(on_sale)[: min(self.new_items, len(on_sale)) // 2]
        self.retirement[retiring] = window
        self._add_items(self.new_items, window, newest)

    def _change_users(self, window: int) -> None:
        leaving = self._replace_users()
        changing = self.rng.random(self.tastes.shape) < _CHANGE_OF_TASTE
        changing[leaving] = True
        self.tastes = np.where(changing, self._tastes(len(self.active)), self.tastes)

    def _replace_users(self) -> np.ndarray:
        """Replace some users by new ones and return the indices of the replaced users."""
        leaving = self.rng.permutation(len(self.active))[: round(len(self.active) * _USERS_LEAVING)]
        self.active[leaving] = self.num_users + np.arange(len(leaving))
        self.num_users += len(leaving)
        self.taken[leaving] = False
        self._widen_taken()
        return leaving

    def _widen_taken(self) -> None:
        """Add a column to `taken` for each item that has arrived since the last call."""
        self.taken = np.pad(self.taken, ((0, 0), (0, len(self.attributes) - self.taken.shape[1])))

    def _salience(self, window: int) -> np.ndarray:
        """Return the log factor of a wanted value, (attributes,). Visual and textual attributes dominate in turn."""
        side = np.repeat([1.0, -1.0], len(ATTRIBUTES) // 2)
        return STRENGTHS * (1 + side * _SALIENCE_SWING * np.cos(2 * np.pi * window / _SALIENCE_PERIOD))

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
        """Return how many items each user chooses.

        The total is the same in every window. Therefore a cut into windows of equal count yields the simulated windows.
        """
        counts = self.rng.integers(LEAST_TAKEN, MOST_TAKEN + 1, size=users)
        excess = int(counts.sum()) - users * (LEAST_TAKEN + MOST_TAKEN) // 2
        while excess:
            step = 1 if excess > 0 else -1
            movable = np.flatnonzero(counts > LEAST_TAKEN if excess > 0 else counts < MOST_TAKEN)
            counts[self.rng.permutation(movable)[: abs(excess)]] -= step
            excess -= step * min(abs(excess), len(movable))
        return counts

    def _take(self, window: int, counts: np.ndarray) -> np.ndarray:
        """Return the items that the active users choose, (users, MOST_TAKEN) int64, in order, 0 past a user's count."""
        rng = self.rng
        on_sale = np.flatnonzero(self.retirement > window)
        contents = self.attributes[on_sale]
        appeal = np.exp(self.appeal[on_sale] + rng.normal(0, 0.5, len(on_sale))).astype(np.float32)
        factors = [
            np.where(np.arange(len(order))[:, None] == contents[:, place], factor, 1).astype(np.float32)
            for place, (order, factor) in enumerate(zip(self.orders, np.exp(self._salience(window)), strict=True))
        ]
        successors = [_successors(order) for order in self.orders]

        wanted = self.tastes.copy()
        chosen = np.zeros((len(counts), MOST_TAKEN), np.int64)
        for step in range(MOST_TAKEN):
            rows = np.flatnonzero(counts > step)
            chances = np.tile(appeal, (len(rows), 1))
            for place, factor in enumerate(factors):
                chances *= factor[wanted[rows, place]]
            # The minimum of exponential variables with these rates is at item i with probability chances_i / sum.
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
        """Return the seconds within the window, (users, MOST_TAKEN) int64.

        Each user is active for one to three fifths of the window.
        """
        gaps = np.cumsum(self.rng.standard_exponential((len(counts), MOST_TAKEN + 1)), axis=1)
        within = gaps[:, :-1] / np.take_along_axis(gaps, counts[:, None], axis=1)
        span = self.rng.uniform(0.2, 0.6, (len(counts), 1))
        start = self.rng.random((len(counts), 1)) * (1 - span)
        return ((start + span * within) * WINDOW_SECONDS).astype(np.int64)


def _successors(order: np.ndarray) -> np.ndarray:
    """Return the value after each value, (V,) int64, in this cyclic order of all V values."""
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)
    return following
