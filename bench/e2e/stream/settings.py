"""Settings of `python -m bench stream`, and their declaration as options."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xsmoe.stream import StreamConfig

POOLINGS = ("mean", "cls")


def _option(default: Any, help: str, least: int | None = None, quick: int | None = None, **more: Any) -> Any:
    """Return a field that is an option of the command line.

    Args:
        default: its value.
        help: describes it.
        least: the smallest valid number.
        quick: its value with --quick, if that differs.
        more: arguments of `argparse.ArgumentParser.add_argument`.
    """
    if least is not None:
        more |= {"type": int, "metavar": "N"}
    shown = "" if default is None or default is False else f"; {default}"
    text = help + shown + (f", quick {quick}" if quick else "")
    return field(default=default, metadata={"least": least, "quick": quick, "argparse": {"help": text, **more}})


@dataclass(frozen=True)
class Settings:
    """The stream, and the training on it. A window's last epoch is kept, so no time is spent on validation.

    Attributes:
        dtype: "float32", or "bfloat16": autocast with bfloat16 hidden states.
        device: "cpu" or "cuda".
    """

    users: int = _option(1024, "active users of each window, with 6 to 15 interactions each", least=2, quick=256)
    items: int = _option(4000, "items at the start; at least 16 for each window", least=0, quick=1000)
    new_items: int = _option(400, "new items of each later window", least=0, quick=100)
    windows: int = _option(10, "number of windows; each adds an expert to every level", least=2)
    epochs: int = _option(2, "of each window", least=1)
    batch: int = _option(256, "users per step", least=2, quick=64)
    dim: int = _option(768, "D, width of the hidden states", least=1)
    rank: int = _option(64, "R, width of an expert", least=1)
    seed: int = _option(0, "of the stream, weights, batch order, gate rows and dropout", least=0)
    top_k: int | None = _option(None, "add a run of ours with routing to K experts", least=1)
    pooling: str = _option("mean", "cls: all items share one row at level 0", choices=POOLINGS)
    dropout: float = _option(0.1, "in the user encoder of both formulations", type=float)
    lr: float = _option(1e-3, "of Adam; it decays as in the paper", type=float)
    graph: bool = _option(False, "ours as CUDA graphs, without times of parts", action="store_true")
    dtype: str = "float32"
    device: str = "cpu"

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
