"""The frozen experts of a side level."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xsmoe_kernels.runtime import checks, dispatch, registration


class _Derived(NamedTuple):
    """What kernels keep of the weights, and the versions of down and up that it was derived from."""

    versions: tuple[int, int] | None
    casts: "dict[torch.dtype, FrozenExperts]"
    pack: Tensor | None = None
    packed: bool = False


class FrozenExperts:
    """Experts that take no gradient, kept apart from the trainable ones; lives for as long as they are frozen.

    Where the native CPU kernels can serve them, it also holds their weights in the layouts that these read, which saves
    packing them in every call and takes twice the memory of the weights; four times that of bfloat16 weights on
    processors that multiply them as float32. Under autocast the weights are cast once, and the casts are packed.
    Weights that autograd sees change in place are packed anew. It does not see changes through `.data`, NumPy, shared
    memory or DistributedDataParallel's exchange of buffers, and code that `torch.compile` made does not look: make a
    new FrozenExperts then.

    A deep copy, or one from a file, may share its memory with tensors that were copied along, of whose changes autograd
    tells it nothing: it is read anew in every call, which takes longer. Make a new FrozenExperts of the copied tensors
    to have them packed once.

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
            # Compiled code takes the pack that it finds. Under autocast only the cast weights are read.
            self.to(registration.autocast_dtype(self.down)).pack()

    @property
    def num_experts(self) -> int:
        """How many experts are frozen."""
        return self.down.shape[0]

    def to(self, dtype: torch.dtype) -> "FrozenExperts":
        """These experts in another dtype, made once; themselves in their own."""
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
        """The weights as the native kernels read them, bytes for this process only; None where those cannot serve."""
        if torch.compiler.is_compiling():
            return self._derived.pack
        derived = self._refreshed()
        if not derived.packed:
            pack = None
            if derived.versions is not None and self._packable():
                # Autograd will save it, which it cannot with what inference mode makes.
                with torch.inference_mode(False):
                    pack = torch.ops.xsmoe_native.pack_experts(self.down, self.up)
            self._derived = derived = derived._replace(pack=pack, packed=True)
        return derived.pack

    def _refreshed(self) -> "_Derived":
        """What is derived from the weights as they are now."""
        derived, versions = self._derived, self._current()
        if versions is None or derived.versions != versions:
            # In one assignment: several threads may be here.
            self._derived = derived = _Derived(versions, {})
        return derived

    def _current(self) -> tuple[int, int] | None:
        """The versions of down and up; None where changes are not counted, so that nothing can be kept."""
        if not self._tracked or self.down.is_inference() or self.up.is_inference():
            return None
        return self.down._version, self.up._version

    def _packable(self) -> bool:
        if self.num_experts == 0 or type(self.down) is not Tensor:
            return False
        return dispatch.unavailable_reason("side_moe", "native", self.down.device, self.down.dtype) is None

    def __getstate__(self) -> dict[str, Any]:
        # Another process may run on another processor, and a copied tensor has a version of its own.
        return self.__dict__ | {"_derived": _Derived(None, {}), "_tracked": False}

    def __copy__(self) -> "FrozenExperts":
        return FrozenExperts(self.down, self.up)

    def __repr__(self) -> str:
        experts, rank, dim = self.down.shape
        return f"FrozenExperts(num_experts={experts}, rank={rank}, dim={dim}, dtype={self.down.dtype})"
