"""Gates with an offset, `softmax(x router^T + offset)`, computed by operators without an offset argument.

A constant column of x encodes the offset: x becomes [x, c], the router becomes [router, offset / c], and the backbone
becomes [backbone, c]. The experts' weights get columns of zeros, so every expert returns [x + f(x), c]. The first D
columns of the result are the mixture with the offset.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xsmoe_kernels import FrozenExperts

COLUMNS = 16
"""Number of added columns, which keeps rows aligned. All but the first are zeros."""
UNIT = 2.0**-6
"""c. A power of two is exact in every dtype. A small value hardly changes the counted norms of outputs."""
_ZEROS = (0, COLUMNS - 1)


def with_offset(operands: dict[str, Any], offset: Tensor) -> dict[str, Any]:
    """Return operands of `side_moe` of width D + COLUMNS. The first D columns of the result include the gates' offset.

    Args:
        operands: x (N or 1, D), backbone (N, D), router (E + 1, D), down and up (E, R, D); "frozen" already has width
            D + COLUMNS.
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
    """Return frozen experts (F, R, D), padded with zeros to width D + COLUMNS."""
    return FrozenExperts(functional.pad(down, (0, COLUMNS)), functional.pad(up, (0, COLUMNS)))
