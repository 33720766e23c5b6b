"""Comparison of side_moe on one backend with float64, for all tests of its kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.helpers.error_budget import (
    BudgetExceeded,
    Compared,
    assert_draws_within_budget,
    assert_within_budget,
)
from tests.kernels.helpers.side_level import Level, to
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, use_backend
from xsmoe_kernels.runtime import dispatch

EVERYTHING = (True,) * 5
ENOUGH_ROWS = 31
"""With at least as many rows, errors are judged by the norms of the budget."""

Results = dict[str, Tensor]


class Call(NamedTuple):
    """Arguments of side_moe other than its differentiable inputs."""

    num_frozen: int = 0
    apart: bool = False
    """The frozen experts are FrozenExperts."""
    activation: str = "gelu"
    recompute: bool | None = None
    counted: bool = True
    weighted: bool = False
    needed: tuple[bool, ...] = EVERYTHING
    """Which inputs need a gradient, in the order of `Level`."""


def results(level: Level, call: Call, backend: str, dtype: torch.dtype, seed: int = 3) -> Results:
    """Return y, the counters' increments and all gradients that are needed.

    `seed` draws the upstream gradient, which is rounded to `dtype`, and the rows' weights.
    """
    rows, experts = len(level.backbone), len(level.router) - 1
    generator = torch.Generator().manual_seed(seed)
    device = level.x.device
    upstream = torch.randn(level.backbone.shape, dtype=torch.float64, generator=generator).to(device, dtype)
    row_weight = torch.randint(0, 4, (rows,), generator=generator).float().to(device) if call.weighted else None
    counters = Utilization(experts, device) if call.counted else None
    inputs = Level(*(t.detach() for t in level))
    frozen, num_frozen = None, call.num_frozen
    if call.apart:
        frozen = FrozenExperts(inputs.down[:num_frozen].clone(), inputs.up[:num_frozen].clone())
        inputs = inputs._replace(down=inputs.down[num_frozen:], up=inputs.up[num_frozen:])
        num_frozen = 0
    inputs = Level(*(t.clone().requires_grad_(need) for t, need in zip(inputs, call.needed, strict=True)))
    with use_backend(backend):
        y = side_moe(
            *inputs,
            num_frozen=num_frozen,
            frozen=frozen,
            activation=call.activation,
            utilization=counters,
            row_weight=row_weight,
            recompute=call.recompute,
        )
    found = {"y": y.detach()}
    if counters is not None:
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        found |= {"norm": counters.norm.to(wide), "gate": counters.gate.to(wide)}
    if any(call.needed):
        y.backward(upstream.to(y.dtype))
    for name, tensor, need in zip(Level._fields, inputs, call.needed, strict=True):
        assert (tensor.grad is not None) == need, f"the gradient of {name}"
        if tensor.grad is not None:
            found["gradient of " + name] = tensor.grad
    return found


def served_results(level: Level, call: Call, backend: str, seed: int = 3) -> Results:
    """Return `results` of a backend; fail unless it ran."""
    before = dispatch.calls["side_moe", backend], dispatch.calls["side_moe_backward", backend]
    found = results(level, call, backend, level.x.dtype, seed)
    after = dispatch.calls["side_moe", backend], dispatch.calls["side_moe_backward", backend]
    assert after == (before[0] + 1, before[1] + any(call.needed))
    return found


def oracle(level: Level, call: Call, seed: int = 3) -> tuple[Results, Results]:
    """Return the reference's results in the level's dtype, and in float64 from the same rounded inputs."""
    dtype = level.x.dtype
    return (
        results(level, call, "reference", dtype, seed),
        results(to(level, torch.float64), call, "reference", dtype, seed),
    )


def redrawn(level: Level, draw: int) -> Level:
    """Return a level with every number times 3/4 to 5/4; draw 0 is the level itself.

    The scale of each input, its zeros and the size of the logits are kept; the rounding errors change.
    """
    if draw == 0:
        return level
    generator = torch.Generator().manual_seed(draw)

    def scaled(tensor: Tensor) -> Tensor:
        factor = 0.75 + 0.5 * torch.rand(tensor.shape, dtype=torch.float64, generator=generator)
        return (tensor.double() * factor.to(tensor.device)).to(tensor.dtype)

    return Level(*map(scaled, level))


def check_backend(
    backend: str,
    level: Level,
    call: Call,
    expected: tuple[Results, Results] | None = None,
    *,
    draws: int = 1,
) -> Results:
    """Fail unless a backend's results of a call stay within the error budget; return them.

    Args:
        backend: the backend under test.
        level: the inputs of the first draw; `redrawn` makes the others.
        call: how side_moe is called.
        expected: what `oracle` returns for the first draw, if it has been computed.
        draws: as in `assert_draws_within_budget`.
    """

    def compare(draw: int) -> dict[str, Compared]:
        inputs, seed = redrawn(level, draw), 3 + draw
        actual = served_results(inputs, call, backend, seed)
        for name, value in actual.items():
            assert value.is_contiguous(), name
        if not call.apart:
            for name in ("gradient of down", "gradient of up"):
                if name in actual:
                    assert not actual[name][: call.num_frozen].any(), f"{name}: zeros for frozen experts"
        reference, exact = oracle(inputs, call, seed) if expected is None or draw > 0 else expected
        return {name: Compared(value, reference[name], exact[name]) for name, value in actual.items()}

    def judge(actual: Tensor, reference: Tensor, exact: Tensor, name: str) -> None:
        if len(level.x) >= ENOUGH_ROWS:
            assert_within_budget(actual, reference, exact, name)
            _assert_no_outlier(actual, reference, exact, name)
        else:
            _assert_near(actual, reference, exact, name, level)

    return assert_draws_within_budget(compare, draws=draws, judge=judge)


def _assert_near(actual: Tensor, reference: Tensor, exact: Tensor, name: str, level: Level) -> None:
    """Judge the results of few rows, for which the reference's errors may be small by chance."""
    error, reference_error = (torch.linalg.vector_norm(t.double() - exact) for t in (actual, reference))
    dtype, terms = level.x.dtype, max(level.backbone.shape)
    # What a sum of so many numbers, one after the other, loses in float32; 16 bits round each term by much more.
    digits = 8 if dtype in (torch.bfloat16, torch.float16) else 4 + 4 * terms**0.5
    bound = 2 * reference_error + digits * torch.finfo(dtype).eps * torch.linalg.vector_norm(exact)
    if not error <= bound:
        raise BudgetExceeded(f"{name}: error {float(error):.3e}, of which {float(bound):.3e} are allowed")


def _assert_no_outlier(actual: Tensor, reference: Tensor, exact: Tensor, name: str) -> None:
    """Judge each draw's largest error: the norms of the budget say little of a single wrong number among many."""
    if exact.numel() == 0:
        return

    def largest(values: Tensor) -> Tensor:
        return torch.linalg.vector_norm(values.abs().flatten(1).amax(1))

    error, reference_error = (largest(t.double() - exact) for t in (actual, reference))
    # The norms of experts and gate masses are float32 whatever the inputs; the budget's eps is theirs, too.
    bound = 4 * reference_error + 8 * torch.finfo(actual.dtype).eps * largest(exact)
    if not error <= bound:
        raise BudgetExceeded(f"{name}: a number is off by {float(error):.3e}, of which {float(bound):.3e} are allowed")
