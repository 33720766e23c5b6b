"""A side level as its Triton kernels read it, and one launch for several levels."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton import cdiv

from xsmoe_kernels.triton_utils import kernel_helpers, tuning
from xsmoe_kernels.triton_utils.kernel_helpers import as_variable, rows_aligned, rows_in_place
from xsmoe_kernels.triton_utils.tuning import Config

LARGEST_LAUNCH = 8
"""How many levels a launch takes at most: what they bring are arguments of the kernel."""


Item = TypeVar("Item")
Result = TypeVar("Result")


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


class Launch:
    """What all kernels of one launch share."""

    def __init__(self, levels: list[Level], x_rows: list[int]) -> None:
        self.levels = levels
        self.like = levels[0].x
        self.precision = kernel_helpers.precision(self.like)
        self.rank = levels[0].rank
        self.most_rows = max(x_rows)
        self.rows = variables(x_rows)
        self.experts = variables(level.experts for level in levels)
        self.frozen = variables(level.frozen for level in levels)
        self.dims = tuple(level.dim for level in levels)
        self.x = tuple(level.x for level in levels)
        self.x_strides = strides(self.x)
        self.key = {"D": max(self.dims), "R": self.rank}

    def run(self, table: tuning.Table, launch: Callable[[Config], Result], **flags: bool) -> Result:
        """Calls `launch` with a configuration; `flags` tell kernels apart that are compiled from one source."""
        if self.levels[0].aligned:
            return tuning.run(table, self.like, self.precision, self.key | flags, launch)
        return launch(self._smaller(tuning.default(table, self.like, self.precision)))

    def _smaller(self, config: Config) -> Config:
        """A configuration for loads of single numbers, whose addresses take many registers."""
        most = {"BLOCK_N": 64 // self.like.element_size(), "BLOCK_C": 64, "BLOCK_D": 64, "BLOCK_K": 32}
        blocks = {name: min(size, most.get(name, size)) for name, size in config.blocks.items()}
        return replace(config, blocks=blocks)

    def start(self, kernel: Any, programs: int, config: Config, arguments: dict[str, Any], **constants: Any) -> None:
        """Starts a kernel on the most programs that any level needs, for each level."""
        grid = (programs, len(self.levels))
        kernel_helpers.launch(kernel, grid, self.like.device, arguments, constants, config)

    def even(self, *blocks: int) -> bool:
        """Whether blocks of columns divide the width of all levels."""
        return all(dim % block == 0 for dim in self.dims for block in blocks)

    def chunks(self, config: Config) -> int:
        """Into how many chunks of a tile an expert's columns are cut."""
        return cdiv(self.rank, min(rank_block(self.rank), config.blocks["BLOCK_C"]))

    def most_tiles(self, config: Config, starts: Sequence[int]) -> int:
        """The most tiles that any level has, of its experts from a start on, as `pieces.tile_count` counts them."""
        chunks = self.chunks(config)
        tile_chunks = config.blocks["BLOCK_C"] // min(rank_block(self.rank), config.blocks["BLOCK_C"])
        ahead = [max(level.frozen - start, 0) for level, start in zip(self.levels, starts, strict=True)]
        return max(
            cdiv(own * chunks, tile_chunks) + cdiv((level.experts - start - own) * chunks, tile_chunks)
            for level, start, own in zip(self.levels, starts, ahead, strict=True)
        )

    def product_constants(self, config: Config, *blocks: str) -> dict[str, Any]:
        return {"EVEN": self.even(*(config.blocks[block] for block in blocks)), "PRECISION": self.precision}


def variables(numbers: Iterable[int]) -> tuple[int, ...]:
    """One run-time number per level, coded so that it compiles nothing anew."""
    return tuple(as_variable(number) for number in numbers)


def strides(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Numbers from one row to the next, per level."""
    return tuple(tensor.stride(0) for tensor in tensors)


def rank_block(rank: int) -> int:
    """The least power of two of columns that holds an expert's, and that a product takes."""
    return max(16, 1 << (rank - 1).bit_length())


def in_launches(
    items: Sequence[Item], kind: Callable[[Item], Any], run: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """What `run` gives for each item, called with items of one kind, as many as a launch takes."""
    kinds: dict[Any, list[int]] = {}
    for place, item in enumerate(items):
        kinds.setdefault(kind(item), []).append(place)
    results: dict[int, Result] = {}
    for places in kinds.values():
        for first in range(0, len(places), LARGEST_LAUNCH):
            taken = places[first : first + LARGEST_LAUNCH]
            results.update(zip(taken, run([items[place] for place in taken]), strict=True))
    return [results[place] for place in range(len(items))]


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What stands for a result that is not wanted."""
    return like.new_empty(0, dtype=dtype or like.dtype)
