"""Replacement and resizing of parameters that an optimizer holds, so that training continues with other experts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

Optimizers = Optimizer | Sequence[Optimizer] | None
Carry = Callable[[str, Tensor], Tensor]

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
"""Names of second moments in optimizers of the Adam family. Their bias correction uses one step count per tensor."""


def require_held(optimizers: Optimizers, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless the given optimizers hold every trainable parameter, and only in their parameter groups.

    If no optimizer held a parameter, or if one kept it in another list too, its replacement would silently never be
    trained. None as `optimizers` passes.

    Raises:
        TypeError: `optimizers` is neither an optimizer nor a sequence of them.
        ValueError: no optimizer holds a parameter, or one holds it outside `param_groups` too.
    """
    if optimizers is None:
        return
    given = _each(optimizers)
    held = {id(parameter) for o in given for group in o.param_groups for parameter in group["params"]}
    absent = [name for name, parameter in parameters.items() if parameter.requires_grad and id(parameter) not in held]
    if absent:
        raise ValueError(
            f"optimizer does not hold {', '.join(absent)}, whose replacements would never be trained; pass the "
            "optimizer (or the list of optimizers) that trains all experts, or None and build a new one afterwards"
        )
    replaced = {id(parameter) for parameter in parameters.values()}
    for optimizer in given:
        for place, value in vars(optimizer).items():
            listed = isinstance(value, list | tuple) and any(id(element) in replaced for element in value)
            if listed and place != "param_groups":
                kind = type(optimizer).__name__
                raise ValueError(
                    f"optimizer is {kind}, which keeps parameters in {place} outside its groups, where they cannot be "
                    f"replaced, so the new ones would never be trained; pass None and build a new {kind} afterwards"
                )


def swap_parameter(optimizers: Optimizers, old: nn.Parameter, new: nn.Parameter, carry: Carry | None) -> None:
    """Replace `old` by `new` in the optimizers' groups, and convert its state.

    Args:
        optimizers: one optimizer, several, or None, which does nothing.
        old, new: the old parameter and its replacement.
        carry: a function of a state tensor's name and the tensor, in the shape of `old`, that returns it in the shape
            of `new`; None resets the state. State in another shape than the parameter's (factored second moments)
            cannot be converted and is reset too.
    """
    if optimizers is None:
        return
    for optimizer in _each(optimizers):
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        state = optimizer.state.pop(old, None)
        if state is not None and carry is not None and _shaped_like(state, old):
            optimizer.state[new] = {key: carry(key, v) if _per_element(v) else v for key, v in state.items()}


def resize_parameter(parameter: nn.Parameter, shape: torch.Size) -> None:
    """Resize a parameter in place, with uninitialized values and no gradient. Optimizers keep holding it.

    If an optimizer's state still has the old number of rows, its steps raise RuntimeError until it loads its own state.
    """
    with torch.inference_mode(False), torch.no_grad():
        fresh = parameter.new_empty(shape)
        parameter.grad = None
        # As long as an old loss exists, autograd would expect gradients of the old shape. A temporary change of dtype
        # resets this.
        parameter.data = fresh.new_empty(0, dtype=torch.float16 if fresh.dtype != torch.float16 else torch.float32)
        parameter.data = fresh
    _watch_steps()
    _resized[parameter] = True
    _fitting.clear()


_resized = WeakIdKeyDictionary()
"""All living parameters that were resized."""

_fitting: WeakSet[Optimizer] = WeakSet()
"""Optimizers whose state has been checked since the last resize and fits."""


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_require_fitting_state)


def _require_fitting_state(optimizer: Optimizer, *_: Any) -> None:
    # torch's fused steps do not check shapes: they would write past the end of a state tensor that is too short.
    if optimizer in _fitting:
        return
    for parameter in list(_resized):
        for name, value in optimizer.state.get(parameter, {}).items():
            other_rows = _per_element(value) and value.shape[1:] == parameter.shape[1:]
            if other_rows and value.shape != parameter.shape:
                raise RuntimeError(
                    f"the optimizer's {name} has shape {tuple(value.shape)}, but load_state_dict has given its "
                    f"parameter the shape {tuple(parameter.shape)}; load the optimizer's state too, with "
                    "optimizer.load_state_dict, or build a new optimizer"
                )
    _fitting.add(optimizer)


def _each(optimizers: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    several = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    wanted = "optimizer must be a torch.optim.Optimizer, a list of them, or None"
    if not isinstance(several, Sequence) or isinstance(several, str):
        scheduled = isinstance(getattr(several, "optimizer", None), Optimizer)
        hint = "; pass its .optimizer" if scheduled else ""
        raise TypeError(f"{wanted}, not {type(several).__name__}{hint}")
    if others := [type(one).__name__ for one in several if not isinstance(one, Optimizer)]:
        raise TypeError(f"{wanted}, not a list with {others[0]}")
    return several


def _per_element(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() > 0


def _shaped_like(state: Mapping[str, object], parameter: Tensor) -> bool:
    # LazyAdam has a step count for each row.
    fitting = {"step": parameter.shape[:1]}
    return all(v.shape == fitting.get(key, parameter.shape) for key, v in state.items() if _per_element(v))
