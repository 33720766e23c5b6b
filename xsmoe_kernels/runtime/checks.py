"""Argument checks of the public functions.

A public function checks, in eager mode only, the types and numbers of dimensions that it relies on and that its
operator's schema cannot express. The operator checks everything else before its kernel, in compiled code too.

`in_range` and `ragged` read values of tensors. All other checks read types, dtypes, shapes and devices, and never
synchronize with a GPU.
"""

import operator
import os
from collections.abc import Mapping

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int64, torch.int32)


def tensor(name: str, value: object, *shape: int | str) -> torch.Tensor:
    """Return `value` if it is a Tensor of the given shape, where a string means any size.

    Raises:
        TypeError: not a Tensor.
        ValueError: another rank or size; the message contains the expected shape.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor of shape {_format(shape)}, not {type(value).__name__}")
    right = value.dim() == len(shape)
    if right:
        # Runs dozens of times in a step, and a loop costs half as much as a generator.
        for want, have in zip(shape, value.shape, strict=True):
            if not isinstance(want, str) and have != want:
                right = False
                break
    if not right:
        raise ValueError(f"{name} must have shape {_format(shape)}, not {_format(tuple(value.shape))}")
    return value


def floating(name: str, value: object, *shape: int | str) -> torch.Tensor:
    """Check `tensor`, and that the dtype is floating and supported by the kernels."""
    checked = tensor(name, value, *shape)
    if checked.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {checked.dtype}")
    return checked


def index(
    name: str, value: object, *shape: int | str, dtypes: tuple[torch.dtype, ...] = (torch.int64,)
) -> torch.Tensor:
    """Check `tensor`, and that the dtype is one of the integer dtypes for indices."""
    checked = tensor(name, value, *shape)
    if checked.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, not {checked.dtype}; call {name}.long()")
    return checked


def together(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raise ValueError unless all tensors, by name, are on the device of the first one; None is ignored."""
    first, *others = tensors
    anchor = tensors[first]
    assert anchor is not None
    for name in others:
        t = tensors[name]
        if t is not None and t.device != anchor.device:
            raise ValueError(f"{name} is on {t.device}, but {first} is on {anchor.device}; move them to one device")


def same_dtype(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raise TypeError unless all tensors, by name, have the dtype of the first one; None is ignored."""
    first, *others = tensors
    anchor = tensors[first]
    assert anchor is not None
    for name in others:
        t = tensors[name]
        if t is not None and t.dtype != anchor.dtype:
            raise TypeError(f"{name} is {t.dtype}, but {first} is {anchor.dtype}; cast one, or use torch.autocast")


def integer(name: str, value: object, low: int | None = None, high: int | None = None, *, bound: str = "") -> int:
    """Return `value` as an int from `low` to `high`; None is no limit, and `bound` describes `high`.

    NumPy's integers are accepted. A bool is not, nor is a Tensor, because reading it may synchronize with a GPU.

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
    """Return `value` if it is a bool; raise TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")
    return value


def values_visible(value: torch.Tensor) -> bool:
    """Return whether checks may read values of this tensor: on a CPU, and elsewhere with XSMOE_DEBUG=1.

    Reading costs a synchronization on other devices. Tensors on the meta device have no values.
    """
    return value.device.type == "cpu" or (value.device.type != "meta" and os.environ.get("XSMOE_DEBUG") == "1")


def in_range(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """Raise ValueError unless low <= value < high everywhere. Reads values: call it only if `values_visible`."""
    if value.numel() == 0:
        return
    least, most = (int(v) for v in torch.aminmax(value))
    if least < low or most >= high:
        raise ValueError(f"{name} must lie in [{low}, {high}), but holds values from {least} to {most}")


def ragged(name: str, offsets: torch.Tensor, total: int) -> None:
    """Raise ValueError unless offsets ascend within [0, total]. Reads values: call it only if `values_visible`."""
    in_range(name, offsets, 0, total + 1)
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{name} must ascend, but some entry is smaller than the one before it")


def _format(shape: tuple[object, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
