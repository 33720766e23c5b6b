"""Several side levels in one call."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels.side_moe.op import apply, check, prepare, side_moe
from xsmoe_kernels.side_moe.utilization import Utilization


def side_moe_group(layers: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """`side_moe` for several independent levels, each with its own sizes and number of experts.

    Args:
        layers: for each level a mapping whose keys are the names of `side_moe`'s arguments.

    Returns:
        What `side_moe` returns for each level, in order.

    Raises:
        TypeError: layers cannot be iterated over.
        TypeError, ValueError: as `side_moe` raises them, for the first level that is wrong, before any level is
            computed; the message starts with the level's place, as in `layers[2]: ...`.
        BackendUnavailable: the backend asked for with `use_backend` cannot serve a level.
    """
    if torch.compiler.is_compiling():
        return [side_moe(**layer) for layer in layers]
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"layers must hold a mapping of side_moe's arguments for each level, not {type(layers).__name__}"
        )
    levels = [_checked(place, layer) for place, layer in enumerate(layers)]
    return [apply(operands, utilization) for operands, utilization in levels]


def _checked(place: int, layer: Mapping[str, Any]) -> tuple[tuple[Any, ...], Utilization | None]:
    """What `apply` takes, for a level that is right."""
    try:
        if not isinstance(layer, Mapping):
            raise TypeError(f"a level must be a mapping of side_moe's arguments, not {type(layer).__name__}")
        bound = _SIGNATURE.bind(**layer)
        bound.apply_defaults()
        operands = prepare(**bound.arguments)
        check(*operands[:-1])  # all but the backend
    except (TypeError, ValueError) as error:
        raise type(error)(f"layers[{place}]: {error}") from error
    return operands, bound.arguments["utilization"]


_SIGNATURE = inspect.signature(side_moe)
