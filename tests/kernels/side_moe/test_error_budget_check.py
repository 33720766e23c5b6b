"""The error-budget check of side_moe: an unlucky draw passes, and a kernel that loses digits fails."""

from collections.abc import Callable

import pytest
import torch

from tests.kernels.helpers import side_moe_check
from tests.kernels.helpers.error_budget import DRAWS
from tests.kernels.helpers.side_level import Level, make_level, to
from tests.kernels.helpers.side_moe_check import Call, Results, check_backend, oracle, redrawn, results

Kernel = Callable[[Level, Call, int], Results]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], list[Level]]:
    """Replace the backend by a function; return the levels that it is called with."""

    def replace(kernel: Kernel) -> list[Level]:
        levels: list[Level] = []

        def served(level: Level, call: Call, backend: str, seed: int) -> Results:
            levels.append(level)
            return kernel(level, call, seed)

        monkeypatch.setattr(side_moe_check, "served_results", served)
        return levels

    return replace


def far_level(seed: int = 0) -> Level:
    """Return a level with logits far from zero, where few rows make most of the error."""
    level = make_level(100, 24, 3, 5, dtype=torch.float32, seed=seed, requires_grad=False)
    return level._replace(router=(level.router.double() * 80).float())


def with_errors(factor: float) -> Kernel:
    """Return a kernel whose errors are the reference's times `factor`."""

    def kernel(level: Level, call: Call, seed: int) -> Results:
        reference, exact = oracle(level, call, seed)
        return {name: (exact[name] + factor * (t.double() - exact[name])).to(t.dtype) for name, t in reference.items()}

    return kernel


def lucky(level: Level, call: Call) -> tuple[Results, Results]:
    """Return the result of `oracle` with a tenth of the reference's errors."""
    reference, exact = oracle(level, call)
    return {name: (exact[name] + 0.1 * (t.double() - exact[name])).to(t.dtype) for name, t in reference.items()}, exact


@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_as_exact_as_the_reference_passes(calls: Callable[[Kernel], list[Level]], seed: int) -> None:
    calls(with_errors(1))
    check_backend("native", far_level(seed), Call(), draws=8)


def test_a_reference_that_is_exact_by_luck_in_one_draw_does_not_fail_a_kernel(
    calls: Callable[[Kernel], list[Level]],
) -> None:
    level = far_level()
    levels = calls(with_errors(1))
    check_backend("native", level, Call(), lucky(level, Call()))
    assert len(levels) == DRAWS


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("draws", [1, 8])
def test_a_kernel_of_three_times_the_references_error_fails(
    calls: Callable[[Kernel], list[Level]], seed: int, draws: int
) -> None:
    calls(with_errors(3))
    with pytest.raises(AssertionError, match="budget|a number is off"):
        check_backend("native", far_level(seed), Call(), draws=draws)


def test_a_kernel_that_loses_bits_of_the_logits_fails(calls: Callable[[Kernel], list[Level]]) -> None:
    """The kernel multiplies by a router rounded from 24 to 19 bits."""

    def kernel(level: Level, call: Call, seed: int) -> Results:
        bits = level.router.view(torch.int32)
        return results(level._replace(router=(bits & ~31).view(torch.float32)), call, "reference", torch.float32, seed)

    calls(kernel)
    with pytest.raises(AssertionError, match="error"):
        check_backend("native", far_level(), Call(), draws=8)


@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("number", [0.1, float("nan")])
def test_one_wrong_number_in_one_draw_fails(calls: Callable[[Kernel], list[Level]], rows: int, number: float) -> None:
    level = make_level(rows, 24, 3, 5, dtype=torch.float32, requires_grad=False)

    def kernel(given: Level, call: Call, seed: int) -> Results:
        found = results(given, call, "reference", torch.float32, seed)
        if given is level:
            found["y"][rows // 2, 7] += number
        return found

    levels = calls(kernel)
    with pytest.raises(AssertionError, match="y: "):
        check_backend("native", level, Call())
    assert len(levels) == DRAWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_draw_has_the_same_scale_of_every_input(dtype: torch.dtype) -> None:
    level = to(far_level(), dtype)._replace(backbone=torch.zeros(100, 24, dtype=dtype))
    assert redrawn(level, 0) is level
    again = redrawn(level, 1)
    assert not again.backbone.any()
    for name in ("x", "router", "down", "up"):
        value, found = getattr(level, name), getattr(again, name)
        assert found.dtype == dtype
        ratio = (found.double() / value.double())[value != 0]
        assert ratio.min() < 0.8
        assert ratio.max() > 1.2
        assert ((ratio > 0.74) & (ratio < 1.26)).all(), name
