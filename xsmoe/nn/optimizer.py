"""Replacing a parameter inside an optimizer, so that a training loop goes on after experts were added or dropped."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

Optimizers = Optimizer | Sequence[Optimizer] | None
Carry = Callable[[Tensor], Tensor]


def require_held(optimizers: Optimizers, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError unless the optimizers, where given, hold every one of the trainable parameters.

    A parameter that no optimizer holds would be replaced by one that silently never learns.
    """
    if optimizers is None:
        return
    held = {id(parameter) for o in _each(optimizers) for group in o.param_groups for parameter in group["params"]}
    absent = [name for name, parameter in parameters.items() if parameter.requires_grad and id(parameter) not in held]
    if absent:
        raise ValueError(
            f"optimizer does not hold {', '.join(absent)}, which would be replaced and then never learn; pass the "
            "optimizer (or the list of optimizers) that trains all experts, or None and build a new one afterwards"
        )


def swap_parameter(optimizers: Optimizers, old: nn.Parameter, new: nn.Parameter, carry: Carry | None) -> None:
    """Puts `new` where `old` stands in the optimizers' groups, and carries its state over.

    Args:
        optimizers: one, several, or None, which does nothing.
        old, new: the parameter that leaves and the one that takes its place.
        carry: turns a state tensor of the shape of `old` into one of the shape of `new`; None starts `new` afresh.
            State that is not shaped like the parameter (factored second moments) cannot be carried and starts afresh.
    """
    if optimizers is None:
        return
    for optimizer in _each(optimizers):
        for group in optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        state = optimizer.state.pop(old, None)
        if state is not None and carry is not None and _shaped_like(state, old):
            optimizer.state[new] = {key: carry(v) if _per_element(v) else v for key, v in state.items()}


def _each(optimizers: Optimizer | Sequence[Optimizer]) -> Iterable[Optimizer]:
    return [optimizers] if isinstance(optimizers, Optimizer) else optimizers


def _per_element(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _shaped_like(state: Mapping[str, object], parameter: Tensor) -> bool:
    return all(v.shape == parameter.shape for v in state.values() if isinstance(v, Tensor) and v.dim() > 0)
