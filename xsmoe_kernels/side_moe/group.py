"""Several side levels in one call."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels.side_moe.op import check_arguments, side_moe


def side_moe_group(layers: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """`side_moe` for several independent levels, each with its own sizes and number of experts.

    Args:
        layers: for each level a mapping whose keys are the names of `side_moe`'s arguments.

    Returns:
        What `side_moe` returns for each level, in order.

    Raises:
        TypeError, ValueError: as `side_moe` raises them, for the first level that is wrong, before any level is
            computed; the message starts with the level's place, as in `layers[2]: ...`.
        BackendUnavailable: the backend asked for with `use_backend` cannot serve a level.
    """
    if not torch.compiler.is_compiling():
        for place, layer in enumerate(layers):
            try:
                if not isinstance(layer, Mapping):
                    raise TypeError(f"a level must be a mapping of side_moe's arguments, not {type(layer).__name__}")
                bound = _SIGNATURE.bind(**layer)
                bound.apply_defaults()
                check_arguments(**bound.arguments)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layers[{place}]: {error}") from error
    return [side_moe(**layer) for layer in layers]


_SIGNATURE = inspect.signature(side_moe)
