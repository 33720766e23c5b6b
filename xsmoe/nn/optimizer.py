"""Replacing or resizing a parameter that an optimizer holds, so that a training loop goes on with other experts."""

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
"""What Adam and its kin call the state that a step is divided by, corrected for a step count that all rows share."""


def require_held(optimizers: Optimizers, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises unless the optimizers, where given, hold every trainable parameter, in places where it can be replaced.

    A parameter that no optimizer holds would be replaced by one that silently never learns, and so would one that an
    optimizer steps from a list of its own.

    Raises:
        TypeError: no optimizer, and no sequence of them.
        ValueError: a parameter that none holds, or one that is held outside `param_groups` too.
    """
    if optimizers is None:
        return
    given = _each(optimizers)
    held = {id(parameter) for o in given for group in o.param_groups for parameter in group["params"]}
    absent = [name for name, parameter in parameters.items() if parameter.requires_grad and id(parameter) not in held]
    if absent:
        raise ValueError(
            f"optimizer does not hold {', '.join(absent)}, which would be replaced and then never learn; pass the "
            "optimizer (or the list of optimizers) that trains all experts, or None and build a new one afterwards"
        )
    replaced = {id(parameter) for parameter in parameters.values()}
    for optimizer in given:
        for place, value in vars(optimizer).items():
            listed = isinstance(value, list | tuple) and any(id(element) in replaced for element in value)
            if listed and place != "param_groups":
                kind = type(optimizer).__name__
                raise ValueError(
                    f"optimizer is {kind}, which keeps parameters in {place} beside its groups, where they cannot be "
                    f"replaced and would then never learn; pass None and build a new {kind} afterwards"
                )


def swap_parameter(optimizers: Optimizers, old: nn.Parameter, new: nn.Parameter, carry: Carry | None) -> None:
    """Puts `new` where `old` stands in the optimizers' groups, and carries its state over.

    Args:
        optimizers: one, several, or None, which does nothing.
        old, new: the parameter that leaves and the one that takes its place.
        carry: turns a state tensor of the shape of `old`, given with its name, into one of the shape of `new`; None
            starts `new` afresh. State that is not shaped like the parameter (factored second moments) cannot be carried
            and starts afresh.
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
    """Gives a parameter other rows, uninitialized, and no gradient; optimizers that hold it go on holding it.

    Steps of an optimizer whose state has the rows of before raise from here on, until it has loaded its own state.
    """
    with torch.inference_mode(False), torch.no_grad():
        fresh = parameter.new_empty(shape)
        parameter.grad = None
        # While a loss of before is alive, autograd would go on expecting gradients of the old shape; a change of dtype
        # makes it forget.
        parameter.data = fresh.new_empty(0, dtype=torch.float16 if fresh.dtype != torch.float16 else torch.float32)
        parameter.data = fresh
    _watch_steps()
    _resized[parameter] = True
    _fitting.clear()


_resized = WeakIdKeyDictionary()
"""All parameters that live and were resized."""

_fitting: WeakSet[Optimizer] = WeakSet()
"""Optimizers whose state was found to fit since the last of them was."""


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_require_fitting_state)


def _require_fitting_state(optimizer: Optimizer, *_: Any) -> None:
    # Looked at here because torch's fused steps do not: they write past the end of what is too short.
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
    # LazyAdam counts the steps of every row.
    fitting = {"step": parameter.shape[:1]}
    return all(v.shape == fitting.get(key, parameter.shape) for key, v in state.items() if _per_element(v))
