"""Conditioned hidden states: the fit on a window's items, and features with conditioned rows."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from xsmoe.data import WindowSplits
from xsmoe.encoders import HiddenStateStore, ItemFeatures
from xsmoe.encoders.features import FeatureView, row_indices, select_modalities
from xsmoe.nn import XSMoE
from xsmoe.nn.conditioning import BLOCK, NotFinite, Transform, finish

ITEMS_PER_CHUNK = 4096
CPU = torch.device("cpu")
ROUNDED = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that conditioned rows keep. Rows of other dtypes become float32, the dtype of the computation."""


def fit_conditions(items: XSMoE, features: ItemFeatures, rows: np.ndarray) -> tuple[str, ...]:
    """Fit the conditioning of every modality that is not fitted yet and that at least two of the items have.

    Args:
        items: changed in place. Modalities that are already fitted do not change.
        features: the items' hidden states, not conditioned.
        rows: (N,) integers, the items to fit to. Repeated items count once.

    Returns:
        The modalities that were fitted.

    Raises:
        ValueError: hidden states that are not finite.
    """
    distinct = np.unique(rows)
    fitted = []
    for name, conditioning in items.conditions().items():
        having = distinct[features.present(name)[distinct]]
        if conditioning.fitted or len(having) < 2:
            continue
        try:
            conditioning.fit(_chunks(features, name, having), features.dtypes[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        fitted.append(name)
    return tuple(fitted)


def fit_window(
    items: XSMoE, features: ItemFeatures, splits: WindowSplits, window: int, warn: Callable[[str], None]
) -> None:
    """Fit the conditioning to the items of a window's training split, and warn about modalities without a fit.

    If the training split is empty, nothing is fitted.

    Args:
        items, features: see `fit_conditions`.
        splits: splits of the next window to train on.
        window: position of the window in the stream.
        warn: called with a message if fewer than two of the items have a modality.

    Raises:
        ValueError: hidden states that are not finite.
    """
    if not len(splits.train):
        return
    fit_conditions(items, features, splits.train_pairs[1])
    if unfitted := [name for name in items.conditions() if name not in items.conditioned()]:
        warn(
            f"window {window} trains on unconditioned hidden states of {', '.join(unfitted)}: fewer than 2 of its "
            "training items have them"
        )


def _chunks(features: ItemFeatures, modality: str, rows: np.ndarray) -> Iterator[tuple[list[Tensor], int]]:
    for start in range(0, len(rows), ITEMS_PER_CHUNK):
        some = rows[start : start + ITEMS_PER_CHUNK]
        yield features.hidden(some, [modality], dtype=features.dtypes[modality])[modality], len(some)


def conditioned(features: ItemFeatures, items: XSMoE) -> ItemFeatures:
    """Return the features that the item encoder expects: conditioned for the modalities that are fitted."""
    return ConditionedFeatures(features, items) if items.conditioned() else features


class ConditionedFeatures(FeatureView):
    """`ItemFeatures` whose rows are conditioned when they are read.

    A row's bits depend neither on the other rows of the request nor on the model's device. The product is computed on
    the CPU, in blocks in which every item has a fixed position.

    Args:
        features: the items' hidden states, not conditioned.
        items: the item encoder. Later fits have no effect on this object.

    Raises:
        ValueError: the features lack a modality of the encoder, or have another width or number of levels.
    """

    def __init__(self, features: ItemFeatures, items: XSMoE) -> None:
        super().__init__(features, items.modalities)
        widths = self.dims
        if widths != items.dims or features.num_levels != items.num_levels + 1:
            raise ValueError(
                f"features have widths {widths} and {features.num_levels} levels, but the item encoder needs "
                f"{items.dims} and {items.num_levels + 1}; use the hidden states that it was built for"
            )
        self._transforms = {
            name: module.transforms(CPU) for name, module in items.conditions().items() if module.fitted
        }

    @property
    def source(self) -> ItemFeatures:
        """The features before conditioning."""
        return self._features

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: dtype if dtype in ROUNDED else torch.float32 for name, dtype in super().dtypes.items()}

    def hidden(
        self, items: np.ndarray | Tensor, modalities: Sequence[str] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        """Return conditioned hidden states, rounded once to the dtype of the features and then cast to `dtype`.

        See `ItemFeatures.hidden`.

        Raises:
            ValueError: also if a conditioned row is not finite. The message names the item and the modality.
        """
        rows = row_indices(items, self.num_items)
        names = select_modalities(modalities, self._modalities)
        places = torch.from_numpy(_places(rows))
        hidden = {}
        for name in names:
            kept = self.dtypes[name]
            levels = self._features.hidden(rows, [name], dtype=kept)[name]
            present = torch.from_numpy(self._features.present(name)[rows])
            for place, transform in enumerate(self._transforms.get(name, ())):
                levels[place] = self._level(name, place, transform, levels[place], present, rows, places)
            hidden[name] = [level.to(dtype) for level in levels]
        return hidden

    def _level(
        self,
        name: str,
        place: int,
        transform: Transform,
        level: Tensor,
        present: Tensor,
        rows: np.ndarray,
        places: Tensor,
    ) -> Tensor:
        changed = transform(level, places if len(level) == len(rows) else None)
        try:
            return finish(place, level, changed, present)
        except NotFinite as error:
            item = rows[error.row]
            known = self._features
            named = repr(known.item_ids[item]) if isinstance(known, HiddenStateStore) else item
            raise ValueError(f"item {named}, {name}, level {place}: {error.reason}") from error

    def fingerprint(self, num_items: int | None = None) -> str:
        digest = hashlib.sha256(self._features.fingerprint(num_items).encode())
        for name, transforms in sorted(self._transforms.items()):
            digest.update(repr((name, self.dtypes[name])).encode())
            for one in transforms:
                for tensor in (one.columns, one.mean, one.factor):
                    digest.update(repr(tuple(tensor.shape)).encode())
                    digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _places(rows: np.ndarray) -> np.ndarray:
    """Return distinct positions of rows. Item i has position i modulo `BLOCK`, in the first block where it is free."""
    slots = rows % BLOCK
    order = np.argsort(slots, kind="stable")
    sorted_slots = slots[order]
    block = np.empty(len(rows), dtype=np.int64)
    block[order] = np.arange(len(rows)) - np.searchsorted(sorted_slots, sorted_slots)
    return block * BLOCK + slots
