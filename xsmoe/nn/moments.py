"""Mean and covariance of rows that arrive in chunks, accumulated in float64."""

import torch
from torch import Tensor


class Moments:
    """The moments of N rows of width D, relative to the first row, so that a common offset costs no precision.

    Args:
        dim: width D.
        eps: the machine epsilon of the dtype that the rows were rounded to.
        cross: whether to compute the whole covariance or only its diagonal.

    Attributes:
        count: number of rows so far.
    """

    def __init__(self, dim: int, eps: float, *, cross: bool) -> None:
        self.count = 0
        self._eps, self._cross = eps, cross
        self._shift = self._low = self._high = torch.zeros(dim, dtype=torch.float64)
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(*(dim, dim) if cross else (dim,), dtype=torch.float64)

    def add(self, rows: Tensor, count: int) -> None:
        """Add `count` rows.

        Args:
            rows: (count, D), or (1, D) if all rows are equal.
            count: at least 1.

        Raises:
            ValueError: a row is not finite.
        """
        values = rows.detach().cpu().double()
        if not values.isfinite().all():
            raise ValueError(
                "hidden states are not finite, so no conditioning can be fitted; check the encoder's output"
            )
        if self.count == 0:
            self._shift = self._low = self._high = values[0]
        self._low = torch.minimum(self._low, values.amin(0))
        self._high = torch.maximum(self._high, values.amax(0))
        self.count += count
        values = values - self._shift
        if not values.any():
            return
        values = values.expand(count, -1)
        self._sum += values.sum(0)
        self._products += values.T @ values if self._cross else (values * values).sum(0)

    def varying(self) -> Tensor:
        """Return which columns vary by more than one rounding step, (D,) bool."""
        return self._high - self._low > self._eps * torch.maximum(self._low.abs(), self._high.abs())

    def mean(self) -> Tensor:
        """Return the mean, (D,) float64."""
        return self._shift + self._sum / self.count

    def covariance(self) -> Tensor:
        """Return the covariance, (D, D) float64, divided by N; without `cross` a diagonal matrix."""
        mean = self._sum / self.count
        if self._cross:
            return self._products / self.count - torch.outer(mean, mean)
        return torch.diag(self._products / self.count - mean * mean)
