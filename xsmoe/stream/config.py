"""How a stream is cut, trained and tested: every choice of the protocol, with the published values as defaults."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from xsmoe.data import Window, WindowSplits, split_window

Protocol = Literal["default", "paper"]
Repeats = Literal["rank", "miss"]
ValidationCandidates = Literal["known", "split"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "protocol": ("default", "paper"),
    "new_gate": ("random", "mean"),
    "repeats": ("rank", "miss"),
    "validation_candidates": ("known", "split"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
}
_AT_LEAST = {"batch_size": 1, "epochs": 1, "warmup_epochs": 0, "patience": 1, "k_core": 1, "max_inputs": 1, "seed": 0}


@dataclass(frozen=True)
class StreamConfig:
    """Settings of a `StreamingTrainer`; the defaults are those of arXiv 2508.05993.

    Attributes:
        protocol: "paper" repeats the published code, the restored best epoch aside: targets that were met before are
            sure misses, validation ranks only items of the validation split, counters also grow in evaluation and from
            padding, and the last epoch's are used to prune. "default" mends these.
        batch_size: users a step.
        epochs: the most epochs a window.
        warmup_epochs: first epochs without validation.
        patience: validations without a better NDCG@10 before a window's training stops.
        lr, lr_decay, min_lr: Adam's learning rate, its factor per epoch, and its floor. Adam is rebuilt every window.
        k_core: interactions that a user needs in a window to be kept there.
        train_fraction: the share of a window, by count and in time order, that is trained on; the rest validates.
        max_inputs: a user's last items that are looked at, without the target.
        expand, prune: whether windows add an expert, and drop little-used ones.
        prune_threshold: the share of an expert's utilization below which it is dropped.
        new_gate: how a new expert's gate row begins: "random" (published) or "mean" of the others.
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
            every step copies its rows from the host. None allows a quarter of what is free on CUDA, and 0 on a CPU.
            Results do not depend on it, and it may change while a run goes on.
    """

    protocol: Protocol = "default"
    batch_size: int = 256
    epochs: int = 100
    warmup_epochs: int = 5
    patience: int = 5
    lr: float = 1e-3
    lr_decay: float = 0.95
    min_lr: float = 1e-4
    k_core: int = 5
    train_fraction: float = 0.85
    max_inputs: int = 10
    expand: bool = True
    prune: bool = True
    prune_threshold: float = 0.1
    new_gate: Literal["random", "mean"] = "random"
    repeats: Repeats | None = None
    validation_candidates: ValidationCandidates | None = None
    seed: int = 0
    device: str = "cpu"
    precision: Precision = "auto"
    graph: bool = False
    store_gib: float | None = None

    def __post_init__(self) -> None:
        paper = self.protocol == "paper"
        if self.repeats is None:
            object.__setattr__(self, "repeats", "miss" if paper else "rank")
        if self.validation_candidates is None:
            object.__setattr__(self, "validation_candidates", "split" if paper else "known")
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
        if not isinstance(self.graph, bool):
            raise ValueError(f"graph must be True or False, not {self.graph!r}")
        if self.store_gib is not None and not 0 <= self.store_gib < float("inf"):
            raise ValueError(f"store_gib must be a number of GiB of at least 0, or None, not {self.store_gib!r}")
        if not 0 < self.min_lr <= self.lr or not 0 < self.lr_decay <= 1:
            raise ValueError(
                f"need 0 < min_lr <= lr and 0 < lr_decay <= 1, but lr = {self.lr}, lr_decay = {self.lr_decay}, "
                f"min_lr = {self.min_lr}"
            )

    def split(self, window: Window) -> WindowSplits:
        """A window's sequences for training, validation and test, by these settings."""
        return split_window(
            window, k_core=self.k_core, train_fraction=self.train_fraction, max_items=self.max_inputs + 1
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Settings from `to_dict`; an unknown one raises ValueError."""
        if unknown := set(settings) - set(cls.__dataclass_fields__):
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(**settings)


MAY_CHANGE = ("device", "store_gib")
"""Settings that a run may go on with others of, as far as `decisive` allows."""


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings by their names what results depend on: not where hidden states lie, nor which one of several GPUs."""
    kept = {name: value for name, value in settings.items() if name != "store_gib"}
    if "device" in kept:
        kept["device"] = str(kept["device"]).partition(":")[0]
    return kept
