"""The verdict: pooled over windows, clustered by user, compared with the strongest baseline."""

from typing import Any

import numpy as np
import pytest

from xsmoe.report.verdict import BASELINES, judge


def line(users: list[int], targets: list[int], model: list[int], **hits: list[int]) -> dict[str, Any]:
    """Return a line of a test. Baselines that are not given have no hits."""
    none = {name: [0] * len(users) for name in BASELINES}
    return {"by_user": {"users": users, "targets": targets, "hits": {"model": model, **none, **hits}}}


def test_returning_users_are_one_cluster() -> None:
    """Compared with a loop over single targets."""
    rng = np.random.default_rng(0)
    rows: list[tuple[int, int, int, int]] = []  # user, window, model, baseline
    for window in range(3):
        for user in rng.permutation(8)[:6]:
            rows += [(int(user), window, *rng.integers(0, 2, 2).tolist()) for _ in range(rng.integers(1, 6))]
    lines = []
    for window in range(3):
        users = sorted({row[0] for row in rows if row[1] == window})
        mine = [[row for row in rows if row[:2] == (user, window)] for user in users]
        lines.append(
            line(
                users,
                [len(own) for own in mine],
                [sum(row[2] for row in own) for own in mine],
                decayed=[sum(row[3] for row in own) for own in mine],
            )
        )
    found = judge(lines)
    differences = [row[2] - row[3] for row in rows]
    mean = sum(differences) / len(rows)
    users = {row[0] for row in rows}
    residuals = [sum(row[2] - row[3] - mean for row in rows if row[0] == user) for user in users]
    error = (len(users) / (len(users) - 1) * sum(total**2 for total in residuals)) ** 0.5 / len(rows)
    assert (found.baseline, found.targets, found.users) == ("decayed", len(rows), len(users))
    assert found.difference == pytest.approx(mean)
    assert found.standard_error == pytest.approx(error)
    assert found.model_mean == pytest.approx(np.mean([row[2] for row in rows]))
    assert found.baseline_mean == pytest.approx(np.mean([row[3] for row in rows]))
    # The order of windows and of their users has no influence.
    assert judge(lines[::-1]).standard_error == pytest.approx(error)


def test_the_strongest_baseline_is_that_of_all_windows_together() -> None:
    first = line([0, 1], [4, 4], [2, 1], all_time=[1, 1], last_window=[0, 0])
    second = line([1, 2], [4, 4], [1, 2], all_time=[0, 0], last_window=[2, 1])
    assert judge([first]).baseline == "all_time"
    assert judge([first, second]).baseline == "last_window"
    assert judge([line([0, 1], [1, 1], [0, 0], last_window=[1, 0], own_inputs=[0, 1])]).baseline == "last_window"


@pytest.mark.parametrize(
    ("gained", "verdict"),
    [([1] * 9 + [0], "above"), ([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], "not_above"), ([0] * 9 + [1], "not_above")],
)
def test_two_standard_errors_decide(gained: list[int], verdict: str) -> None:
    """For ten users with one target each, the error is that of a plain mean."""
    found = judge([line(list(range(10)), [1] * 10, gained)])
    assert found.verdict == verdict
    assert found.standard_error == pytest.approx(np.std(gained, ddof=1) / 10**0.5)
    assert (found.difference > 2 * found.standard_error) == (verdict == "above")
    word = "above" if verdict == "above" else "NOT above"
    assert f"is {word} the strongest baseline" in str(found)
    assert "by more than two standard errors" in str(found)
    assert f"{100 * found.difference:+.2f} ± {100 * found.standard_error:.2f} (10 targets of 10 users)" in str(found)


@pytest.mark.parametrize(
    ("users", "share", "verdict"), [(6, 1, "above"), (5, 1, "not_above"), (100, 0, "not_above"), (6, -1, "not_above")]
)
def test_six_equal_users_are_needed_for_a_verdict(users: int, share: int, verdict: str) -> None:
    """Their standard error is 0 in all cases."""
    targets = [1 + user % 3 for user in range(users)]
    hits, none = targets, [0] * users
    model, baseline = {1: (hits, none), 0: (hits, hits), -1: (none, hits)}[share]
    found = judge([line(list(range(users)), targets, model, all_time=baseline)])
    assert (found.verdict, found.difference, found.standard_error) == (verdict, share, 0)
    assert "standard errors" not in str(found)
    assert ("5 users are too few to say more, 6 are needed" in str(found)) == (users == 5)


@pytest.mark.parametrize(("users", "verdict"), [(2, "not_above"), (5, "not_above"), (6, "above")])
def test_six_nearly_equal_users_are_needed_for_a_verdict(users: int, verdict: str) -> None:
    """With two users, the difference exceeds two standard errors by chance in 15 % of cases."""
    old: dict[str, Any] = {"all": {"users": 3}}
    found = judge([old, line(list(range(users)), [100] * users, [50 + user for user in range(users)])])
    assert found.verdict == verdict
    assert found.difference > 10 * found.standard_error > 0
    assert ("by more than two standard errors" in str(found)) == (verdict == "above")
    assert (f"{users} users are too few to say more, 6 are needed" in str(found)) == (verdict != "above")
    assert "1 of 2 tests, recorded by an earlier version, are left out" in str(found)


def test_verdict_is_unknown_for_fewer_than_two_users() -> None:
    assert judge([]).verdict == "unknown"
    assert "no window was tested" in str(judge([]))
    nobody = judge([line([], [], [])])
    assert (nobody.verdict, nobody.baseline, nobody.difference) == ("unknown", None, None)
    assert "no user was tested on an item that was new to the user" in str(nobody)
    alone = judge([line([3], [4], [4]), line([3], [4], [3])])
    assert (alone.verdict, alone.users, alone.targets, alone.standard_error) == ("unknown", 1, 8, None)
    assert "a single user" in str(alone)


def test_lines_of_an_earlier_version_are_excluded_and_reported() -> None:
    old: dict[str, Any] = {"all": {"users": 3}}
    assert judge([old]).verdict == "unknown"
    assert "version that ranked last targets only" in str(judge([old]))
    mixed = judge([old, line(list(range(6)), [2] * 6, [2, 1, 2, 2, 2, 2])])
    assert (mixed.verdict, mixed.users) == ("above", 6)
    assert "1 of 2 tests, recorded by an earlier version, are left out" in str(mixed)
