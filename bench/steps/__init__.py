"""Whole training steps, a room for each pooling of the hidden states."""

from bench.steps.training_step import ClsStep, MeanStep
from bench.workload import Workload

ROOMS: dict[str, type[Workload]] = {"mean": MeanStep, "cls": ClsStep}


def room(name: str) -> type[Workload]:
    """The workload of a pooling."""
    return ROOMS[name]
