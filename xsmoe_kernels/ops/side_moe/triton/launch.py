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
"""The largest number of levels of a launch; each of them adds arguments to the kernel."""


Item = TypeVar("Item")
Result = TypeVar("Result")


class Level(NamedTuple):
    """The operands of a level, as kernels read them.

    Attributes:
        x, backbone: rows of any stride.
        router, down, up, frozen_down, frozen_up: contiguous. Without separate frozen experts the last two are down and
            up, and `frozen` is 0.
        frozen: the number of separate frozen experts.
        trained: the first expert that has weight gradients.
        aligned: whether Triton may read rows, those of hidden states too, in words of 16 bytes.
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
        """Levels with different kinds are launched separately, because they need other binaries or block sizes."""
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
        """E, including the separate frozen experts."""
        return self.router.shape[0] - 1


class BackwardLevel(NamedTuple):
    """A level, the results that its forward saved, and the requested gradients."""

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
        """Which gradients are requested."""
        return self.need_x, self.need_backbone, self.need_router, self.need_down, self.need_up


def make_level(tensors: tuple[Any, ...], num_frozen: int, activation: str) -> Level:
    """Return a level from the operator's arguments; `tensors` are x to frozen_up."""
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
    """Levels of one launch, and the arguments that all its kernels share."""

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
        """Call `launch` with a configuration; `flags` distinguish binaries that are compiled from one kernel."""
        if self.levels[0].aligned:
            return tuning.run(table, self.like, self.precision, self.key | flags, launch)
        return launch(self._smaller(tuning.default(table, self.like, self.precision)))

    def _smaller(self, config: Config) -> Config:
        """Return a configuration for loads of single numbers, whose addresses need many registers."""
        most = {"BLOCK_N": 64 // self.like.element_size(), "BLOCK_C": 64, "BLOCK_D": 64, "BLOCK_K": 32}
        blocks = {name: min(size, most.get(name, size)) for name, size in config.blocks.items()}
        return replace(config, blocks=blocks)

    def start(self, kernel: Any, programs: int, config: Config, arguments: dict[str, Any], **constants: Any) -> None:
        """Launch a kernel for all levels, with the largest number of programs that any level needs."""
        grid = (programs, len(self.levels))
        kernel_helpers.launch(kernel, grid, self.like.device, arguments, constants, config)

    def even(self, *blocks: int) -> bool:
        """Return whether the blocks divide the width of all levels."""
        return all(dim % block == 0 for dim in self.dims for block in blocks)

    def chunks(self, config: Config) -> int:
        """Return the number of chunks of an expert's columns."""
        return cdiv(self.rank, min(rank_block(self.rank), config.blocks["BLOCK_C"]))

    def most_tiles(self, config: Config, starts: Sequence[int]) -> int:
        """Return the largest number of tiles of any level, as `device_functions.tile_count` computes it."""
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
    """Return one run-time number per level, encoded so that no value compiles another binary."""
    return tuple(as_variable(number) for number in numbers)


def strides(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return the row stride of each tensor."""
    return tuple(tensor.stride(0) for tensor in tensors)


def rank_block(rank: int) -> int:
    """Return the smallest power of two that is at least R and that a product supports."""
    return max(16, 1 << (rank - 1).bit_length())


def in_launches(
    items: Sequence[Item], kind: Callable[[Item], Any], run: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """Return the result of `run` for each item; `run` is called with items of one kind, up to LARGEST_LAUNCH."""
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
    """Return an empty tensor for a result that is not needed."""
    return like.new_empty(0, dtype=dtype or like.dtype)
