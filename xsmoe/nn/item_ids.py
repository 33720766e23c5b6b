"""A trainable embedding for each item, which is added to the item's content embedding."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xsmoe.nn.optimizer import Optimizers, require_held, resize_parameter, swap_parameter
from xsmoe_kernels.runtime import checks

NO_ID = -1
"""Index for an item that has no ID, or whose ID is left out."""


class ItemIds(nn.Module):
    """A table with a row for every item. Rows are zeros at first, so the ID of an untrained item has no effect.

    The number of rows is part of the weights. A state dict loads into a table of any size: the parameter changes its
    shape but stays the same object. The table's gradient is a sparse COO tensor with an entry for each of the N ids of
    a call, so a step neither allocates nor writes a tensor of the table's size. `LazyAdam` and `torch.optim.SparseAdam`
    accept sparse gradients; `torch.optim.Adam` raises RuntimeError.

    Args:
        dim: width of a row.
        num_items: initial number of rows.
    """

    weight: nn.Parameter

    def __init__(self, dim: int, num_items: int = 0) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, 1)
        self.weight = nn.Parameter(torch.zeros(checks.integer("num_items", num_items, 0), self.dim))

    @property
    def num_items(self) -> int:
        return self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows of the table.

        Args:
            ids: (N,) int64 in [-1, num_items); -1 returns zeros and receives no gradient.

        Returns:
            (N, dim), in the table's dtype.

        Raises:
            TypeError, ValueError: not (N,) int64, or an id out of range (on a GPU with XSMOE_DEBUG=1).
        """
        checks.index("ids", ids, "N")
        if not torch.compiler.is_compiling() and checks.values_visible(ids):
            checks.in_range("ids", ids, NO_ID, self.num_items)
        if self.num_items == 0:
            return self.weight.new_zeros(ids.shape[0], self.dim)
        rows = functional.embedding(ids.clamp(min=0), self.weight, sparse=True)
        # masked_fill blocks the gradient of the filled rows.
        return rows.masked_fill((ids < 0)[:, None], 0)

    def grow(self, num_items: int, optimizer: Optimizers = None, *, name: str = "ids") -> None:
        """Add rows of zeros for new items. Call it between optimizer steps.

        Args:
            num_items: the new number of rows, at least the old one.
            optimizer: the optimizer whose parameter is replaced in place (see `swap_parameter`), or None. Its state is
                kept, and is zero for new rows.
            name: the name of this table in error messages.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: `num_items` is below the old number of rows, or no optimizer holds the table.
        """
        added = checks.integer("num_items", num_items, 0) - self.num_items
        if added < 0:
            raise ValueError(f"num_items must be at least {self.num_items}, the current row count, not {num_items}")
        require_held(optimizer, {f"{name}.weight": self.weight})
        if added == 0:
            return
        with torch.no_grad():
            new = nn.Parameter(_extended(self.weight, added), requires_grad=self.weight.requires_grad)
        swap_parameter(optimizer, self.weight, new, lambda _, state: _extended(state, added))
        self.weight = new

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_items={self.num_items}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, Tensor) and given.shape != self.weight.shape and given.shape[1:] == self.weight.shape[1:]:
            resize_parameter(self.weight, given.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _extended(rows: Tensor, added: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(added, *rows.shape[1:])])
