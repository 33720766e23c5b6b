"""Summaries of `python -m bench quality`: pooled means, paired differences, errors, matrices, tables."""

import math
from typing import Any

import numpy as np
import pytest

from bench.e2e.quality import report
from bench.e2e.quality.summary import matrix_summary, summarize, user_error


def record(variant: str, seed: int, *tests: dict[str, int], **more: Any) -> dict[str, Any]:
    """Return a run whose tests have these users, with the rank of each user's last item."""
    lines = [
        {"window": number + 1, "users": list(ranks), "ranks": list(ranks.values()), "HR@10": hit_rate(ranks)}
        for number, ranks in enumerate(tests)
    ]
    found = {"variant": variant, "seed": seed, "commit": "abc", "experts": {"text": [2, 4]}, "tests": lines}
    rest = {"groups": {}, "verdict": None, "cost": None, "seconds": 1.0, "matrix": None}
    return found | rest | more


def hit_rate(ranks: dict[str, int]) -> float:
    return sum(0 < rank <= 10 for rank in ranks.values()) / len(ranks)


def test_means_pool_users_and_differences_are_paired_by_seed() -> None:
    records = [
        record("growth", 2, {"a": 0, "b": 11}, {"a": 10}),
        record("base", 1, {"a": 1, "b": 0}, {"a": 1}),
        record("growth", 1, {"a": 1, "b": 1}, {"a": 1}),
        record("base", 2, {"a": 1, "b": 0}, {"a": 0}),
        record("growth", 3, {"a": 1}),
    ]
    found = summarize(records, shared=True)
    assert list(found) == ["base", "growth"]
    base, other = found["base"], found["growth"]
    assert base["HR@10"]["values"] == pytest.approx([2 / 3, 1 / 3])
    assert base["HR@10"]["mean"] == pytest.approx(0.5)
    assert base["HR@10"]["se"] == pytest.approx(1 / 6)
    assert other["seeds"] == [1, 2, 3]
    assert other["HR@10"]["values"] == pytest.approx([1, 1 / 3, 1])
    # A seed that the base lacks has no difference.
    assert other["difference"]["HR@10"]["values"] == pytest.approx([1 / 3, 0])
    assert other["difference"]["HR@10"]["mean"] == pytest.approx(1 / 6)
    assert other["windows"]["1"]["mean"] == pytest.approx((1 + 0 + 1) / 3)
    assert other["windows"]["2"]["values"] == [1, 1]
    assert base["experts"] == 3


def test_errors_are_clustered_by_user() -> None:
    mine, theirs = record("copy", 1, {"a": 1, "b": 0, "c": 1}), record("base", 1, {"a": 0, "b": 0, "c": 1})
    # One test per user: the standard error of a mean.
    assert user_error([(mine, theirs)], "HR@10", shared=False) == pytest.approx(
        np.std([1, 0, 0], ddof=1) / math.sqrt(3)
    )
    # Equal seeds reduce the error only if their users are different.
    pairs = [(mine, theirs), (mine, theirs)]
    assert user_error(pairs, "HR@10", shared=True) == pytest.approx(np.std([1, 0, 0], ddof=1) / math.sqrt(3))
    assert user_error(pairs, "HR@10", shared=False) == pytest.approx(np.std([1, 0, 0] * 2, ddof=1) / math.sqrt(6))
    # Two tests of one user are one cluster: residuals of sums, with 3 tests in all.
    twice = record("copy", 1, {"a": 1, "b": 0}, {"a": 1}), record("base", 1, {"a": 0, "b": 0}, {"a": 0})
    wanted = math.sqrt(2 * 2 * (2 - 2 * 2 / 3) ** 2) / 3
    assert user_error([twice], "HR@10", shared=False) == pytest.approx(wanted)
    assert user_error([(mine, record("base", 1, {"a": 0, "b": 0, "d": 1}))], "HR@10", shared=False) is None
    assert user_error([(record("copy", 1, {"a": 1}), record("base", 1, {"a": 0}))], "HR@10", shared=False) is None


def test_a_matrix_separates_forgetting_from_transfer() -> None:
    first = [[0.5, 0.2, 0.1], [0.4, 0.6, 0.3], [0.1, 0.4, 0.7]]
    second = [[0.5, 0.2, 0.1], [0.5, 0.6, 0.3], [0.5, 0.6, 0.7]]
    found = matrix_summary([first, second])
    assert np.array(found["mean"]) == pytest.approx(np.mean([first, second], axis=0))
    assert found["own"]["values"] == pytest.approx([0.6, 0.6])
    assert found["next"]["values"] == pytest.approx([0.25, 0.25])
    assert found["backward"]["values"] == pytest.approx([(-0.1 - 0.4 - 0.2) / 3, 0])
    assert found["last"]["values"] == pytest.approx([-0.3, 0])
    assert found["last"]["se"] == pytest.approx(0.15)
    assert found["forward"]["values"] == pytest.approx([0.1, 0.1])


def test_a_matrix_omits_windows_without_tested_users() -> None:
    found = matrix_summary([[[None, 0.2, 0.1], [None, 0.6, 0.3], [None, 0.4, 0.7]]])
    assert found["mean"][0] == [None, 0.2, 0.1]
    assert found["own"]["values"] == pytest.approx([0.65])
    assert found["last"]["values"] == pytest.approx([-0.2])


def test_tables_show_groups_verdicts_matrices_and_mixed_commits() -> None:
    matrix = {metric: [[0.5, 0.2], [0.4, 0.6]] for metric in ("HR@10", "NDCG@10")}
    groups = {"masked": {"new": 0.25}}
    cost = {"seconds": 12.4, "peak_rss_mib": 500.0}
    more = {"groups": groups, "cost": cost, "matrix": matrix, "verdict": {"verdict": "above"}}
    records = [
        record("base", 1, {"a": 1, "b": 0}, **more),
        record("base", 2, {"a": 1, "b": 1}, **more),
        record("copy", 1, {"a": 1, "b": 1}, **more | {"groups": {"masked": {"new": 0.75}}, "commit": "xyz"}),
    ]
    found = summarize(records, shared=True)
    assert found["base"]["verdicts"] == {"above": 2}
    assert found["copy"]["groups"]["masked"]["new"]["difference"]["mean"] == pytest.approx(0.5)
    text = report.tables(found)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("| base")]
    assert cells[0][:3] == ["base", "2", "75.00 ± 25.00"]
    assert cells[0][-4:] == ["3.0", "12", "500", "2 above"]
    assert cells[1] == ["base", "25.00 ± 0.00"]
    assert cells[2][:4] == ["base", "55.00 ± 0.00", "20.00 ± 0.00", "-10.00 ± 0.00"]
    copied = next(line for line in text.split("\n") if line.startswith("| copy"))
    assert "+50.00" in copied
    assert "These runs are of several commits: abc, xyz" in text
    assert "by group" not in report.tables(summarize([record("base", 1, {"a": 1})], shared=True))
