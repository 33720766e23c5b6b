"""No speed for a wrong result: every output, gradient and counter is judged against float64."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What the gate found.

    Attributes:
        refused: why no speed may be reported; None if all is right.
        ratio: the largest error of any result, in units of the error that the reference makes there.
        worst: the result it was found in.
    """

    refused: str | None
    ratio: float
    worst: str


def judge(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    dtype: torch.dtype,
    operators: int = 1,
) -> Verdict:
    """Compares results by name with the exact ones.

    A floating result passes if `|found - exact| <= 2 * |reference - exact| + 4 eps |exact|`, for the norm of the
    whole tensor and for the largest norm of a row. The second catches a wrong row
    among so many that the first does not see it. An integer result must be equal.

    Args:
        found: what is under test.
        exact: the same from float64, which are all the results there should be.
        reference: the same from the specification, computed in `dtype`.
        dtype: whose eps the budget takes; counters are wider than what they count.
        operators: how many of them a result goes through one after the other; in float32 each has the budget of one,
            while in fewer bits such a sum would let anything pass: there they have that of two.
    """
    ratio, worst = 0.0, ""
    eps = torch.finfo(dtype).eps
    chained = operators if dtype == torch.float32 else min(operators, 2)
    for name, truth in exact.items():
        if name not in found:
            return Verdict(f"{name} is missing", float("inf"), name)
        result = found[name].detach()
        if result.shape != truth.shape:
            return Verdict(f"{name} is {tuple(result.shape)}, not {tuple(truth.shape)}", float("inf"), name)
        if not truth.is_floating_point():
            wrong = int((result != truth).sum())
            if wrong:
                return Verdict(f"{name}: {wrong} of {truth.numel()} integers are wrong", float("inf"), name)
            continue
        measure = reference[name].detach()
        truth = truth.double()
        for rows in (False, True):
            size = _norm(truth, rows)
            error, reference_error = _norm(result.double() - truth, rows), _norm(measure.double() - truth, rows)
            budget = 2 * reference_error + 4 * chained * eps * size
            # Written so that a NaN, on either side, refuses.
            if not error <= budget < float("inf"):
                where = "worst row of " if rows else ""
                return Verdict(
                    f"{where}{name}: error {_relative(error, size)}, allowed {_relative(budget, size)}",
                    error / max(reference_error, eps * size / 8, 1e-300),
                    name,
                )
            # Where the reference is exact by luck, an eighth of eps, what rounding alone does, stands in for its error.
            measured = error / max(reference_error, eps * size / 8, 1e-300)
            if measured > ratio and not rows:
                ratio, worst = measured, name
    return Verdict(None, ratio, worst)


def _norm(tensor: Tensor, rows: bool) -> float:
    if tensor.numel() == 0:
        return 0.0
    if not rows:
        return float(torch.linalg.vector_norm(tensor))
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    return float(torch.linalg.vector_norm(flat, dim=-1).max())


def _relative(error: float, size: float) -> str:
    return f"{error / size:.2e} of its size" if size > 0 else f"{error:.2e}"
