"""The native in_batch_softmax_loss against float64: its check, and a selection of cases for each instruction set.

    XSMOE_CPU_TIER=avx2 python tests/kernels/helpers/native_in_batch_softmax_loss.py

compares the selection on one instruction set.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernels.helpers.error_budget import Compared, assert_draws_within_budget, assert_within_budget
from xsmoe_kernels import in_batch_softmax_loss, use_backend
from xsmoe_kernels.runtime import dispatch

DTYPES = (torch.float32, torch.bfloat16)
NAME = "in_batch_softmax_loss"
GRADIENTS = ("queries", "items")


class Case(NamedTuple):
    """Sizes and options of a call; `users` is the number of rows of rejected, 0 for one per query."""

    queries: int
    items: int
    dim: int
    width: int = 0
    users: int = 0
    logq: bool = True
    counts: bool = True
    dtype: torch.dtype = torch.float32
    needed: tuple[bool, bool] = (True, True)
    seed: int = 0


def draw(case: Case) -> dict[str, Any]:
    """Return the arguments of a call; queries and items require the gradients that the case requests."""
    generator = torch.Generator().manual_seed(case.seed)

    def rows(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def indices(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(low + 1, high), shape, generator=generator)

    need_queries, need_items = case.needed
    scale = max(1, case.dim) ** -0.5
    return {
        "queries": rows(case.queries, case.dim, scale=2 * scale).to(case.dtype).requires_grad_(need_queries),
        "items": rows(case.items, case.dim).to(case.dtype).requires_grad_(need_items),
        "targets": indices(0, case.items, case.queries),
        "rejected": indices(-1, case.items, case.users or case.queries, case.width),
        "users": indices(0, case.users, case.queries) if case.users else None,
        "logq": rows(case.items).log_softmax(0) if case.logq else None,
        "counts": indices(0, 4, case.items) if case.counts else None,
    }


def outputs(batch: dict[str, Any], backend: str, upstream: float = 3.0) -> dict[str, Tensor]:
    """Return the loss and the needed gradients for an upstream gradient that is not 1."""
    with use_backend(backend):
        loss = in_batch_softmax_loss(**batch)
    needed = [name for name in GRADIENTS if batch[name].requires_grad]
    found = torch.autograd.grad(loss, [batch[name] for name in needed], torch.tensor(upstream)) if needed else ()
    return {"loss": loss.detach(), **dict(zip(needed, found, strict=True))}


def outputs_of_halves(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the same from a forward without gradients and a backward that computes them."""
    inputs = [value.detach() if isinstance(value, Tensor) else None for value in batch.values()]
    if inputs[-1] is not None:
        inputs[-1] = inputs[-1].float()
    needs = [batch[name].requires_grad for name in GRADIENTS]
    loss, lse, *_ = torch.ops.xsmoe.in_batch_softmax_loss(*inputs, False, False, "native")
    rest = (lse, None, None, torch.tensor(3.0), *needs, "native")
    found = torch.ops.xsmoe.in_batch_softmax_loss_backward(*inputs, *rest)
    gradients = {name: gradient for name, gradient, need in zip(GRADIENTS, found, needs, strict=True) if need}
    return {"loss": loss, **gradients}


def exact(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the same in float64."""
    wide = {name: batch[name].detach().double().requires_grad_(batch[name].requires_grad) for name in GRADIENTS}
    loss = in_batch_softmax_loss(**batch | wide)
    needed = [name for name in GRADIENTS if batch[name].requires_grad]
    found = torch.autograd.grad(3 * loss, [wide[name] for name in needed]) if needed else ()
    return {"loss": loss.detach(), **dict(zip(needed, found, strict=True))}


def check(case: Case) -> dict[str, Tensor]:
    """Fail unless both native results are within the error budget; return those of the public function."""

    def compare(draw_number: int) -> dict[str, Compared]:
        batch = draw(case._replace(seed=case.seed + draw_number))
        before = dispatch.calls[NAME, "native"]
        actual = outputs(batch, "native")
        assert dispatch.calls[NAME, "native"] == before + 1
        halves, reference, truth = outputs_of_halves(batch), outputs(batch, "reference"), exact(batch)
        assert list(actual) == list(halves) == list(truth)
        return {
            name + suffix: Compared(value, reference[name], truth[name])
            for found, suffix in ((actual, ""), (halves, " in two calls"))
            for name, value in found.items()
        }

    def judge(actual: Tensor, reference: Tensor, exact: Tensor, name: str) -> None:
        assert_within_budget(actual, reference, exact, f"{name} of {case}")

    found = assert_draws_within_budget(compare, judge=judge)
    return {name: value for name, value in found.items() if not name.endswith(" in two calls")}


# Past one tile of queries for every instruction set level and one strip of items, and so
# many items that no tile keeps their logits.
SELECTION = [
    Case(*sizes, users=users, logq=logq, counts=counts, dtype=dtype)
    for dtype in DTYPES
    for sizes, users, logq, counts in (
        ((300, 1100, 40, 5), 7, True, True),
        ((145, 513, 128, 0), 0, False, False),
        ((33, 512, 33, 3), 0, True, False),
        ((150, 10_500, 8, 4), 9, False, True),
        ((29, 37, 1, 40), 2, True, True),
        ((1, 1, 1, 1), 0, True, True),
        ((2, 3, 0, 1), 0, True, True),
        ((0, 5, 3, 2), 0, True, True),
    )
]

if __name__ == "__main__":
    # Fills `torch.empty` with NaN, as pytest does for the tests.
    torch.use_deterministic_algorithms(True, warn_only=True)
    for one in SELECTION:
        check(one)
    print(torch.ops.xsmoe_native.cpu_tier(), len(SELECTION))
