"""Several side levels in one call: `side_moe_group`."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels.ops.side_moe import op
from xsmoe_kernels.ops.side_moe.checks import check_level
from xsmoe_kernels.ops.side_moe.utilization import Utilization
from xsmoe_kernels.runtime.list_operator import ListOperator


def side_moe_group(layers: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """Compute `side_moe` for several independent levels, each with its own sizes and number of experts.

    On a GPU, levels of one device and dtype run as one operator, whose kernels process up to eight levels per launch.

    Args:
        layers: for each level a mapping whose keys are the names of `side_moe`'s arguments.

    Returns:
        The results of `side_moe` for the levels, in order.

    Raises:
        TypeError: layers cannot be iterated over.
        TypeError, ValueError: as `side_moe` raises them, before any level is computed; the message starts with the
            index of the level, as in `layers[2]: ...`.
        BackendUnavailable: the backend requested with `use_backend` cannot run a level.
    """
    if not torch.compiler.is_compiling() and not isinstance(layers, Iterable):
        raise TypeError(
            f"layers must hold a mapping of side_moe's arguments for each level, not {type(layers).__name__}"
        )
    levels = [_prepared(place, layer) for place, layer in enumerate(layers)]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, (operands, _) in enumerate(levels):
        kinds.setdefault((operands[0].device, operands[0].dtype), []).append(place)
    # torch.func cannot differentiate operators of lists.
    separately = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if len(kinds) > 1 or separately:
        # Each operator checks its own levels, but no level may run before all are checked.
        _GROUP.check([list(column) for column in zip(*(operands[:-1] for operands, _ in levels), strict=True)])
    if separately:
        return [op.apply(operands, utilization) for operands, utilization in levels]
    results: dict[int, Tensor] = {}
    for places in kinds.values():
        *columns, backends = (list(column) for column in zip(*(levels[place][0] for place in places), strict=True))
        y, _, _, norm, gate = _GROUP(columns, backends[0])
        for index, place in enumerate(places):
            utilization = levels[place][1]
            if utilization is not None:
                utilization.add_(norm[index], gate[index])
            results[place] = y[index]
    return [results[place] for place in range(len(levels))]


def _prepared(place: int, layer: Mapping[str, Any]) -> tuple[tuple[Any, ...], Utilization | None]:
    """Return the operator's arguments for a level, and its counters."""
    if torch.compiler.is_compiling():
        return op.prepare(**{**_DEFAULTS, **layer}), layer.get("utilization")
    with _GROUP.naming(place):
        if not isinstance(layer, Mapping):
            raise TypeError(f"a level must be a mapping of side_moe's arguments, not {type(layer).__name__}")
        if not _REQUIRED <= layer.keys() <= _SIGNATURE.parameters.keys():
            _SIGNATURE.bind(**layer)  # raises a TypeError that names the argument
        return op.prepare(**{**_DEFAULTS, **layer}), layer.get("utilization")


_GROUP = ListOperator(op.OPERATOR, "side_moe_group", fake=op.fake, check=check_level, argument="layers")
_SIGNATURE = inspect.signature(op.side_moe)
_REQUIRED = {name for name, one in _SIGNATURE.parameters.items() if one.default is one.empty}
_DEFAULTS = {name: one.default for name, one in _SIGNATURE.parameters.items() if one.default is not one.empty}
