"""The frozen experts of a side level."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xsmoe_kernels.runtime import checks, dispatch, registration


class _Derived(NamedTuple):
    """Copies of the weights for kernels, and the versions of down and up from which they were derived."""

    versions: tuple[int, int] | None
    casts: "dict[torch.dtype, FrozenExperts]"
    prepacked: Tensor | None = None
    packed: bool = False


class FrozenExperts:
    """Frozen experts, which have no weight gradient, stored apart from the trainable ones.

    Where the native CPU kernels support the weights, the object also stores prepacked weights in the layouts of these
    kernels, so that no call has to pack them. This needs twice the memory of the weights, and four times that of
    bfloat16 weights on processors that multiply them as float32. Under autocast the weights are cast once, and the
    casts are prepacked. Weights are packed again after a change in place that autograd counts. Changes through `.data`,
    NumPy, shared memory or DistributedDataParallel's exchange of buffers are not detected, nor are any changes in code
    that `torch.compile` made. Create a new FrozenExperts after them.

    A deep copy, or one loaded from a file, may share memory with other copied tensors whose changes it cannot detect.
    It is packed in every call, which is slower. Create a new FrozenExperts of the copied tensors to pack them once.

    Args:
        down: (F, R, D), the frozen experts' down projections; detached, not copied.
        up: (F, R, D), their up projections, of the same dtype and device.

    Raises:
        TypeError: not Tensors, not of a floating dtype, or of two dtypes.
        ValueError: not three-dimensional, of two shapes, or on two devices.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        checks.floating("down", down, "F", "R", "D")
        checks.floating("up", up, *down.shape)
        checks.together({"down": down, "up": up})
        checks.same_dtype({"down": down, "up": up})
        self.down = down.detach()
        self.up = up.detach()
        self._derived = _Derived(None, {})
        self._tracked = True
        if not torch.compiler.is_compiling():
            # Compiled code uses the prepacked weights that exist. Under autocast only the cast weights are read.
            self.to(registration.autocast_dtype(self.down)).pack()

    @property
    def num_experts(self) -> int:
        """The number of frozen experts."""
        return self.down.shape[0]

    def to(self, dtype: torch.dtype) -> "FrozenExperts":
        """Return these experts in another dtype, cast once; the object itself for its own dtype."""
        if dtype == self.down.dtype:
            return self
        if torch.compiler.is_compiling():
            return FrozenExperts(self.down.to(dtype), self.up.to(dtype))
        casts = self._refreshed().casts
        cast = casts.get(dtype)
        if cast is None:
            with torch.inference_mode(False):
                cast = casts[dtype] = FrozenExperts(self.down.to(dtype), self.up.to(dtype))
        return cast

    def pack(self) -> Tensor | None:
        """Return the prepacked weights, bytes for this process only; None where the native kernels cannot run."""
        if torch.compiler.is_compiling():
            return self._derived.prepacked
        derived = self._refreshed()
        if not derived.packed:
            prepacked = None
            if derived.versions is not None and self._packable():
                # Autograd saves it, which is impossible for tensors made in inference mode.
                with torch.inference_mode(False):
                    prepacked = torch.ops.xsmoe_native.pack_experts(self.down, self.up)
            self._derived = derived = derived._replace(prepacked=prepacked, packed=True)
        return derived.prepacked

    def _refreshed(self) -> "_Derived":
        """Return the copies for the present weights; drops those of former ones."""
        derived, versions = self._derived, self._current()
        if versions is None or derived.versions != versions:
            # One assignment, because several threads may run this.
            self._derived = derived = _Derived(versions, {})
        return derived

    def _current(self) -> tuple[int, int] | None:
        """Return the versions of down and up; None where changes are not counted, so that copies cannot be kept."""
        if not self._tracked or self.down.is_inference() or self.up.is_inference():
            return None
        return self.down._version, self.up._version

    def _packable(self) -> bool:
        if self.num_experts == 0 or type(self.down) is not Tensor:
            return False
        return dispatch.unavailable_reason("side_moe", "native", self.down.device, self.down.dtype) is None

    def __getstate__(self) -> dict[str, Any]:
        # Another process may run on another processor, and copied tensors have their own versions.
        return self.__dict__ | {"_derived": _Derived(None, {}), "_tracked": False}

    def __copy__(self) -> "FrozenExperts":
        return FrozenExperts(self.down, self.up)

    def __repr__(self) -> str:
        experts, rank, dim = self.down.shape
        return f"FrozenExperts(num_experts={experts}, rank={rank}, dim={dim}, dtype={self.down.dtype})"
