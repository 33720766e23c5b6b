"""What a stream's command line settles."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xsmoe.stream import StreamConfig

POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class Settings:
    """What is streamed, and what is trained on it.

    Attributes:
        pooling: "mean", or "cls", where the first level is one row for all items.
        users: active in each window, 6 to 15 interactions each.
        items, new_items: on sale at the start, and arriving with each later window.
        windows: trained on one after the other; each but the first tests the model of the one before.
        epochs: of each window. The last one is kept, so that no time goes into validation.
        batch: users a step.
        dim, rank: D of the hidden states, R of an expert.
        dropout: in the user encoder, of both formulations.
        lr: of Adam, decaying as published.
        seed: of the stream, the first weights, batch order, gate rows and dropout.
        dtype: "float32", or "bfloat16", which is autocast over hidden states in bfloat16.
        device: "cpu" or "cuda".
        top_k: of a further run of ours, or None.
        graph: whether steps of ours are CUDA graphs, whose parts are not told apart.
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
        """The protocol of both runs: the published one, with growth every window and nothing pruned."""
        # Not above: the command line knows the settings where what `xsmoe` depends on is not installed.
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
        """Whether autocast to bfloat16 is on."""
        return self.dtype == "bfloat16"


def names(settings: Settings) -> list[str]:
    """The runs, in the order of their columns."""
    return ["published", "ours", *([] if settings.top_k is None else [f"ours-top-{settings.top_k}"])]
