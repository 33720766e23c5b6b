"""Adaptation of an expert bank to a state dict with another number of experts."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xsmoe.nn.optimizer import resize_parameter

if TYPE_CHECKING:
    from xsmoe.nn.experts import ExpertBank

WEIGHTS = ("router", "frozen_down", "frozen_up", "down", "up")
OFFSET = "gate_offset"


def mismatch(bank: "ExpertBank", state_dict: Any, prefix: str) -> str | None:
    """Return why the bank's tensors would not fit each other after loading a state dict; None if they would."""
    given = _given(state_dict, prefix)
    rows = {name: given.get(name, getattr(bank, name)).shape[0] for name in WEIGHTS}
    for down, up in (("down", "up"), ("frozen_down", "frozen_up")):
        if rows[down] != rows[up]:
            return f"{prefix}{down} holds {rows[down]} experts, but {prefix}{up} holds {rows[up]}"
    frozen, trainable = rows["frozen_down"], rows["down"]
    if rows["router"] != 1 + frozen + trainable or rows["router"] == 1:
        held = f"{prefix}frozen_down and {prefix}down hold {frozen} and {trainable} experts"
        wanted = "at least one is needed" if frozen + trainable == 0 else f"which need {1 + frozen + trainable}"
        return f"{prefix}router has {rows['router']} rows, but {held}, {wanted}"
    offset = state_dict.get(prefix + OFFSET)
    if isinstance(offset, Tensor) and offset.shape != (rows["router"],):
        return f"{prefix}{OFFSET} has shape {tuple(offset.shape)}, but {prefix}router has {rows['router']} rows"
    return None


def resize(bank: "ExpertBank", state_dict: Any, prefix: str) -> None:
    """Resize the bank's tensors to the shapes in a state dict. Keep a gate offset only if the state dict has one."""
    given = _given(state_dict, prefix)
    if any(value.shape[1:] != getattr(bank, name).shape[1:] for name, value in given.items()):
        # Loading will refuse this state dict, and the bank must stay unchanged.
        return
    for name, value in given.items():
        mine = getattr(bank, name)
        if value.shape != mine.shape and isinstance(mine, nn.Parameter):
            resize_parameter(mine, value.shape)
        elif value.shape != mine.shape:
            setattr(bank, name, mine.new_empty(value.shape))
    offset = state_dict.get(prefix + OFFSET)
    if isinstance(offset, Tensor):
        bank.gate_offset = bank.router.new_empty(offset.shape)
    elif "router" in given:
        bank.gate_offset = None


def _given(state_dict: Any, prefix: str) -> dict[str, Tensor]:
    """Return a bank's tensors in a state dict. Values that are no tensors are left out: torch refuses them itself."""
    found = {name: state_dict.get(prefix + name) for name in WEIGHTS}
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.dim()}
