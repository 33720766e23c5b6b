"""Backend selection: choose the kernel that runs an operator.

A backend is a set of kernels: "reference" (plain PyTorch, every device), "native" (C++ for CPUs), "triton" and "cuda".
"auto" selects the first one in `PREFERENCE` that supports the call's device and dtype. It skips kernels that are
registered as `explicit_only`. Any other name is binding: `BackendUnavailable` is raised if that backend cannot run.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch

BACKENDS = ("reference", "native", "triton", "cuda")
PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}
AUTO = 'use_backend("auto") selects one that can run here'

Kernel = Callable[..., Any]
Rejects = Callable[..., str | None]

calls: Counter[tuple[str, str]] = Counter()
"""Number of calls of each (operator, backend); backward operators have their own name."""


class _Limits(NamedTuple):
    """The device types and dtypes that a kernel supports (None: all), and its further limits, as in `register`."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    rejects: Rejects | None
    explicit_only: str | None


_kernels: dict[str, dict[str, Kernel]] = {}
_limits: dict[tuple[str, str], _Limits] = {}
_element_operators: dict[str, str] = {}
"""For a list operator, the operator that runs for each entry of the lists."""
_reasons: dict[tuple[str, str | None], str] = {}
"""Why a backend has no kernel, by backend and operator; None stands for all operators."""


class _Request:
    """An open `use_backend` block."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


_requests = [_Request("auto")]
"""The open blocks in the order of their entry, after the default. Every operation on the list is atomic, because
torch.compile cannot trace a lock."""


class BackendUnavailable(RuntimeError):
    """A backend was requested by name and cannot run the call. The message says why."""


def register(
    operator: str,
    backend: str,
    kernel: Kernel,
    *,
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    rejects: Rejects | None = None,
    explicit_only: str | None = None,
) -> None:
    """Register `kernel` as the implementation of `operator` on `backend`.

    Args:
        operator: its name, without the namespace.
        backend: one of `BACKENDS`.
        kernel: called with the operator's arguments without the last one, the backend.
        devices, dtypes: the device types and dtypes that the kernel supports; None means all.
        rejects: called with a device, a dtype and the arguments of a call, or no arguments for a general question.
            Returns why the kernel does not support the call, or None if it does. It must not read values of tensors.
            "auto" then tries the next backend.
        explicit_only: why "auto" skips the kernel, so that only `use_backend` selects it; None if "auto" may select it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    _kernels.setdefault(operator, {})[backend] = kernel
    _limits[operator, backend] = _Limits(devices, dtypes, rejects, explicit_only)


def lazy_import(function: str) -> Kernel:
    """Return a function that imports its module on the first call.

    Args:
        function: a function of this package, as "module:name".
    """
    module, _, name = function.partition(":")

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"xsmoe_kernels.{module}"), name)(*arguments)

    return call


def register_list(operator: str, element: str) -> None:
    """Register a list operator. A backend without a kernel for it runs `element` for each entry of the lists.

    Both have the same arguments and results, but those of `operator` are lists of one length.
    """
    _kernels.setdefault(operator, {})
    _element_operators[operator] = element


def set_unavailable(backend: str, reason: str, operator: str | None = None) -> None:
    """Set why `backend` has no kernel for one operator, or for all if none is named. Error messages contain it."""
    _reasons[backend, operator] = reason


def operators() -> tuple[str, ...]:
    """Return the operators that have at least one kernel, in alphabetical order."""
    return tuple(sorted(_kernels))


def requested() -> str:
    """Return the backend that the last entered open `use_backend` block requests; "auto" without an open block."""
    return _requests[-1].backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator that is called inside the block on the backend `name`, in the whole process.

    If blocks overlap, nested or in several threads, the one entered last applies until it is left.

    Args:
        name: "auto" or one of "reference", "native", "triton", "cuda".

    Raises:
        ValueError: `name` is no backend.
        BackendUnavailable: no operator has a kernel on that backend here. An operator that has none raises the same
            error when it is called. There is no silent fallback.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"name must be one of auto, {', '.join(BACKENDS)}, not {name!r}")
        if not any(name in kernels for kernels in _kernels.values()):
            reason = _missing_kernel_reason(name)
            if name in PREFERENCE["cuda"] and (missing := no_gpu_reason()) is not None:
                # A missing GPU comes first: installing kernels would not help.
                reason = f"{reason if missing in reason else f'{missing}; {reason}'}; {AUTO}"
            raise BackendUnavailable(f"backend {name!r} cannot run: {reason}")
    request = _Request(name)
    _requests.append(request)
    try:
        yield
    finally:
        _requests.remove(request)


def no_gpu_reason() -> str | None:
    """Return why torch has no GPU, or None if it has one."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda is not None or torch.version.hip is not None
    return "torch finds no CUDA device" if built else "torch was built without CUDA"


def unavailable_reason(
    operator: str, backend: str, device: torch.device | str, dtype: torch.dtype, *arguments: object
) -> str | None:
    """Return why `backend` cannot run `operator` on this device and dtype, or None if it can.

    With `arguments`, those of the operator without the last one, the answer is for this call.
    """
    if backend not in _kernels.get(operator, {}):
        if operator in _element_operators:
            return unavailable_reason(_element_operators[operator], backend, device, dtype)
        return _missing_kernel_reason(backend, operator)
    devices, dtypes, rejects, _ = _limits[operator, backend]
    if devices is not None and (device_type := torch.device(device).type) not in devices:
        return f"the {backend} kernels run on {' and '.join(devices)} only, not on {device_type}"
    if dtypes is not None and dtype not in dtypes:
        return f"the {backend} kernels support {' and '.join(map(str, dtypes))}, not {dtype}"
    return None if rejects is None else rejects(torch.device(device), dtype, *arguments)


def explicit_only(operator: str, backend: str) -> str | None:
    """Return why "auto" skips a backend that can run `operator`, or None if it does not."""
    limits = _limits.get((operator, backend))
    return None if limits is None else limits.explicit_only


def select(operator: str, requested: str, device: torch.device, dtype: torch.dtype, *arguments: object) -> str:
    """Return the backend that runs a call, or without `arguments` calls in general. The choice is deterministic.

    Raises:
        BackendUnavailable: `requested` names a backend that cannot run the call.
    """
    if requested != "auto":
        if reason := unavailable_reason(operator, requested, device, dtype, *arguments):
            raise BackendUnavailable(
                f"backend {requested!r} cannot run {operator} on {device.type} {dtype}: {reason}"
                f"{_instead(operator, requested, device)}"
            )
        return requested
    if dtype == torch.float64:
        return "reference"
    for backend in PREFERENCE.get(device.type, ("reference",)):
        if (
            explicit_only(operator, backend) is None
            and unavailable_reason(operator, backend, device, dtype, *arguments) is None
        ):
            return backend
    raise BackendUnavailable(f"no backend can run {operator} on {device.type} {dtype}")


def run(operator: str, requested: str, device: torch.device, dtype: torch.dtype, *arguments: object) -> Any:
    """Run `operator` on the backend that `select` returns, and count the call in `calls`."""
    backend = select(operator, requested, device, dtype, *arguments)
    if backend not in _kernels[operator]:
        element = _element_operators[operator]
        entries = zip(*cast(tuple[Iterable[object], ...], arguments), strict=True)
        results = [run(element, backend, device, dtype, *entry) for entry in entries]
        return tuple(map(list, zip(*results, strict=True)))
    calls[operator, backend] += 1
    return _kernels[operator][backend](*arguments)


def _instead(operator: str, backend: str, device: torch.device) -> str:
    """Return the advice for a kernel that supports other device types only; an empty string otherwise."""
    limits = _limits.get((operator, backend)) or _limits.get((_element_operators.get(operator, ""), backend))
    if limits is None or limits.devices is None or device.type in limits.devices:
        return ""
    if "cuda" in limits.devices and (missing := no_gpu_reason()) is not None:
        return f", and {missing}; {AUTO}"
    return f"; move the tensors to {' or '.join(limits.devices)}, or {AUTO}"


def _missing_kernel_reason(backend: str, operator: str | None = None) -> str:
    """Return why a backend has no kernel for an operator, or if none is named, for all of them."""
    if operator is None:
        # Several operators of a backend often have the same reason.
        found = "; ".join(dict.fromkeys(reason for (name, _), reason in _reasons.items() if name == backend))
    else:
        found = _reasons.get((backend, operator)) or _reasons.get((backend, None)) or ""
    return found or f"this version of xsmoe_kernels has no {backend} kernel for {operator or 'any operator'}"
