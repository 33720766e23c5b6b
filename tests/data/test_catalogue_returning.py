"""Tests of the catalogue with regimes that alternate: a regime is absent for some windows and returns unchanged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_catalogue import SMALL, hit_rate, lifts, windows_of
from xsmoe.data import History, make_windows, write_catalogue
from xsmoe.data.catalogue.attributes import ATTRIBUTES
from xsmoe.data.catalogue.generator import generate
from xsmoe.data.catalogue.returning import ReturningSimulation

REGIMES = 3
SETTINGS: dict[str, Any] = {"num_windows": 8, "users": 60, "items": 160, "new_items": 12, "returning": REGIMES}


def test_users_return_with_their_regime_and_no_others_do() -> None:
    catalogue = generate(**SETTINGS)
    windows = make_windows(catalogue.users, catalogue.items, catalogue.timestamps, SETTINGS["num_windows"])
    users = [set(window.users.tolist()) for window in windows]
    assert all(len(found) == 60 for found in users)
    for first in range(len(users)):
        for second in range(first + 1, len(users)):
            common = len(users[first] & users[second])
            if (second - first) % REGIMES:
                assert common == 0
            elif second - first == REGIMES:
                assert common == round(60 * 0.85)
    assert len(np.unique(np.stack([catalogue.users, catalogue.items]), axis=1).T) == len(catalogue.users)


def test_a_regime_is_the_same_in_its_next_window() -> None:
    world = ReturningSimulation(np.random.default_rng(3), 8, 60, 160, 12, REGIMES)
    seen: list[dict[str, Any]] = []
    for window in range(8):
        world.advance(window)
        seen.append(
            {
                "orders": [order.copy() for order in world.orders],
                "fashion": [values.copy() for values in world.fashion],
                "salience": world._salience(window).copy(),
                "tastes": dict(zip(world.active.tolist(), world.tastes.tolist(), strict=True)),
            }
        )
    for window in range(REGIMES, 8):
        now, before, other = seen[window], seen[window - REGIMES], seen[window - 1]
        for place, (order, earlier) in enumerate(zip(now["orders"], before["orders"], strict=True)):
            assert sorted(order) == list(range(len(order)))
            assert len(order) == min(ATTRIBUTES[place].released + window, len(ATTRIBUTES[place].values))
            assert order[order < len(earlier)].tolist() == earlier.tolist()
        assert all(np.array_equal(*pair) for pair in zip(now["fashion"], before["fashion"], strict=True))
        assert np.array_equal(now["salience"], before["salience"])
        stayed = now["tastes"].keys() & before["tastes"].keys()
        assert len(stayed) == round(60 * 0.85)
        assert all(now["tastes"][user] == before["tastes"][user] for user in stayed)
        assert not any(np.array_equal(*pair) for pair in zip(now["fashion"], other["fashion"], strict=True))


def test_statistics_of_a_regime_predict_its_return_better_than_those_of_the_windows_between() -> None:
    """Attribute tables of the regime's last window beat those of the previous window, and both beat popularity."""
    regimes, num_windows = 4, 8
    catalogue = generate(seed=0, num_windows=num_windows, users=500, items=500, new_items=40, returning=regimes)
    splits = windows_of(catalogue, num_windows)
    num_items = len(catalogue.attributes)
    history, rates = History(), []
    for number, future in enumerate(splits):
        if number >= regimes:
            test = future.test
            known = np.union1d(history.pairs()[1], future.all_pairs[1])
            last = catalogue.attributes[test.items[test.offsets[1:] - 2]]
            popularity = np.bincount(splits[number - 1].all_pairs[1], minlength=num_items)
            scores = [np.tile(popularity, (len(test), 1))]
            for past in (splits[number - 1], splits[number - regimes]):
                tables = lifts(past.test, catalogue.attributes)
                scores.append(
                    np.sum([tables[at][last[:, at]][:, catalogue.attributes[:, at]] for at in range(6)], axis=0)
                )
            rates.append([hit_rate(score, test, known, history) for score in scores])
        history.add(*future.all_pairs)
    popular, between, own = np.mean(rates, axis=0)
    assert own > 1.5 * between
    assert between > popular


def test_the_option_is_off_by_default_and_part_of_the_seed() -> None:
    plain, off = generate(**SMALL), generate(**SMALL, returning=0)
    for name in ("attributes", "arrival", "retirement", "users", "items", "timestamps"):
        assert np.array_equal(getattr(plain, name), getattr(off, name))
    first, again = generate(**SETTINGS), generate(**SETTINGS)
    assert np.array_equal(first.items, again.items)
    assert np.array_equal(first.timestamps, again.timestamps)


@pytest.mark.parametrize("returning", [-1, 1, 3])
def test_regimes_out_of_range(tmp_path: Path, returning: int) -> None:
    with pytest.raises(
        ValueError, match=f"returning must be 0, or at least 2 and less than num_windows = 3.* not {returning}"
    ):
        write_catalogue(tmp_path / "out", **SMALL, returning=returning)
    assert not (tmp_path / "out").exists()
