"""A catalogue with alternating regimes of tastes. A regime does not change while it is absent."""

from dataclasses import dataclass

import numpy as np

from xsmoe.data.catalogue.attributes import ATTRIBUTES
from xsmoe.data.catalogue.simulation import STRENGTHS, Simulation

_REGIME_FASHION = 1.5
_REGIME_SWING = 0.4


@dataclass
class Regime:
    """The state that a regime keeps while it is absent.

    Attributes:
        orders: for each attribute, a permutation of all its values, including those that later windows add.
        fashion: for each attribute, the log weight of each value in the tastes of arriving users.
        salience: (attributes,), log of the factor for a wanted value.
        active: (U,) int64, the regime's users.
        tastes: (U, attributes) int64, the value that each user wants first.
        taken: (U, I) bool, whether each user has chosen each item that existed so far.
    """

    orders: list[np.ndarray]
    fashion: list[np.ndarray]
    salience: np.ndarray
    active: np.ndarray
    tastes: np.ndarray
    taken: np.ndarray


class ReturningSimulation(Simulation):
    """A simulation whose regimes alternate, one window each. A regime does not change between its windows."""

    def __init__(
        self, rng: np.random.Generator, num_windows: int, users: int, items: int, new_items: int, regimes: int
    ) -> None:
        super().__init__(rng, num_windows, users, items, new_items)
        self.num_users = 0
        self.regimes = [self._regime(users) for _ in range(regimes)]
        self._enter(0)

    def _regime(self, users: int) -> Regime:
        """Draw a regime with its own users."""
        rng = self.rng
        self.orders = [rng.permutation(attribute.released) for attribute in ATTRIBUTES]
        full = []
        for order, attribute in zip(self.orders, ATTRIBUTES, strict=True):
            for value in range(attribute.released, len(attribute.values)):
                order = np.insert(order, rng.integers(len(order) + 1), value)
            full.append(order)
        self.fashion = [rng.normal(0, _REGIME_FASHION, len(attribute.values)) for attribute in ATTRIBUTES]
        side = rng.permutation(np.repeat([1.0, -1.0], len(ATTRIBUTES) // 2))
        active = self.num_users + np.arange(users)
        self.num_users += users
        return Regime(
            orders=full,
            fashion=self.fashion,
            salience=STRENGTHS * (1 + side * _REGIME_SWING),
            active=active,
            tastes=self._tastes(users),
            taken=np.zeros((users, 0), bool),
        )

    def _enter(self, window: int) -> None:
        """Make the regime of this window the current one."""
        regime = self.regimes[window % len(self.regimes)]
        self.orders = [order[order < self._released(place, window)] for place, order in enumerate(regime.orders)]
        self.fashion, self.active, self.tastes = regime.fashion, regime.active, regime.tastes
        self.taken = regime.taken
        self._widen_taken()

    def _change_orders(self, window: int) -> np.ndarray:
        self.regimes[(window - 1) % len(self.regimes)].taken = self.taken
        self._enter(window)
        return np.array(
            [self._released(place, window) > self._released(place, window - 1) for place in range(len(ATTRIBUTES))]
        )

    def _change_users(self, window: int) -> None:
        # A regime's first window has the users that were drawn with the regime.
        if window < len(self.regimes):
            self._widen_taken()
        else:
            leaving = self._replace_users()
            self.tastes[leaving] = self._tastes(len(leaving))

    def _salience(self, window: int) -> np.ndarray:
        return self.regimes[window % len(self.regimes)].salience

    @staticmethod
    def _released(place: int, window: int) -> int:
        """Return how many values of an attribute exist in a window. Each window adds one, as in the drift."""
        return min(len(ATTRIBUTES[place].values), ATTRIBUTES[place].released + window)
