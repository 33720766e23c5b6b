"""Several side levels in one call: the public function, its schema, shapes and autograd, made of those of one level."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xsmoe_kernels.ops.side_moe import op
from xsmoe_kernels.ops.side_moe.utilization import Utilization
from xsmoe_kernels.runtime import functorch, registration

Lists = tuple[list[Any], ...]


def side_moe_group(layers: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """`side_moe` for several independent levels, each with its own sizes and number of experts.

    On a GPU the levels of one device and dtype are one operator, whose kernels serve up to eight levels in a launch.

    Args:
        layers: for each level a mapping whose keys are the names of `side_moe`'s arguments.

    Returns:
        What `side_moe` returns for each level, in order.

    Raises:
        TypeError: layers cannot be iterated over.
        TypeError, ValueError: as `side_moe` raises them, before any level is computed; the message starts with the
            place of a level that is wrong, as in `layers[2]: ...`.
        BackendUnavailable: the backend asked for with `use_backend` cannot serve a level.
    """
    if not torch.compiler.is_compiling() and not isinstance(layers, Iterable):
        raise TypeError(
            f"layers must hold a mapping of side_moe's arguments for each level, not {type(layers).__name__}"
        )
    levels = [_prepared(place, layer) for place, layer in enumerate(layers)]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, (operands, _) in enumerate(levels):
        kinds.setdefault((operands[0].device, operands[0].dtype), []).append(place)
    compiling = torch.compiler.is_compiling()
    # torch.func differentiates no operators of lists.
    alone = not compiling and torch._C._are_functorch_transforms_active()
    if len(kinds) > 1 or alone:
        # Each operator checks its own levels, which may be too late for those of another.
        _check(*(list(column) for column in zip(*(operands[:-1] for operands, _ in levels), strict=True)))
    if alone:
        return [op.apply(operands, utilization) for operands, utilization in levels]
    results: dict[int, Tensor] = {}
    for places in kinds.values():
        *columns, backends = (list(column) for column in zip(*(levels[place][0] for place in places), strict=True))
        if compiling:
            y, _, _, norm, gate = torch.ops.xsmoe.side_moe_group(*columns, backends[0])
        else:
            tensors = (tensor for column in columns[:9] for tensor in column)
            flat = _Eager.apply(len(places), backends[0], columns[9:], *tensors)
            y, _, _, norm, gate = _by_level(flat, len(places))
        for index, place in enumerate(places):
            utilization = levels[place][1]
            if utilization is not None:
                utilization.add_(norm[index], gate[index])
            results[place] = y[index]
    return [results[place] for place in range(len(levels))]


def _prepared(place: int, layer: Mapping[str, Any]) -> tuple[tuple[Any, ...], Utilization | None]:
    """The operator's arguments for a level, and the counters that its increments go to."""
    if torch.compiler.is_compiling():
        return op.prepare(**{**_DEFAULTS, **layer}), layer.get("utilization")
    with _naming(place):
        if not isinstance(layer, Mapping):
            raise TypeError(f"a level must be a mapping of side_moe's arguments, not {type(layer).__name__}")
        if not _REQUIRED <= layer.keys() <= _SIGNATURE.parameters.keys():
            _SIGNATURE.bind(**layer)  # raises and names what is wrong
        return op.prepare(**{**_DEFAULTS, **layer}), layer.get("utilization")


class _naming:
    """Puts the place of a level in front of what is said of it."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind in (TypeError, ValueError):
            raise kind(f"layers[{self._place}]: {error}") from error


_SIGNATURE = inspect.signature(op.side_moe)
_REQUIRED = {name for name, one in _SIGNATURE.parameters.items() if one.default is one.empty}
_DEFAULTS = {name: one.default for name, one in _SIGNATURE.parameters.items() if one.default is not one.empty}


def _check(*columns: list[Any]) -> None:
    for place, operands in enumerate(zip(*columns, strict=True)):
        with _naming(place):
            op.check(*operands)


def _each(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[list[Tensor], ...]]:
    """A function of lists, and of the backend, from one of a level."""

    def lists(*columns: Any) -> tuple[list[Tensor], ...]:
        *own, backend = columns
        results = [function(*operands, backend) for operands in zip(*own, strict=True)]
        return tuple(map(list, zip(*results, strict=True)))

    return lists


def _by_level(flat: Sequence[Any], levels: int) -> list[list[Any]]:
    """Lists of one entry per level, from all of them laid end to end."""
    return [list(flat[first : first + levels]) for first in range(0, len(flat), levels)]


def _keep(ctx: Any, inputs: Lists, output: Lists, settings: Sequence[list[Any]], backend: str) -> None:
    """Saves what backward needs."""
    _, gates, hidden, norm, gate = output
    ctx.mark_non_differentiable(*gates, *hidden, *norm, *gate)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(tensor for column in (*inputs, gates, hidden) for tensor in column))
    num_frozen, recompute, _, activation = settings
    ctx.levels, ctx.settings, ctx.backend = len(gates), (num_frozen, recompute, activation), backend


def _gradients(ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[Sequence[bool]]) -> list[list[Tensor | None]]:
    """The gradients of the differentiable inputs, which levels whose result had none do not get."""
    places = [place for place, grad in enumerate(grads) if grad is not None and any(column[place] for column in needed)]
    gradients: list[list[Tensor | None]] = [[None] * ctx.levels for _ in needed]
    if places:
        columns = [grads, *_by_level(ctx.saved_tensors, ctx.levels), *ctx.settings, *needed]
        own = [[column[place] for place in places] for column in columns]
        found = torch.ops.xsmoe.side_moe_group_backward(*own, ctx.backend)
        for gradient, need, tensors in zip(gradients, needed, found, strict=True):
            for place, tensor in zip(places, tensors, strict=True):
                gradient[place] = tensor if need[place] else None
    return gradients


class _Eager(torch.autograd.Function):
    """The operator for eager code, of flat arguments: torch.library's autograd takes long to sort lists."""

    @staticmethod
    def forward(ctx: Any, levels: int, backend: str, settings: list[list[Any]], *tensors: Tensor | None) -> Any:
        columns = _by_level(tensors, levels)
        output = torch.ops.xsmoe.side_moe_group(*columns, *settings, backend)
        _keep(ctx, tuple(columns[:8]), output, settings, backend)
        return tuple(tensor for column in output for tensor in column)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = _by_level(ctx.needs_input_grad[3 : 3 + 5 * ctx.levels], ctx.levels)
        gradients = _gradients(ctx, grads[: ctx.levels], needed)
        return None, None, None, *(tensor for column in gradients for tensor in column), *(None,) * (4 * ctx.levels)

    @staticmethod
    def jvp(*_: Any) -> Any:
        return functorch.refuse_forward_mode("side_moe_group")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Lists) -> None:
    *columns, _, num_frozen, recompute, count, activation, backend = inputs
    _keep(ctx, tuple(columns), output, (num_frozen, recompute, count, activation), backend)


def _backward(ctx: Any, grads: list[Tensor | None], *_: object) -> tuple[Any, ...]:
    gradients = _gradients(ctx, grads, ctx.needs_input_grad[:5])
    # torch takes an optional list for one of tensors, whose gradients are a list, where all of it are tensors.
    rest = ([None] * ctx.levels if isinstance(need, list) else None for need in ctx.needs_input_grad[5:])
    return *gradients, *rest


registration.define(
    "side_moe_group",
    "(Tensor[] x, Tensor[] backbone, Tensor[] router, Tensor[] down, Tensor[] up, Tensor?[] frozen_down, "
    "Tensor?[] frozen_up, Tensor?[] frozen_pack, Tensor?[] row_weight, SymInt[] num_frozen, bool[] recompute, "
    "bool[] count, str[] activation, str backend) "
    "-> (Tensor[] y, Tensor[] gates, Tensor[] hidden, Tensor[] norm, Tensor[] gate)",
    each="side_moe",
    fake=_each(op.fake),
    check=_check,
    setup_context=_setup_context,
    backward=_backward,
)
registration.define_backward(
    "side_moe_group",
    "(Tensor[] grad, Tensor[] x, Tensor[] backbone, Tensor[] router, Tensor[] down, Tensor[] up, "
    "Tensor?[] frozen_down, Tensor?[] frozen_up, Tensor?[] frozen_pack, Tensor[] gates, Tensor[] hidden, "
    "SymInt[] num_frozen, bool[] recompute, str[] activation, bool[] need_x, bool[] need_backbone, "
    "bool[] need_router, bool[] need_down, bool[] need_up, str backend) "
    "-> (Tensor[] x, Tensor[] backbone, Tensor[] router, Tensor[] down, Tensor[] up)",
    each="side_moe_backward",
    fake=_each(op.backward_fake),
)
