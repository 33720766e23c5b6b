"""Batches of a few fixed shapes, so that one CUDA graph serves many steps: padding that changes no result.

What is added is left out by the step's own arithmetic, not by masks behind it. An item of padding has a count of 0: it
weighs nothing in the utilization and is never drawn as a negative. An input of padding belongs to no sequence, and its
target is an item of padding whose logit is so large that its softmax is 1 to the bit: a loss of 0, gradients of 0. The
mean over the inputs, which counts those too, is put right by a factor.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from xsmoe.nn import Batch
from xsmoe.nn.item_ids import NO_ID

ITEMS = 128
"""Distinct items are padded to a multiple of this."""
CERTAIN = -1e30
"""logQ of an item of padding. Added to its logit it leaves nothing of the sum but itself, in float32 and wider."""


@dataclass(frozen=True)
class Capacity:
    """What every batch of a window has room for, the number of distinct items aside.

    Attributes:
        users: sequences in a batch.
        inputs: the most inputs of a sequence.
    """

    users: int
    inputs: int

    def pad(self, batch: Batch) -> Batch:
        """The batch with rows added, in a shape that depends on the number of distinct items alone.

        Its loss, gradients and counters are those of `batch`, to rounding. At least one item is added, the target of
        what is added to the inputs; items that are added have the id of the first one, so that their hidden states are
        there and finite.

        Raises:
            ValueError: the batch has more sequences, or a longer one, than there is room for.
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
            logq=_extended(batch.logq, items, CERTAIN),
            inputs=_extended(batch.inputs, inputs, num_items),
            targets=_extended(batch.targets, inputs, num_items),
            users=_extended(batch.users, inputs, 0),
            offsets=_extended(batch.offsets, users, num_inputs),
            rejected=functional.pad(batch.rejected, (0, self.inputs + 1 - width, 0, users), value=-1),
            ids=None if batch.ids is None else _extended(batch.ids, items, NO_ID),
            factor=torch.tensor(self.users * self.inputs / max(1, num_inputs), dtype=torch.float32),
            # Sequences no longer cover the inputs, and a graph must not hold what differs from batch to batch.
            lengths=None,
        )


def _extended(tensor: Tensor, count: int, value: float | Tensor) -> Tensor:
    return functional.pad(tensor, (0, count), value=float(value)) if count else tensor
