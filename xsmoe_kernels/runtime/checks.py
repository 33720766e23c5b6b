"""Argument checks of the public functions: one voice for every operator.

A public function checks, in eager mode only, what its operator's schema cannot say and what the function itself builds
on: types and numbers of dimensions. All else is checked by the operator before its kernel, in compiled code too.

`in_range` and `ragged` read values of tensors; all others look at types, dtypes, shapes and devices, and never
synchronise a GPU.
"""

import operator
import os
from collections.abc import Mapping

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int64, torch.int32)


def tensor(name: str, value: object, *shape: int | str) -> torch.Tensor:
    """`value` if it is a Tensor of the given shape, where a string stands for any size.

    Raises:
        TypeError: not a Tensor.
        ValueError: another rank or size; the message shows the shape that was expected.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor of shape {_format(shape)}, not {type(value).__name__}")
    right = value.dim() == len(shape)
    if right:
        # Runs dozens of times in a step: a loop costs half of what a generator does.
        for want, have in zip(shape, value.shape, strict=True):
            if not isinstance(want, str) and have != want:
                right = False
                break
    if not right:
        raise ValueError(f"{name} must have shape {_format(shape)}, not {_format(tuple(value.shape))}")
    return value


def floating(name: str, value: object, *shape: int | str) -> torch.Tensor:
    """`tensor`, of a floating dtype that the kernels take."""
    checked = tensor(name, value, *shape)
    if checked.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {checked.dtype}")
    return checked


def index(
    name: str, value: object, *shape: int | str, dtypes: tuple[torch.dtype, ...] = (torch.int64,)
) -> torch.Tensor:
    """`tensor`, of an integer dtype that may index."""
    checked = tensor(name, value, *shape)
    if checked.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, not {checked.dtype}; call {name}.long()")
    return checked


def together(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raises ValueError unless all tensors, by name, lie on the device of the first one; None is passed over."""
    first, *others = tensors
    anchor = tensors[first]
    assert anchor is not None
    for name in others:
        t = tensors[name]
        if t is not None and t.device != anchor.device:
            raise ValueError(f"{name} is on {t.device}, but {first} is on {anchor.device}; move them to one device")


def same_dtype(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raises TypeError unless all tensors, by name, have the dtype of the first one; None is passed over."""
    first, *others = tensors
    anchor = tensors[first]
    assert anchor is not None
    for name in others:
        t = tensors[name]
        if t is not None and t.dtype != anchor.dtype:
            raise TypeError(f"{name} is {t.dtype}, but {first} is {anchor.dtype}; cast one, or use torch.autocast")


def integer(name: str, value: object, low: int | None = None, high: int | None = None, *, bound: str = "") -> int:
    """`value` as an int, from `low` to `high`; None is no limit, `bound` says what `high` is.

    NumPy's integers will do; a bool will not, and no Tensor, because to read it may make the host wait for a GPU.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    try:
        if isinstance(value, bool | torch.Tensor):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}{bound and ', '}{bound}"
        raise ValueError(f"{name} must be {limits}, not {number}")
    return number


def flag(name: str, value: object) -> bool:
    """`value` if it is a bool; raises TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")
    return value


def values_visible(value: torch.Tensor) -> bool:
    """Whether checks may read values of this tensor: free on a CPU, a synchronisation elsewhere (XSMOE_DEBUG=1).

    On the meta device there are none.
    """
    return value.device.type == "cpu" or (value.device.type != "meta" and os.environ.get("XSMOE_DEBUG") == "1")


def in_range(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """Raises ValueError unless low <= value < high everywhere. Reads values: call it behind `values_visible`."""
    if value.numel() == 0:
        return
    least, most = (int(v) for v in torch.aminmax(value))
    if least < low or most >= high:
        raise ValueError(f"{name} must lie in [{low}, {high}), but holds values from {least} to {most}")


def ragged(name: str, offsets: torch.Tensor, total: int) -> None:
    """Raises ValueError unless offsets ascend within [0, total]. Reads values: call it behind `values_visible`."""
    in_range(name, offsets, 0, total + 1)
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{name} must ascend, but some entry is smaller than the one before it")


def _format(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
