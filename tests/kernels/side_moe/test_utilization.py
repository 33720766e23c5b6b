"""Tests of the counters alone."""

import re
from typing import Any

import pytest
import torch

from tests.kernels.helpers.side_level import make_level
from xsmoe_kernels import Utilization, side_moe


def counted() -> Utilization:
    counters = Utilization(3)
    counters.add_(torch.tensor([5.0, 1.0, 2.0, 1.0]), torch.tensor([4.0, 2.0, 1.0, 1.0]))
    return counters


def test_starts_at_zero_in_float64() -> None:
    counters = Utilization(3)
    assert counters.num_experts == 3
    for counter in (counters.norm, counters.gate):
        assert counter.dtype == torch.float64
        assert counter.tolist() == [0.0] * 4


def test_shares_leave_the_backbone_out_and_gate_shares_do_not() -> None:
    counters = counted()
    assert counters.shares().tolist() == [0.25, 0.5, 0.25]
    assert counters.gate_shares().tolist() == [0.5, 0.25, 0.125, 0.125]


def test_shares_of_nothing_are_nan() -> None:
    assert Utilization(2).shares().isnan().all()
    assert Utilization(2).gate_shares().isnan().all()


def test_reset_clears_in_place() -> None:
    counters = counted()
    norm = counters.norm
    counters.reset()
    assert counters.norm is norm
    assert not norm.any()
    assert not counters.gate.any()


def test_small_increments_are_not_lost_in_a_large_sum() -> None:
    counters = Utilization(1)
    counters.add_(torch.full((2,), 2.0**24), torch.full((2,), 2.0**24))
    for _ in range(3):
        counters.add_(torch.ones(2), torch.ones(2))
    assert counters.norm.tolist() == [2.0**24 + 3] * 2, "float32 would have stayed at 2**24"


def test_state_dict_is_a_copy_that_loads_in_place() -> None:
    counters, other = counted(), Utilization(3)
    state, norm = counters.state_dict(), other.norm
    counters.reset()
    other.load_state_dict(state)
    assert other.norm is norm
    assert norm.tolist() == [5.0, 1.0, 2.0, 1.0]
    assert other.gate.tolist() == [4.0, 2.0, 1.0, 1.0]


def test_a_state_of_another_number_of_experts_changes_nothing() -> None:
    counters = counted()
    state = {"norm": torch.zeros(4), "gate": torch.zeros(3)}
    with pytest.raises(ValueError, match=re.escape("state['gate'] must have shape (4,), not (3,)")):
        counters.load_state_dict(state)
    assert counters.norm.tolist() == [5.0, 1.0, 2.0, 1.0]


def test_counters_made_in_inference_mode_work_in_training() -> None:
    level = make_level(6, 5, 3, 4)
    with torch.inference_mode():
        made, moved = Utilization(3), Utilization(3).to("meta")
        side_moe(*level, utilization=made)
    assert not any(counter.is_inference() for counter in (made.norm, made.gate, moved.norm, moved.gate))
    once = made.gate.clone()
    side_moe(*level, utilization=made).sum().backward()
    torch.testing.assert_close(made.gate, 2 * once)


def test_moves_in_place() -> None:
    counters = counted()
    assert counters.to("meta") is counters
    assert counters.norm.device.type == counters.gate.device.type == "meta"


@pytest.mark.parametrize(
    ("num_experts", "error", "message"),
    [
        (0, ValueError, "num_experts must be at least 1, not 0"),
        (2.0, TypeError, "num_experts must be an int, not float"),
        (True, TypeError, "num_experts must be an int, not bool"),
    ],
)
def test_a_bad_number_of_experts_is_named(num_experts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Utilization(num_experts)


def test_increments_of_another_number_of_experts_are_rejected() -> None:
    with pytest.raises(ValueError, match=re.escape("gate must have shape (4,), not (1,)")):
        counted().add_(torch.zeros(4), torch.zeros(1))
