"""Gates with an offset, `softmax(x router^T + offset)`, by operators that have no offset.

A column that is the same in every row of x carries the offset: x becomes [x, c], the router [router, offset / c], the
backbone [backbone, c], and the experts' weights get columns of zeros, so that every expert returns [x + f(x), c]. The
first D columns of the mixture are the mixture with the offset.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xsmoe_kernels import FrozenExperts

COLUMNS = 16
"""Columns that are added, so that rows stay aligned; all but the first are zeros."""
UNIT = 2.0**-6
"""c: a power of two, so that no dtype rounds it, and small, so that the counted norms of outputs stay the same."""
_ZEROS = (0, COLUMNS - 1)


def with_offset(operands: dict[str, Any], offset: Tensor) -> dict[str, Any]:
    """Return operands of `side_moe` for rows of D + COLUMNS numbers, whose first D results have the gates' offset.

    Args:
        operands: x (N or 1, D), backbone (N, D), router (E + 1, D), down and up (E, R, D); "frozen" is wide already.
        offset: (E + 1,), added to the logits of the backbone and of every expert.
    """
    router = operands["router"]
    offset = (offset / UNIT).to(router.dtype)[:, None]
    changed = {
        "x": functional.pad(functional.pad(operands["x"], (0, 1), value=UNIT), _ZEROS),
        "backbone": functional.pad(functional.pad(operands["backbone"], (0, 1), value=UNIT), _ZEROS),
        "router": functional.pad(torch.cat([router, offset], dim=1), _ZEROS),
        "down": functional.pad(operands["down"], (0, COLUMNS)),
        "up": functional.pad(operands["up"], (0, COLUMNS)),
    }
    return operands | changed


def widened(down: Tensor, up: Tensor) -> FrozenExperts:
    """Return frozen experts (F, R, D) for rows of D + COLUMNS numbers."""
    return FrozenExperts(functional.pad(down, (0, COLUMNS)), functional.pad(up, (0, COLUMNS)))
