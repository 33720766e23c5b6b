"""How a stream is cut, trained and tested: every choice of the protocol."""

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
"""What None stands for: under protocol "default" and under "paper"."""
_RESOLVED: Any = None
"""The default of fields whose None is replaced, so that no instance has it."""
SMALLEST_BATCH = 32
"""Sequences below which no batch shrinks for the sake of `min_steps`."""
BEFORE: dict[str, Any] = {
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
"""What runs did before a setting existed; it holds for runs whose files do not name the setting."""
MODEL_BEFORE: dict[str, Any] = {"condition": "none", "ids": False}
"""The same for settings of the item encoder."""


@dataclass(frozen=True)
class StreamConfig:
    """Settings of a `StreamingTrainer`; those of arXiv 2508.05993 with `protocol="paper"`.

    Attributes:
        protocol: "paper" repeats the published code: targets that the user met before are sure misses, validation ranks
            only items of the validation split, counters also grow in evaluation and from padding, the log is used as
            it is, and a user's last items are all that is trained on. "default" mends these. It decides about settings
            that are not given, or given as None: an instance holds their values.
        ties: order of interactions of equal time. "hash" sorts them by a seeded hash of user and item, "file" keeps
            the file's order. None: "hash"; under "paper" "file".
        duplicates: "drop" leaves out rows that repeat another's user, item and time, "keep" keeps them. None: "drop";
            under "paper" "keep".
        history: "all" trains on a user's whole training split, cut into sequences of `max_inputs + 1` items that
            overlap by one item; "last" only on the last such sequence. None: "all"; under "paper" "last".
        batch_size: the most sequences a step.
        min_steps: least steps of an epoch: batches of small windows shrink to reach it, down to 32 sequences. None: 10;
            under "paper" 1.
        epochs: the most epochs a window. None: 12; 100 under "paper" or where the best epoch is kept.
        warmup_epochs: first epochs without validation.
        patience: validations without a better NDCG@10 before a window's training stops; 0 never stops it early, and
            validates the last epoch only. None: 0; 5 under "paper" or where the best epoch is kept.
        keep: the weights that a window ends with: those of the "last" epoch (also under "paper", where the published
            code means to keep the best and in effect keeps the last), of the "best" epoch by validation NDCG@10, or
            "ema", an exponential moving average over the epochs. None: "ema"; under "paper" "last".
        id_dropout: share of a batch's items whose ID embedding is left out, so that content is trained too.
        targets: which items of a user's sequence in a test window are ranked: "last" or "all" but the first. None:
            "all"; under "paper" "last".
        lr, lr_decay, min_lr: Adam's learning rate, its factor per epoch, and its floor. Adam is rebuilt every window.
        k_core: interactions that a user needs in a window to be kept there.
        train_fraction: the share of a window, by count and in time order, that is trained on; the rest validates.
        max_inputs: a user's last items that are looked at, without the target.
        expand, prune: whether windows add an expert, and drop little-used ones. None: no, because no stream was found
            where growth pays (docs/quality.md); under "paper" yes.
        prune_threshold: the share of an expert's utilization below which it is dropped.
        grow: which windows change the experts: "every" one, or only those of "novelty", on which the test metric is
            below the validation metric of the window before by more than the noise (see `xsmoe.stream.growth`).
        prune_rule: what becomes of a little-used expert: "drop" (published), or "merge" into the nearest one.
        new_gate: how a new expert and its gate row begin: "random" (published) or "mean" of the others' rows, with the
            mean of the experts; or "copy", a split of the most used expert, which leaves the function unchanged.
        repeats: a target that the user met before is ranked ("rank") or a sure miss ("miss"); None follows protocol.
        validation_candidates: validation ranks all items "known" so far, or those of the "split"; None follows
            protocol.
        seed: of new gate rows, batch order and dropout; each epoch draws from a seed of its own, so that a resumed run
            goes on with the same numbers.
        device: where the model trains; a run may go on on another GPU.
        precision: of autocast; weights stay float32. "float16" comes with a loss scaler and needs CUDA. "auto" is
            float32 on the CPU; on CUDA bfloat16, under protocol "paper" float16 as published. Whether float32
            products may use TF32 is torch's setting.
        graph: whether training steps on CUDA are captured as CUDA graphs. They then draw other dropout masks than
            without, because their batches are padded. Off until a GPU has tried it.
        store_gib: how much of the device's memory the items' hidden states may take; where they take more, and with 0,
            every step copies its rows from the host, conditioned ones from a copy on disk. None allows a quarter of
            what is free on CUDA; on a CPU a quarter of the available memory where the model conditions, else 0.
            Results do not depend on it, and it may change while a run goes on.
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
            raise ValueError(f"train_fraction must lie between 0 and 1, not {self.train_fraction}")
        if not 0 <= self.prune_threshold <= 1:
            raise ValueError(f"prune_threshold must be a share between 0 and 1, not {self.prune_threshold}")
        if not 0 <= self.id_dropout <= 1:
            raise ValueError(f"id_dropout must be a share between 0 and 1, not {self.id_dropout}")
        if self.keep == "best" and self.patience == 0:
            raise ValueError("patience must be at least 1 where keep is 'best', since only validation finds the best")
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
        """Give settings that are None these values."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def split(self, window: Window) -> WindowSplits:
        """A window's sequences for training, validation and test, by these settings."""
        return split_window(
            window,
            k_core=self.k_core,
            train_fraction=self.train_fraction,
            max_items=self.max_inputs + 1,
            history=self.history,
        )

    def batch_for(self, sequences: int) -> int:
        """Sequences a step, for a window of so many: at most `batch_size`, and fewer for the sake of `min_steps`."""
        return min(self.batch_size, max(SMALLEST_BATCH, -(-sequences // self.min_steps)))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Settings from a dict of some of them; an unknown one raises ValueError."""
        if unknown := set(settings) - set(cls.__dataclass_fields__):
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(**settings)

    @classmethod
    def from_saved(cls, settings: Mapping[str, Any]) -> Self:
        """Settings that `to_dict` gave, of an earlier version perhaps: what it lacks is as it was then (`BEFORE`)."""
        return cls.from_dict(BEFORE | dict(settings))


def saved_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recommender's `config()`, of an earlier version perhaps, with what it lacks as it was then."""
    return {**config, "items": MODEL_BEFORE | config["items"]}


MAY_CHANGE = ("device", "store_gib")
"""Settings that a run may go on with others of, as far as `decisive` allows."""


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings by their names what results depend on: not where hidden states lie, nor which one of several GPUs."""
    kept = {name: value for name, value in settings.items() if name != "store_gib"}
    if "device" in kept:
        kept["device"] = str(kept["device"]).partition(":")[0]
    return kept
