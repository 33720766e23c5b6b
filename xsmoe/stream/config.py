"""Settings of a streaming run: how a stream is split, trained on and tested."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from xsmoe.data import Window, WindowSplits, split_window

Protocol = Literal["default", "paper"]
Repeats = Literal["rank", "miss"]
ValidationCandidates = Literal["known", "split"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Ties = Literal["hash", "file"]
Duplicates = Literal["drop", "keep"]
History = Literal["all", "last"]
Keep = Literal["last", "best", "ema"]
Targets = Literal["last", "all"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "protocol": ("default", "paper"),
    "new_gate": ("random", "mean", "copy"),
    "grow": ("every", "novelty"),
    "prune_rule": ("drop", "merge"),
    "repeats": ("rank", "miss"),
    "validation_candidates": ("known", "split"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "ties": ("hash", "file"),
    "duplicates": ("drop", "keep"),
    "history": ("all", "last"),
    "keep": ("last", "best", "ema"),
    "targets": ("last", "all"),
}
_AT_LEAST = {
    "batch_size": 1,
    "min_steps": 1,
    "epochs": 1,
    "warmup_epochs": 0,
    "patience": 0,
    "k_core": 1,
    "max_inputs": 1,
    "seed": 0,
}
_BY_PROTOCOL: dict[str, tuple[Any, Any]] = {
    "repeats": ("rank", "miss"),
    "validation_candidates": ("known", "split"),
    "ties": ("hash", "file"),
    "duplicates": ("drop", "keep"),
    "history": ("all", "last"),
    "keep": ("ema", "last"),
    "targets": ("all", "last"),
    "min_steps": (10, 1),
    "expand": (False, True),
    "prune": (False, True),
}
"""Value that replaces None, for protocol "default" and for protocol "paper"."""
_RESOLVED: Any = None
"""Default of the fields whose None is replaced. Instances never have None there."""
SMALLEST_BATCH = 32
"""Smallest batch size that `min_steps` can cause, in sequences."""
LEGACY_DEFAULTS: dict[str, Any] = {
    "ties": "file",
    "duplicates": "keep",
    "history": "last",
    "keep": "best",
    "targets": "last",
    "min_steps": 1,
    "id_dropout": 0.0,
    "grow": "every",
    "prune_rule": "drop",
}
"""Behaviour before a setting existed. It applies to runs whose files do not have the setting."""
LEGACY_MODEL_DEFAULTS: dict[str, Any] = {"condition": "none", "ids": False}
"""Behaviour before a setting of the item encoder existed."""


@dataclass(frozen=True)
class StreamConfig:
    """Settings of a `StreamingTrainer`. With `protocol="paper"` the defaults are those of arXiv 2508.05993.

    Attributes:
        protocol: "paper" repeats the published code: targets that the user has seen before are misses, validation ranks
            only items of the validation split, counters also increase in evaluation and from padding, the log is used
            unchanged, and only a user's last items are trained on. "default" corrects these points. The protocol
            determines the value of settings that are None; an instance has the resolved values.
        ties: order of interactions with equal time. "hash" sorts them by a seeded hash of user and item, "file" keeps
            the file's order. None: "hash"; with "paper": "file".
        duplicates: "drop" removes rows with the same user, item and time as another row, "keep" keeps them. None:
            "drop"; with "paper": "keep".
        history: "all" trains on a user's whole training split, cut into sequences of `max_inputs + 1` items that
            overlap by one item. "last" trains only on the last of these sequences. None: "all"; with "paper": "last".
        batch_size: largest number of sequences in a step.
        min_steps: smallest number of steps in an epoch. The batches of small windows shrink to reach it, but not below
            32 sequences. None: 10; with "paper": 1.
        epochs: largest number of epochs for a window. None: 12; with "paper" or if the best epoch is kept: 100.
        warmup_epochs: number of first epochs without validation.
        patience: number of validations without a better NDCG@10 before training of a window stops. 0 disables early
            stopping and validates only the last epoch. None: 0; with "paper" or if the best epoch is kept: 5.
        keep: weights that a window ends with: those of the "last" epoch, of the "best" epoch by validation NDCG@10, or
            "ema", an exponential moving average over the epochs. None: "ema"; with "paper": "last". The published code
            is meant to keep the best epoch, but in effect keeps the last one.
        id_dropout: share of a batch's items whose ID embedding is omitted, so that content is trained too.
        targets: items of a user's sequence in a test window that are ranked: "last", or "all" except the first. None:
            "all"; with "paper": "last".
        lr, lr_decay, min_lr: Adam's learning rate, its factor per epoch, and its minimum. Each window has a new Adam.
        k_core: number of interactions in a window that a user needs to be kept there.
        train_fraction: share of a window, by count and in time order, for training. The rest is for validation.
        max_inputs: largest number of a user's last items that are model inputs, without the target.
        expand, prune: whether each window adds an expert, and whether little-used experts are removed. None: False,
            because growth improved results on no stream that was tested (docs/quality.md); with "paper": True.
        prune_threshold: an expert with a smaller share of the utilization is pruned.
        grow: windows that change the experts: "every" window, or only windows of "novelty", where the test metric is
            below the validation metric of the previous window by more than the noise (see `xsmoe.stream.growth`).
        prune_rule: "drop" (published) removes a little-used expert, "merge" merges it into the nearest expert.
        new_gate: initial values of a new expert and its gate row. "random" (published), or "mean" of the other rows,
            both with the mean of the experts; or "copy", a split of the most used expert that keeps the function.
        repeats: "rank" ranks a target that the user has seen before, "miss" counts it as a miss. None: by protocol.
        validation_candidates: validation ranks all items "known" so far, or only those of the "split". None: by
            protocol.
        seed: seed of new gate rows, batch order and dropout. Each epoch has a separate seed, so a resumed run draws the
            same random numbers.
        device: device of the model. A run may be resumed on another GPU.
        precision: precision of autocast; weights stay float32. "float16" uses a loss scaler and needs CUDA. "auto" is
            float32 on a CPU and bfloat16 on CUDA; with protocol "paper" float16 on CUDA, as published. torch's settings
            determine whether float32 products may use TF32.
        graph: whether training steps on CUDA are captured as CUDA graphs. Their batches are padded, so dropout masks
            differ from those without graphs. Off by default until it is tested on a GPU.
        store_gib: memory limit for caching the items' hidden states on the device, in GiB. If they need more, or with
            0, every step copies its rows from the host (conditioned rows from a copy on disk). None: a quarter of the
            free memory on CUDA; on a CPU a quarter of the available memory if the model conditions, else 0. Results do
            not depend on it, and it may change when a run is resumed.
    """

    protocol: Protocol = "default"
    ties: Ties = _RESOLVED
    duplicates: Duplicates = _RESOLVED
    history: History = _RESOLVED
    batch_size: int = 256
    min_steps: int = _RESOLVED
    epochs: int = _RESOLVED
    warmup_epochs: int = 5
    patience: int = _RESOLVED
    keep: Keep = _RESOLVED
    id_dropout: float = 0.25
    targets: Targets = _RESOLVED
    lr: float = 1e-3
    lr_decay: float = 0.95
    min_lr: float = 1e-4
    k_core: int = 5
    train_fraction: float = 0.85
    max_inputs: int = 10
    expand: bool = _RESOLVED
    prune: bool = _RESOLVED
    prune_threshold: float = 0.1
    new_gate: Literal["random", "mean", "copy"] = "random"
    grow: Literal["every", "novelty"] = "every"
    prune_rule: Literal["drop", "merge"] = "drop"
    repeats: Repeats = _RESOLVED
    validation_candidates: ValidationCandidates = _RESOLVED
    seed: int = 0
    device: str = "cpu"
    precision: Precision = "auto"
    graph: bool = False
    store_gib: float | None = None

    def __post_init__(self) -> None:
        paper = self.protocol == "paper"
        self._resolve({name: values[paper] for name, values in _BY_PROTOCOL.items()})
        validated = paper or self.keep == "best"
        self._resolve({"epochs": 100 if validated else 12, "patience": 5 if validated else 0})
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {getattr(self, name)!r}")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not 0 < self.train_fraction < 1:
            raise ValueError(f"train_fraction must be between 0 and 1, not {self.train_fraction}")
        if not 0 <= self.prune_threshold <= 1:
            raise ValueError(f"prune_threshold must be a share between 0 and 1, not {self.prune_threshold}")
        if not 0 <= self.id_dropout <= 1:
            raise ValueError(f"id_dropout must be a share between 0 and 1, not {self.id_dropout}")
        if self.keep == "best" and self.patience == 0:
            raise ValueError(
                "patience is 0, but must be at least 1 if keep is 'best', because validation selects the best epoch"
            )
        if not isinstance(self.graph, bool):
            raise ValueError(f"graph must be True or False, not {self.graph!r}")
        if self.store_gib is not None and not 0 <= self.store_gib < float("inf"):
            raise ValueError(f"store_gib must be a number of GiB of at least 0, or None, not {self.store_gib!r}")
        if not 0 < self.min_lr <= self.lr or not 0 < self.lr_decay <= 1:
            raise ValueError(
                f"need 0 < min_lr <= lr and 0 < lr_decay <= 1, but lr = {self.lr}, lr_decay = {self.lr_decay}, "
                f"min_lr = {self.min_lr}"
            )

    def _resolve(self, values: Mapping[str, Any]) -> None:
        """Replace settings that are None by these values."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def split(self, window: Window) -> WindowSplits:
        """Split a window into sequences for training, validation and test."""
        return split_window(
            window,
            k_core=self.k_core,
            train_fraction=self.train_fraction,
            max_items=self.max_inputs + 1,
            history=self.history,
        )

    def batch_for(self, sequences: int) -> int:
        """Return the batch size for a window with this number of sequences: `batch_size`, or less for `min_steps`."""
        return min(self.batch_size, max(SMALLEST_BATCH, -(-sequences // self.min_steps)))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Return settings from a dict; others have their defaults. An unknown name raises ValueError."""
        if unknown := set(settings) - set(cls.__dataclass_fields__):
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}; see StreamConfig for all names")
        return cls(**settings)

    @classmethod
    def from_saved(cls, settings: Mapping[str, Any]) -> Self:
        """Return settings from `to_dict`, also of an earlier version. Missing ones are from `LEGACY_DEFAULTS`."""
        return cls.from_dict(LEGACY_DEFAULTS | dict(settings))


def upgrade_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recommender's `config()` of this or an earlier version. Missing settings keep the earlier behaviour."""
    return {**config, "items": LEGACY_MODEL_DEFAULTS | config["items"]}


CHANGEABLE_ON_RESUME = ("device", "store_gib")
"""Settings that may change when a run is resumed, as far as `result_settings` is equal."""


def result_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that results depend on: without the cache's memory limit and the GPU's number."""
    kept = {name: value for name, value in settings.items() if name != "store_gib"}
    if "device" in kept:
        kept["device"] = str(kept["device"]).partition(":")[0]
    return kept
