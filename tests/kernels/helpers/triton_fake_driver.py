"""A Triton driver that launches nothing, so that calls on CPU tensors run all host code of the Triton backend.

The driver reports an sm_90 GPU. Kernels are neither compiled nor run: outputs keep the values of uninitialized memory.
Use it in a process without TRITON_INTERPRET.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ARCHITECTURE = "sm_90"


class Utilities:
    """The driver's queries of a device, answered as an H100 would."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class FakeDriver:
    """The part of Triton's driver interface that a launch of a compiled kernel uses."""

    utils = Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class FakeKernel:
    """A compiled kernel whose launch adds its name to a list."""

    function = packed_metadata = None

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.launches.append(self.name)


@contextmanager
def fake_driver() -> Iterator[list[str]]:
    """Install the driver and serve CPU tensors with the Triton backend; yield the list of launched kernels' names.

    On exit the driver, the compiler, the block sizes and the registrations are those from before. Kernels that were
    launched meanwhile keep their fake binaries, so use this in a process of its own.
    """
    from xsmoe_kernels.backends import triton as backend
    from xsmoe_kernels.runtime import dispatch
    from xsmoe_kernels.triton_utils import tuning

    if backend.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set, and interpreted kernels use no driver; unset it")
    launches: list[str] = []

    def fake_compile(source: Any, **options: Any) -> FakeKernel:
        return FakeKernel(source.fn.fn.__name__, launches)

    def configured(table: tuning.Table, like: torch.Tensor, precision: str) -> tuning.Config:
        return table.defaults[ARCHITECTURE, precision if like.dtype == torch.float32 else "half"]

    before = driver._active
    driver.set_active(FakeDriver())
    try:
        with (
            mock.patch("triton.compiler.compile", fake_compile),
            mock.patch.object(tuning, "default", configured),
            mock.patch.dict(dispatch._limits),
        ):
            for operator, launcher in backend.LAUNCHERS.items():
                rejects = functools.partial(backend._rejects, backend.REJECTS.get(operator))
                kernel = dispatch.lazy_import(launcher)
                dispatch.register(operator, "triton", kernel, devices=("cpu",), dtypes=backend.DTYPES, rejects=rejects)
            yield launches
    finally:
        driver._active = before
