"""Streaming training: a recommender is tested, grown and trained window by window."""

from xsmoe.stream.config import StreamConfig
from xsmoe.stream.cuda.out_of_memory import OutOfMemory
from xsmoe.stream.epoch import TrainingDiverged
from xsmoe.stream.source import Stream
from xsmoe.stream.state.checkpoints import CheckpointError
from xsmoe.stream.trainer import StreamingTrainer

__all__ = ["CheckpointError", "OutOfMemory", "Stream", "StreamConfig", "StreamingTrainer", "TrainingDiverged"]
