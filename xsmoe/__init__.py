"""Streaming multimodal recommendation with expandable side mixtures of experts (arXiv 2508.05993)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xsmoe.nn import Batch, ExpertBank, LazyAdam, Recommender, SideMoE, UserEncoder, XSMoE
    from xsmoe.stream import Stream, StreamConfig, StreamingTrainer

__all__ = [
    "Batch",
    "ExpertBank",
    "LazyAdam",
    "Recommender",
    "SideMoE",
    "Stream",
    "StreamConfig",
    "StreamingTrainer",
    "UserEncoder",
    "XSMoE",
]


def __getattr__(name: str) -> object:
    # Lazy imports: `xsmoe --help` must not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("xsmoe.stream" if name.startswith("Stream") else "xsmoe.nn"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
