"""Errors of side_moe for bad arguments."""

import re
from typing import Any

import pytest
import torch

from tests.kernels.helpers.side_level import make_level
from xsmoe_kernels import FrozenExperts, Utilization, side_moe


def arguments(**changes: Any) -> dict[str, Any]:
    """Return a valid level of 6 rows, D = 5, E = 3 and R = 4, with the changes."""
    level = make_level(6, 5, 3, 4, dtype=torch.float32)
    return {**level._asdict(), **changes}


def bank(experts: int, rank: int = 4, dim: int = 5, **options: Any) -> torch.Tensor:
    return torch.zeros(experts, rank, dim, **options)


BAD = [
    ({"backbone": None}, TypeError, "backbone must be a Tensor of shape (N, D), not NoneType"),
    ({"backbone": torch.zeros(5)}, ValueError, "backbone must have shape (N, D), not (5,)"),
    ({"backbone": torch.zeros(6, 5, dtype=torch.long)}, TypeError, "backbone must be float32, bfloat16, float16 or"),
    ({"x": [[0.0]]}, TypeError, "x must be a Tensor of shape (N, D), not list"),
    ({"x": torch.zeros(6, 4)}, ValueError, "x must have shape (N, 5), not (6, 4)"),
    (
        {"x": torch.zeros(2, 5)},
        ValueError,
        "x must have the 6 rows of backbone, or a single row for all of them, not 2",
    ),
    (
        {"x": torch.zeros(0, 5)},
        ValueError,
        "x must have the 6 rows of backbone, or a single row for all of them, not 0",
    ),
    ({"router": torch.zeros(4, 6)}, ValueError, "router must have shape (E+1, 5), not (4, 6)"),
    (
        {"router": torch.zeros(3, 5)},
        ValueError,
        "router must have 4 rows, one for the backbone and one for each of the 3 experts, not 3",
    ),
    ({"down": torch.zeros(12, 5)}, ValueError, "down must have shape (E, R, D), not (12, 5)"),
    ({"up": bank(3, rank=3)}, ValueError, "up must have shape (3, 4, 5), not (3, 3, 5)"),
    ({"up": bank(3).transpose(1, 2)}, ValueError, "up must have shape (3, 4, 5), not (3, 5, 4)"),
    ({"down": bank(0), "up": bank(0)}, ValueError, "down and up hold no expert, and frozen none either"),
    ({"up": bank(3, dtype=torch.bfloat16)}, TypeError, "up is torch.bfloat16, but x is torch.float32; cast one"),
    ({"up": bank(3, device="meta")}, ValueError, "up is on meta, but x is on cpu; move them to one device"),
    ({"num_frozen": 4}, ValueError, "num_frozen must be from 0 to 3, the number of experts, not 4"),
    ({"num_frozen": -1}, ValueError, "num_frozen must be from 0 to 3, the number of experts, not -1"),
    ({"num_frozen": 1.0}, TypeError, "num_frozen must be an int, not float"),
    ({"num_frozen": True}, TypeError, "num_frozen must be an int, not bool"),
    ({"frozen": bank(1)}, TypeError, "frozen must be a FrozenExperts or None, not Tensor"),
    (
        {"frozen": FrozenExperts(bank(2), bank(2))},
        ValueError,
        "router must have 6 rows, one for the backbone and one for each of the 5 experts (2 of them frozen), not 4",
    ),
    (
        {"frozen": FrozenExperts(bank(2, rank=3), bank(2, rank=3))},
        ValueError,
        "frozen.down must have shape (F, 4, 5), not (2, 3, 5)",
    ),
    (
        {"frozen": FrozenExperts(bank(2), bank(2)), "router": torch.zeros(6, 5), "num_frozen": 2},
        ValueError,
        "num_frozen must be 0 where frozen is given, not 2",
    ),
    (
        {"frozen": FrozenExperts(bank(2).double(), bank(2).double()), "router": torch.zeros(6, 5)},
        TypeError,
        "frozen.down is torch.float64, but x is torch.float32",
    ),
    (
        {"frozen": FrozenExperts(bank(2).to("meta"), bank(2).to("meta")), "router": torch.zeros(6, 5)},
        ValueError,
        "frozen.down is on meta, but x is on cpu",
    ),
    ({"activation": "swish"}, ValueError, "activation must be one of gelu, gelu_tanh, relu, not 'swish'"),
    ({"activation": 3}, TypeError, "activation must be a str, not int"),
    ({"utilization": 3}, TypeError, "utilization must be a Utilization or None, not int"),
    ({"utilization": Utilization(2)}, ValueError, "utilization counts 2 experts, but router has rows for 3"),
    ({"utilization": Utilization(3, device="meta")}, ValueError, "utilization is on meta, but x is on cpu"),
    ({"row_weight": torch.ones(5)}, ValueError, "row_weight must have shape (6,), not (5,)"),
    ({"row_weight": torch.ones(6, dtype=torch.long)}, TypeError, "row_weight must be float32, bfloat16, float16 or"),
    ({"row_weight": torch.ones(6, device="meta")}, ValueError, "row_weight is on meta, but x is on cpu"),
    ({"recompute": 1}, TypeError, "recompute must be True or False, not int"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_a_bad_argument_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        side_moe(**arguments(**changes))


def test_nothing_is_counted_when_an_argument_is_bad() -> None:
    counters = Utilization(3)
    with pytest.raises(ValueError, match="activation"):
        side_moe(**arguments(utilization=counters, activation="swish"))
    assert not counters.gate.any()


@pytest.mark.parametrize(
    ("down", "up", "error", "message"),
    [
        (None, bank(1), TypeError, "down must be a Tensor of shape (F, R, D), not NoneType"),
        (bank(1)[0], bank(1), ValueError, "down must have shape (F, R, D), not (4, 5)"),
        (bank(2), bank(1), ValueError, "up must have shape (2, 4, 5), not (1, 4, 5)"),
        (bank(1), bank(1).bfloat16(), TypeError, "up is torch.bfloat16, but down is torch.float32"),
        (bank(1), bank(1).to("meta"), ValueError, "up is on meta, but down is on cpu"),
        (bank(1).long(), bank(1), TypeError, "down must be float32"),
    ],
)
def test_frozen_experts_check_their_weights(down: Any, up: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FrozenExperts(down, up)
