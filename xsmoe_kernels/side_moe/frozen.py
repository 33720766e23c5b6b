"""The frozen experts of a side level."""

from torch import Tensor

from xsmoe_kernels import checks


class FrozenExperts:
    """Experts that take no gradient, kept apart from the trainable ones; lives for as long as they are frozen.

    The weights must not change meanwhile, so that kernels may keep what they derive from them.

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

    @property
    def num_experts(self) -> int:
        """How many experts are frozen."""
        return self.down.shape[0]

    def __repr__(self) -> str:
        experts, rank, dim = self.down.shape
        return f"FrozenExperts(num_experts={experts}, rank={rank}, dim={dim}, dtype={self.down.dtype})"
