"""Calls of in_batch_softmax_loss on the device under test: in Triton's interpreter, or on a GPU if there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.helpers.error_budget import Compared, assert_draws_within_budget, assert_within_budget
from tests.kernels.helpers.native_in_batch_softmax_loss import GRADIENTS, NAME, Case
from tests.kernels.helpers.native_in_batch_softmax_loss import draw as draw_on_cpu
from tests.kernels.helpers.native_in_batch_softmax_loss import exact as exact_of
from tests.kernels.helpers.triton_gpu import DEVICE, needs_triton
from xsmoe_kernels import in_batch_softmax_loss, use_backend
from xsmoe_kernels.runtime import dispatch

MARKS = [
    needs_triton,
    # NumPy's, of NaN and infinity, which the interpreter computes with outside of masks.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

Batch = dict[str, Any]


def draw(case: Case) -> Batch:
    """Return the arguments of a call on the device under test."""
    batch = draw_on_cpu(case)
    moved = {name: value if value is None else value.detach().to(DEVICE) for name, value in batch.items()}
    for name in GRADIENTS:
        moved[name].requires_grad_(batch[name].requires_grad)
    return moved


def outputs(batch: Batch, backend: str, upstream: float = 3.0) -> dict[str, Tensor]:
    """Return the loss and the needed gradients for an upstream gradient that is not 1."""
    with use_backend(backend):
        loss = in_batch_softmax_loss(**batch)
    needed = [name for name in GRADIENTS if batch[name].requires_grad]
    found = torch.autograd.grad(loss, [batch[name] for name in needed], loss.new_tensor(upstream)) if needed else ()
    return {"loss": loss.detach(), **dict(zip(needed, found, strict=True))}


def exact(batch: Batch) -> dict[str, Tensor]:
    with use_backend("reference"):
        return exact_of(batch)


def compared(batch: Batch) -> dict[str, Compared]:
    """Return the results of a batch and those of the reference, in its dtype and in float64."""
    before = dispatch.calls.copy()
    actual = outputs(batch, "triton")
    called = {(NAME, "triton"): 1} | ({(f"{NAME}_backward", "triton"): 1} if len(actual) > 1 else {})
    assert dispatch.calls - before == called
    reference, truth = outputs(batch, "reference"), exact(batch)
    return {name: Compared(value, reference[name], truth[name]) for name, value in actual.items()}


def within_budget(batch: Batch) -> dict[str, Tensor]:
    """Fail unless the results of a batch are within the error budget; return them."""
    found = compared(batch)
    for name, values in found.items():
        assert_within_budget(*values, name)
    return {name: values.actual for name, values in found.items()}


def check(case: Case) -> dict[str, Tensor]:
    """Fail unless the results of a case are within the error budget; return those of its first draw."""

    def judge(actual: Tensor, reference: Tensor, exact: Tensor, name: str) -> None:
        assert_within_budget(actual, reference, exact, f"{name} of {case}")

    return assert_draws_within_budget(lambda k: compared(draw(case._replace(seed=case.seed + k))), judge=judge)


def replaced(batch: Batch, **values: Any) -> Batch:
    """Return the batch with other values; queries and items are leaves with the same requires_grad."""
    for name in GRADIENTS:
        if name in values:
            values[name] = values[name].detach().requires_grad_(batch[name].requires_grad)
    return batch | values


def same_as_reference(batch: Batch) -> dict[str, Tensor]:
    """Fail unless the kernels give the reference's result, NaN included; return it."""
    # Shares that are rounded to 16 bits before their products move small sums by more than their last bits.
    half = batch["items"].dtype != torch.float32
    bounds = {"rtol": 0.05, "atol": 1e-3} if half else {"rtol": 1e-4, "atol": 1e-5}
    actual = outputs(batch, "triton")
    torch.testing.assert_close(actual, outputs(batch, "reference"), equal_nan=True, **bounds)
    return actual
