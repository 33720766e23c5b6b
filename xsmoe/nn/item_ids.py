"""An embedding for every item, added to what its content gives."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xsmoe.nn.optimizer import Optimizers, require_held, resize_parameter, swap_parameter
from xsmoe_kernels.runtime import checks

NO_ID = -1
"""Stands for the ID of an item that has none, or whose ID is left out."""


class ItemIds(nn.Module):
    """A table with a row for every item, zeros at first, so that an item that was never trained adds nothing.

    The number of rows lies in the weights: a state dict loads into a table of any other size, whose parameter changes
    its shape and stays the same object. The table's gradient is a sparse COO tensor with an entry for each of the N
    ids of a call, so that a step neither allocates nor writes anything of the table's size. `LazyAdam` and
    `torch.optim.SparseAdam` take such gradients; `torch.optim.Adam` raises RuntimeError.

    Args:
        dim: width of a row.
        num_items: rows at the start.
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
            ids: (N,) int64 in [-1, num_items); -1 gives zeros and gets no gradient.

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
        # The fill's gradient is zero, whatever comes from above.
        return rows.masked_fill((ids < 0)[:, None], 0)

    def grow(self, num_items: int, optimizer: Optimizers = None, *, name: str = "ids") -> None:
        """Add rows of zeros for items that have arrived. Call it between optimizer steps.

        Args:
            num_items: rows from now on, at least as many as before.
            optimizer: swapped in place where given (see `swap_parameter`); its state is carried over, and is zero for
                new rows.
            name: what to call this table in an error.

        Raises:
            TypeError: `optimizer` is neither an optimizer nor a sequence of them.
            ValueError: fewer rows than before, or an optimizer that does not hold the table.
        """
        added = checks.integer("num_items", num_items, 0) - self.num_items
        if added < 0:
            raise ValueError(f"num_items must be at least {self.num_items}, the rows that there are, not {num_items}")
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
