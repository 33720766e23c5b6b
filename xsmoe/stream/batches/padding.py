"""Padding of batches to a few fixed shapes, so that many steps replay one CUDA graph. It does not change results.

The arithmetic of the step itself ignores padding; there are no masks. A padding item has a count of 0: it has no weight
in the utilization and is never drawn as a negative. A padding input belongs to no sequence. Its target is a padding
item whose logit is so large that its softmax is exactly 1, so its loss and its gradients are 0. The mean over the
inputs includes padding inputs; a factor corrects it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from xsmoe.nn import Batch
from xsmoe.nn.item_ids import NO_ID

ITEMS = 128
"""The number of distinct items is padded to a multiple of this."""
PADDING_LOGQ = -1e30
"""logQ of a padding item. It dominates the sum with the item's logit in float32 and wider dtypes."""


@dataclass(frozen=True)
class Capacity:
    """Size to which all batches of a window are padded, except for the number of distinct items.

    Attributes:
        users: number of sequences in a batch.
        inputs: largest number of inputs of a sequence.
    """

    users: int
    inputs: int

    def pad(self, batch: Batch) -> Batch:
        """Return the padded batch. Its shape depends only on the number of distinct items.

        Loss, gradients and counters equal those of `batch` up to rounding. At least one item is added, as the target
        of the padding inputs. Padding items have the id of the first item, so their hidden states exist and are finite.

        Raises:
            ValueError: the batch has more sequences than `users`, or one that is longer than `inputs`.
        """
        (num_items,), (num_inputs,) = batch.items.shape, batch.inputs.shape
        num_users, width = batch.rejected.shape
        if num_users > self.users or width > self.inputs + 1:
            raise ValueError(
                f"batch must have at most {self.users} sequences of {self.inputs} inputs, "
                f"not {num_users} of {width - 1}"
            )
        items = num_items // ITEMS * ITEMS + ITEMS - num_items
        users, inputs = self.users - num_users, self.users * self.inputs - num_inputs
        first = batch.items[0] if num_items else 0
        return replace(
            batch,
            items=_extended(batch.items, items, first),
            counts=_extended(batch.counts, items, 0),
            logq=_extended(batch.logq, items, PADDING_LOGQ),
            inputs=_extended(batch.inputs, inputs, num_items),
            targets=_extended(batch.targets, inputs, num_items),
            users=_extended(batch.users, inputs, 0),
            offsets=_extended(batch.offsets, users, num_inputs),
            rejected=functional.pad(batch.rejected, (0, self.inputs + 1 - width, 0, users), value=-1),
            ids=None if batch.ids is None else _extended(batch.ids, items, NO_ID),
            factor=torch.tensor(self.users * self.inputs / max(1, num_inputs), dtype=torch.float32),
            # The sequences do not cover the padding inputs, and lengths on the host would be fixed by a graph.
            lengths=None,
        )


def _extended(tensor: Tensor, count: int, value: float | Tensor) -> Tensor:
    return functional.pad(tensor, (0, count), value=float(value)) if count else tensor
