"""Which backend serves an operator: the one place that knows.

A backend is a set of kernels: "reference" (plain PyTorch, every device), "native" (C++ for CPUs), "triton" and "cuda".
"auto" takes the first one in `PREFERENCE` that can serve the device and dtype at hand, and passes over kernels that
serve by name only; any other name is binding, and raises `BackendUnavailable` where it cannot run.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch

BACKENDS = ("reference", "native", "triton", "cuda")
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}
AUTO = 'use_backend("auto") takes what serves here'

Kernel = Callable[..., Any]
Refuses = Callable[..., str | None]

calls: Counter[tuple[str, str]] = Counter()
"""How often each (operator, backend) ran, backward operators by their own name."""


class _Limits(NamedTuple):
    """The types of device and the dtypes that a kernel takes; None for all. And what else it does not take."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    refuses: Refuses | None
    by_name_only: str | None


_kernels: dict[str, dict[str, Kernel]] = {}
_limits: dict[tuple[str, str], _Limits] = {}
_singles: dict[str, str] = {}
"""For an operator that takes lists, the one that it is for each place of them."""
_reasons: dict[tuple[str, str | None], str] = {}
"""Why a backend has no kernel here, for an operator, or None: for any."""


class _Request:
    """One `use_backend` block that is open now."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


_requests = [_Request("auto")]
"""The open blocks in the order of their entry, behind what holds outside of them. Each step on it is atomic, for a lock
would not go through torch.compile."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


def register(
    operator: str,
    backend: str,
    kernel: Kernel,
    *,
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    refuses: Refuses | None = None,
    by_name_only: str | None = None,
) -> None:
    """Makes `kernel` the implementation of `operator` on `backend`.

    Args:
        operator: its name, without the namespace.
        backend: one of `BACKENDS`.
        kernel: called with the operator's arguments without the last, the backend.
        devices, dtypes: the types of device and the dtypes that the kernel takes, all if None.
        refuses: called with a device, a dtype and a call's arguments, or none where nobody calls yet; why the kernel
            cannot serve that, or None if it can. "auto" then goes on to another backend. Looks at no values of tensors.
        by_name_only: why "auto" passes over a kernel that can serve; None if it does not.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    _kernels.setdefault(operator, {})[backend] = kernel
    _limits[operator, backend] = _Limits(devices, dtypes, refuses, by_name_only)


def when_needed(function: str) -> Kernel:
    """A function of this package, as "module:name", whose module is imported when it is first called."""
    module, _, name = function.partition(":")

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"xsmoe_kernels.{module}"), name)(*arguments)

    return call


def register_list(operator: str, single: str) -> None:
    """Makes `operator` a call of `single` for each place of its lists, on a backend that has no kernel of its own.

    Both take the same arguments and give the same results, which are lists of one length for `operator`.
    """
    _kernels.setdefault(operator, {})
    _singles[operator] = single


def declare_absent(backend: str, reason: str, operator: str | None = None) -> None:
    """Makes `reason` what is said where `backend` is asked for and has no kernel, for one operator or for any."""
    _reasons[backend, operator] = reason


def operators() -> tuple[str, ...]:
    """The operators that have at least one kernel, in alphabetical order."""
    return tuple(sorted(_kernels))


def requested() -> str:
    """The backend that the `use_backend` block entered last, of those still open, asks for; "auto" outside of any."""
    return _requests[-1].backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves every operator called inside the block from the backend `name`, in the whole process.

    Where blocks overlap, nested or in several threads, the one entered last holds, until it is left.

    Args:
        name: "auto" or one of "reference", "native", "triton", "cuda".

    Raises:
        ValueError: `name` is no backend.
        BackendUnavailable: no operator has a kernel on that backend here. An operator that lacks one raises the same
            when it is called; nothing falls back in silence.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"name must be one of auto, {', '.join(BACKENDS)}, not {name!r}")
        if not any(name in kernels for kernels in _kernels.values()):
            told = _absent(name)
            if name in PREFERENCE["cuda"] and (missing := no_gpu()) is not None:
                # First what no installation of kernels would mend.
                told = f"{told if missing in told else f'{missing}; {told}'}; {AUTO}"
            raise BackendUnavailable(f"backend {name!r} cannot run: {told}")
    request = _Request(name)
    _requests.append(request)
    try:
        yield
    finally:
        _requests.remove(request)


def no_gpu() -> str | None:
    """Why torch has no GPU here, or None if it has one."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda is not None or torch.version.hip is not None
    return "torch finds no CUDA device" if built else "torch was built without CUDA"


def unavailable(
    operator: str, backend: str, device: torch.device | str, dtype: torch.dtype, *arguments: object
) -> str | None:
    """Why `backend` cannot serve `operator` on this device and dtype, or None if it can.

    With `arguments`, the operator's without the last, why it cannot serve this very call.
    """
    if backend not in _kernels.get(operator, {}):
        if operator in _singles:
            return unavailable(_singles[operator], backend, device, dtype)
        return _absent(backend, operator)
    devices, dtypes, refuses, _ = _limits[operator, backend]
    if devices is not None and (device_type := torch.device(device).type) not in devices:
        return f"the {backend} kernels run on {' and '.join(devices)} only, not on {device_type}"
    if dtypes is not None and dtype not in dtypes:
        return f"the {backend} kernels take {' and '.join(map(str, dtypes))}, not {dtype}"
    return None if refuses is None else refuses(torch.device(device), dtype, *arguments)


def by_name_only(operator: str, backend: str) -> str | None:
    """Why "auto" passes over a backend that can serve `operator`, or None if it does not."""
    limits = _limits.get((operator, backend))
    return None if limits is None else limits.by_name_only


def select(operator: str, requested: str, device: torch.device, dtype: torch.dtype, *arguments: object) -> str:
    """The backend that serves a call, `arguments` if they are given. The same question always has the same answer.

    Raises:
        BackendUnavailable: `requested` names a backend that cannot serve the call.
    """
    if requested != "auto":
        if reason := unavailable(operator, requested, device, dtype, *arguments):
            raise BackendUnavailable(
                f"backend {requested!r} cannot serve {operator} on {device.type} {dtype}: {reason}"
                f"{_instead(operator, requested, device)}"
            )
        return requested
    if dtype == torch.float64:
        return "reference"
    for backend in PREFERENCE.get(device.type, ("reference",)):
        if (
            by_name_only(operator, backend) is None
            and unavailable(operator, backend, device, dtype, *arguments) is None
        ):
            return backend
    raise BackendUnavailable(f"no backend serves {operator} on {device.type} {dtype}")


def run(operator: str, requested: str, device: torch.device, dtype: torch.dtype, *arguments: object) -> Any:
    """Runs `operator` on the backend that `select` names, and counts the call in `calls`."""
    backend = select(operator, requested, device, dtype, *arguments)
    if backend not in _kernels[operator]:
        single, places = _singles[operator], zip(*cast(tuple[Iterable[object], ...], arguments), strict=True)
        results = [run(single, backend, device, dtype, *place) for place in places]
        return tuple(map(list, zip(*results, strict=True)))
    calls[operator, backend] += 1
    return _kernels[operator][backend](*arguments)


def _instead(operator: str, backend: str, device: torch.device) -> str:
    """What to do where a backend has a kernel, but for other types of device; else nothing."""
    limits = _limits.get((operator, backend)) or _limits.get((_singles.get(operator, ""), backend))
    if limits is None or limits.devices is None or device.type in limits.devices:
        return ""
    if "cuda" in limits.devices and (missing := no_gpu()) is not None:
        return f", and {missing}; {AUTO}"
    return f"; move the tensors to {' or '.join(limits.devices)}, or {AUTO}"


def _absent(backend: str, operator: str | None = None) -> str:
    """Why a backend has no kernel for an operator, or if none is named, for any."""
    if operator is None:
        # Several operators of a backend often lack the same.
        found = "; ".join(dict.fromkeys(reason for (name, _), reason in _reasons.items() if name == backend))
    else:
        found = _reasons.get((backend, operator)) or _reasons.get((backend, None)) or ""
    return found or f"this version of xsmoe_kernels has no {backend} kernel for {operator or 'any operator'}"
