"""`sparse_side_moe`: values, gradients and counters against the reference, errors, compilation."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.side_level import Level, make_level
from xsmoe_kernels import Utilization, side_moe, sparse_side_moe, use_backend
from xsmoe_kernels.ops.sparse_side_moe import reference

EXPERTS = 4
OFFSET = torch.tensor([0.5, -1, 2, 0, 1], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 2, 0, 0.5, 3, 1], dtype=torch.float64)


def level(one_row: bool = False, dtype: torch.dtype = torch.float64) -> Level:
    return make_level(6, 5, EXPERTS, 3, one_row=one_row, dtype=dtype)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("offset", [None, OFFSET])
@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
def test_values_gradients_and_counters_are_the_reference_ones(top_k: int, offset: Tensor | None, one_row: bool) -> None:
    inputs, utilization = level(one_row), Utilization(EXPERTS)
    y = sparse_side_moe(*inputs, top_k=top_k, gate_offset=offset, utilization=utilization, row_weight=WEIGHT)
    expected, norm, gate = reference.forward(*inputs, top_k, offset, WEIGHT)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close((utilization.norm, utilization.gate), (norm, gate))
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, inputs, grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, grad))


def test_the_gate_offset_has_a_gradient() -> None:
    inputs, offset = level(), OFFSET.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda offset: sparse_side_moe(*inputs, top_k=2, gate_offset=offset), offset)


def test_frozen_experts_have_no_weight_gradient() -> None:
    inputs = level()
    sparse_side_moe(*inputs, top_k=4, num_frozen=2).sum().backward()
    for weight in (inputs.down, inputs.up):
        assert weight.grad is not None
        assert not weight.grad[:2].any()
        assert weight.grad[2:].any()


def test_with_all_experts_it_is_side_moe() -> None:
    inputs = level()
    torch.testing.assert_close(sparse_side_moe(*inputs, top_k=EXPERTS), side_moe(*inputs))


def test_of_equal_logits_the_lower_expert_is_chosen() -> None:
    inputs = level()._replace(router=torch.zeros(EXPERTS + 1, 5, dtype=torch.float64))
    utilization = Utilization(EXPERTS)
    sparse_side_moe(*inputs, top_k=2, utilization=utilization)
    torch.testing.assert_close(utilization.gate, torch.tensor([2.0, 2, 2, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_runs_in_float32_on_every_cpu_backend(backend: str) -> None:
    inputs = level(dtype=torch.float32)
    with use_backend(backend):
        y = sparse_side_moe(*inputs, top_k=2)
    assert y.dtype == torch.float32
    expected, _, _ = reference.forward(*(value.double() for value in inputs), 2)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_compiles_to_one_graph() -> None:
    inputs = level()
    function = compiled(lambda *inputs: sparse_side_moe(*inputs, top_k=2, gate_offset=OFFSET))
    y, expected = function(*inputs), sparse_side_moe(*inputs, top_k=2, gate_offset=OFFSET)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"top_k": 0}, ValueError, "top_k must be at least 1, not 0"),
    ({"top_k": 1.0}, TypeError, "top_k must be an int, not float"),
    ({"num_frozen": 5}, ValueError, "num_frozen must be from 0 to 4, the number of experts, not 5"),
    ({"gate_offset": OFFSET[:4]}, ValueError, "gate_offset must have shape (5,), not (4,)"),
    ({"gate_offset": OFFSET.long()}, TypeError, "gate_offset must be float32"),
    ({"gate_offset": OFFSET.to("meta")}, ValueError, "gate_offset is on meta, but x is on cpu"),
    ({"gate_offset": [0.0]}, TypeError, "gate_offset must be a Tensor of shape (E+1,), not list"),
    ({"utilization": Utilization(3)}, ValueError, "utilization counts 3 experts, but router has rows for 4"),
    ({"utilization": 3}, TypeError, "utilization must be a Utilization or None, not int"),
    ({"row_weight": WEIGHT[:2]}, ValueError, "row_weight must have shape (6,), not (2,)"),
    ({"router": torch.zeros(4, 5, dtype=torch.float64)}, ValueError, "router must have 5 rows"),
    ({"backbone": torch.zeros(6, 5)}, TypeError, "backbone is torch.float32, but x is torch.float64"),
    ({"x": torch.zeros(2, 5, dtype=torch.float64)}, ValueError, "x must have the 6 rows of backbone"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        sparse_side_moe(**{**level()._asdict(), "top_k": 2, **change})
