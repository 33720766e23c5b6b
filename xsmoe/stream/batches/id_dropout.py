"""Which items of a training batch go without their ID, so that content is trained as cold items will need it."""

from dataclasses import dataclass

import numpy as np

from xsmoe.data.splitmix import GOLDEN, mix
from xsmoe.nn.item_ids import NO_ID
from xsmoe.stream.state.seeds import derive


@dataclass(frozen=True)
class IdDropout:
    """Leaves out the IDs of some items of each batch.

    A draw is a function of the seed, the window, the epoch, the step and the item, by splitmix64 (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", 2014). It depends neither on the other items of the batch
    nor on when, where and in what order batches are built.

    Args:
        share: the probability that an item goes without its ID, in [0, 1].
        seed: of the run.
        window, epoch: where in the stream this is.
    """

    share: float
    seed: int
    window: int
    epoch: int

    def __call__(self, items: np.ndarray, step: int) -> np.ndarray:
        """The ID of each item of a batch.

        Args:
            items: (C,) int64, rows of the ID table.
            step: the batch's place in the epoch.

        Returns:
            (C,) int64: the items, -1 where the ID is left out.
        """
        key = np.uint64(derive(self.seed, self.window, self.epoch, "ids"))
        stream = mix(key + _counter(np.array([step])))
        words = mix(stream + _counter(items))
        # 53 bits, as many as a double holds.
        return np.where((words >> np.uint64(11)) * 2.0**-53 < self.share, NO_ID, items)


def _counter(numbers: np.ndarray) -> np.ndarray:
    """The states of splitmix64 that lie so many steps, and one, behind zero."""
    return (numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN
