"""Conditioning of hidden states: standardization or whitening of each level with statistics that are fitted once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xsmoe.nn.moments import Moments

Condition = Literal["none", "standardize", "whiten"]
SHRINKAGE = 0.01
"""This share of the largest eigenvalue is added to all eigenvalues before whitening."""
BLOCK = 128
"""Rows of one matrix product. The rounding of a row depends on its index in the block, not on the other rows."""


class NotFinite(ValueError):
    """A conditioned row is not finite.

    Attributes:
        row: the row of the level.
        reason: the cause.
    """

    def __init__(self, level: int, row: int, reason: str) -> None:
        super().__init__(f"level {level}, row {row}: {reason}")
        self.level, self.row, self.reason = level, row, reason


@dataclass(frozen=True)
class Transform:
    """The conditioning of one level: `(h - mean) @ factor` (whiten) or `(h - mean) / factor` (standardize).

    Attributes:
        columns: (V,) int64, the columns that are conditioned; all others pass unchanged.
        mean: (V,) float32.
        factor: (V, V) or (V,) float32.
    """

    columns: Tensor
    mean: Tensor
    factor: Tensor

    def __call__(self, rows: Tensor, places: Tensor | None = None) -> Tensor:
        """Condition rows in float32 and round the result once.

        Args:
            rows: (N, D), floating.
            places: (N,) int64, distinct: the index of each row in the blocks of `BLOCK` rows that are multiplied.
                The result of a row is bitwise equal whenever its index in the block is the same. Default: in order.

        Returns:
            (N, D) in the dtype of `rows`; `rows` itself if no column is conditioned.
        """
        if not len(self.columns):
            return rows
        whole = len(self.columns) == rows.shape[1]
        centred = (rows if whole else rows[:, self.columns]).float() - self.mean
        changed = centred / self.factor if self.factor.dim() == 1 else _in_blocks(centred, self.factor, places)
        if whole:
            return changed.to(rows.dtype)
        result = rows.clone()
        result[:, self.columns] = changed.to(rows.dtype)
        return result


def _in_blocks(rows: Tensor, factor: Tensor, places: Tensor | None) -> Tensor:
    """Return `rows @ factor` as products of equal shape. A row's rounding does not depend on the number of rows."""
    count = rows.shape[0]
    last = count if places is None else int(places.max()) + 1 if count else 0
    padded = rows.new_zeros(-(-last // BLOCK) * BLOCK, rows.shape[1])
    index = slice(count) if places is None else places
    padded[index] = rows
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(padded), BLOCK):
            # Copy the block, because the rounding of a product may depend on the alignment of its operands too.
            padded[start : start + BLOCK] = padded[start : start + BLOCK].clone() @ factor
    return padded[index]


def apply(transforms: Sequence[Transform], levels: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
    """Condition one modality's levels.

    Args:
        transforms: one for each level.
        levels: each (N, D), or (1, D) if all items share the row.
        present: (N,) bool, False for an item without the modality; its rows become zeros. None: all items have it.

    Raises:
        NotFinite: a row is not finite, or the result exceeds its dtype.
    """
    return [finish(place, level, transforms[place](level), present) for place, level in enumerate(levels)]


def finish(place: int, level: Tensor, changed: Tensor, present: Tensor | None) -> Tensor:
    """Return the conditioned rows of a level with zeros for absent items, after a check that the others are finite."""
    if changed is level:
        return level
    if present is not None and len(level) == len(present):
        changed = changed.masked_fill(~present[:, None], 0)
    # A finite sum proves that all values are finite. Otherwise the sum may have overflowed: check every value.
    if not changed.sum(dtype=torch.float32).isfinite():
        bad = changed.isfinite().all(1).logical_not().nonzero()
        if len(bad):
            row = int(bad[0])
            if level[row].isfinite().all():
                reason = (
                    f"the conditioned hidden state exceeds {changed.dtype}; use hidden states in bfloat16 or float32"
                )
            else:
                reason = "the hidden state is not finite; the encoder's output is broken there"
            raise NotFinite(place, row, reason)
    return changed


class ConditionedLevel(nn.Module):
    """The fitted statistics of one level, as float32 buffers whatever the model's dtype.

    A state dict contains the sizes: a level that is not fitted has empty buffers, and loading resizes them.

    Args:
        kind: "standardize" or "whiten".
        dim: width D.
    """

    varying: Tensor
    mean: Tensor
    factor: Tensor

    def __init__(self, kind: Condition, dim: int) -> None:
        super().__init__()
        self.kind, self.dim = kind, dim
        # (D,) bool, the V columns that are conditioned; (0,) before the fit.
        self.register_buffer("varying", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(0))
        self.register_buffer("factor", torch.zeros(*self._factor_shape(0)))

    @property
    def fitted(self) -> bool:
        """Whether the statistics are fitted."""
        return self.varying.shape[0] > 0

    def fit(self, moments: Moments) -> None:
        """Store the statistics of some items."""
        varying = moments.varying()
        mean, covariance = moments.mean()[varying], moments.covariance()[varying][:, varying]
        factor = covariance.diagonal().sqrt()
        if self.kind == "whiten" and len(mean):
            values, vectors = torch.linalg.eigh(covariance)
            shrunk = values.clamp(min=0) + SHRINKAGE * values[-1]
            factor = (vectors * shrunk.rsqrt()) @ vectors.T
        elif self.kind == "whiten":
            factor = covariance
        device = self.mean.device
        self.varying, self.mean, self.factor = varying.to(device), mean.float().to(device), factor.float().to(device)

    def transform(self, device: torch.device) -> Transform:
        """Return the transform of this level on a device. On a GPU this synchronizes."""
        return Transform(self.varying.nonzero()[:, 0].to(device), self.mean.to(device), self.factor.to(device))

    def _factor_shape(self, size: int) -> tuple[int, ...]:
        return (size, size) if self.kind == "whiten" else (size,)

    def _apply(self, fn: Any, recurse: bool = True) -> "ConditionedLevel":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                # If the module was cast, only the device may change.
                setattr(self, name, old.to(new.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        given = {name: state_dict.get(prefix + name) for name in ("varying", "mean", "factor")}
        if all(isinstance(value, Tensor) for value in given.values()):
            if (mismatch := self._mismatch(given)) is not None:
                errors.append(f"{prefix[:-1]}: {mismatch}")
                return
            for name, value in given.items():
                if value.shape != getattr(self, name).shape:
                    setattr(self, name, getattr(self, name).new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _mismatch(self, given: dict[str, Tensor]) -> str | None:
        """Return why a state dict's buffers do not fit each other or this level; None if they fit."""
        varying = given["varying"]
        if tuple(varying.shape) not in ((0,), (self.dim,)):
            return f"varying has shape {tuple(varying.shape)}, expected (0,) or ({self.dim},)"
        size = int(varying.sum())
        for name, want in (("mean", (size,)), ("factor", self._factor_shape(size))):
            if tuple(given[name].shape) != want:
                return f"{name} has shape {tuple(given[name].shape)}, but {size} conditioned columns need {want}"
        return None


class Conditioning(nn.Module):
    """The conditioning of one modality's hidden states.

    whiten: `(h - m) U (L + 0.01 max L)^(-1/2) U^T`, with m the mean and U, L the eigenvectors and eigenvalues of the
    covariance (divided by the number of items). standardize: `(h - m) / s`, with s the standard deviation. A column
    whose variance is within the rounding of the hidden states' dtype passes unchanged. So does a level without other
    columns.

    Args:
        kind: "standardize" or "whiten".
        dim: width D of the hidden states.
        num_levels: number of levels, including the lowest.
    """

    def __init__(self, kind: Condition, dim: int, num_levels: int) -> None:
        super().__init__()
        self.kind, self.dim = kind, dim
        self.levels = nn.ModuleList(ConditionedLevel(kind, dim) for _ in range(num_levels))

    def _each(self) -> list[ConditionedLevel]:
        return [level for level in self.levels if isinstance(level, ConditionedLevel)]

    @property
    def fitted(self) -> bool:
        """Whether the statistics are fitted. Until then, rows pass unchanged."""
        return all(level.fitted for level in self._each())

    def fit(self, chunks: Iterable[tuple[Sequence[Tensor], int]], dtype: torch.dtype) -> None:
        """Fit all levels to some items, in float64.

        Memory: a few (D, D) matrices per level, and one chunk.

        Args:
            chunks: levels of some items, each (n, D) or (1, D), and their number n; together at least 2 items.
            dtype: dtype of the hidden states. A variance within its rounding counts as zero.

        Raises:
            RuntimeError: the conditioning is already fitted.
            ValueError: there are fewer than 2 items, or rows that are not finite.
        """
        if self.fitted:
            raise RuntimeError("the conditioning is fitted already and never changes; build a new model to fit again")
        moments = [Moments(self.dim, torch.finfo(dtype).eps, cross=self.kind == "whiten") for _ in self._each()]
        for levels, count in chunks:
            for moment, level in zip(moments, levels, strict=True):
                moment.add(level, count)
        if moments[0].count < 2:
            raise ValueError(f"a fit needs at least 2 items, not {moments[0].count}")
        for fitted, moment in zip(self._each(), moments, strict=True):
            fitted.fit(moment)

    def transforms(self, device: torch.device) -> list[Transform]:
        """Return each level's transform on a device. On a GPU this synchronizes."""
        return [level.transform(device) for level in self._each()]

    def extra_repr(self) -> str:
        return f"kind={self.kind}, dim={self.dim}, fitted={self.fitted}"
