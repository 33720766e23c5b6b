"""Settings of `python -m bench stream`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xsmoe.stream import StreamConfig

POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class Settings:
    """The stream, and the training on it.

    Attributes:
        pooling: "mean", or "cls", where all items share one row at the first level.
        users: active users of each window, with 6 to 15 interactions each.
        items, new_items: items at the start, and new items of each later window.
        windows: number of windows. Each window except the first one tests the model of the window before.
        epochs: of each window. The last epoch is kept, so no time is spent on validation.
        batch: users per step.
        dim, rank: D of the hidden states, and R of an expert.
        dropout: in the user encoder of both formulations.
        lr: of Adam; it decays as in the paper.
        seed: of the stream, the initial weights, the batch order, the gate rows and dropout.
        dtype: "float32", or "bfloat16": autocast with bfloat16 hidden states.
        device: "cpu" or "cuda".
        top_k: of an additional run of ours, or None.
        graph: whether our steps are CUDA graphs. The parts of such a step cannot be timed.
    """

    pooling: str = "mean"
    users: int = 1024
    items: int = 4000
    new_items: int = 400
    windows: int = 10
    epochs: int = 2
    batch: int = 256
    dim: int = 768
    rank: int = 64
    dropout: float = 0.1
    lr: float = 1e-3
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    top_k: int | None = None
    graph: bool = False

    def config(self) -> "StreamConfig":
        """Return the training settings of all runs: the paper's protocol, which adds experts and prunes none."""
        # Imported here because the command line must work without xsmoe's dependencies.
        from xsmoe.stream.config import StreamConfig

        return StreamConfig(
            protocol="paper",
            batch_size=self.batch,
            epochs=self.epochs,
            warmup_epochs=self.epochs,
            lr=self.lr,
            min_lr=min(self.lr, StreamConfig.min_lr),
            prune=False,
            seed=self.seed,
            device=self.device,
            precision="bfloat16" if self.half else "float32",
            graph=self.graph,
        )

    @property
    def half(self) -> bool:
        """Return whether autocast to bfloat16 is enabled."""
        return self.dtype == "bfloat16"

    @property
    def names(self) -> list[str]:
        """Return the names of the runs, in the order of their columns."""
        return ["published", "ours", *([] if self.top_k is None else [f"ours-top-{self.top_k}"])]
