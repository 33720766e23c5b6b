"""A side level as its Triton kernels read it."""

from typing import Any, NamedTuple

from torch import Tensor

from xsmoe_kernels.triton_utils.kernel_helpers import rows_aligned, rows_in_place


class Level(NamedTuple):
    """The operands of a level, as kernels read them.

    Attributes:
        x, backbone: rows of any stride.
        router, down, up, frozen_down, frozen_up: contiguous; where no experts are kept apart, the latter two are the
            former, and `frozen` is 0.
        frozen: how many experts are kept apart.
        trained: the first expert that takes weight gradients.
        aligned: whether Triton knows that it may read rows, those of hidden states too, in words of 16 bytes.
        hidden_frozen: how many experts of down and up do not.
    """

    x: Tensor
    backbone: Tensor
    router: Tensor
    down: Tensor
    up: Tensor
    frozen_down: Tensor
    frozen_up: Tensor
    frozen: int
    trained: int
    activation: str
    aligned: bool

    @property
    def one_row(self) -> bool:
        """Whether x is a single row for all rows of the backbone."""
        return self.x.shape[0] == 1 and self.backbone.shape[0] != 1

    @property
    def kind(self) -> tuple[Any, ...]:
        """Levels that differ in this are launched apart, for they run other binaries or other blocks."""
        return self.one_row, self.rank, self.activation, self.aligned

    @property
    def rows(self) -> int:
        """Rows of the backbone and of y."""
        return self.backbone.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.x.shape[1]

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[1]

    @property
    def experts(self) -> int:
        """E, those kept apart among them."""
        return self.router.shape[0] - 1


class BackwardLevel(NamedTuple):
    """A level, what its forward saved, and what its backward is asked for."""

    level: Level
    grad: Tensor
    gates: Tensor
    hidden: Tensor
    recompute: bool
    need_x: bool
    need_backbone: bool
    need_router: bool
    need_down: bool
    need_up: bool

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which gradients are asked for."""
        return self.need_x, self.need_backbone, self.need_router, self.need_down, self.need_up


def make_level(tensors: tuple[Any, ...], num_frozen: int, activation: str) -> Level:
    """A level from the operator's arguments, of which `tensors` are x to frozen_up."""
    x, backbone, router, down, up, frozen_down, frozen_up = tensors
    x, backbone = rows_in_place(x), rows_in_place(backbone)
    down, up = down.contiguous(), up.contiguous()
    ahead, trained = 0, num_frozen
    if frozen_down is None or frozen_up is None:
        frozen_down, frozen_up = down, up
    else:
        ahead = trained = frozen_down.shape[0]
    return Level(
        x,
        backbone,
        router.contiguous(),
        down,
        up,
        frozen_down.contiguous(),
        frozen_up.contiguous(),
        ahead,
        trained,
        activation,
        down.shape[1] % 8 == 0 and rows_aligned(x, backbone),
    )
