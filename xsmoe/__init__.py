"""Streaming multimodal recommendation with expandable side mixtures of experts (arXiv 2508.05993)."""

from xsmoe.nn import Batch, Recommender, SideMoE, UserEncoder, XSMoE
from xsmoe.stream import Stream, StreamConfig, StreamingTrainer

__all__ = ["Batch", "Recommender", "SideMoE", "Stream", "StreamConfig", "StreamingTrainer", "UserEncoder", "XSMoE"]
