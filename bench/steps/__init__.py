"""Whole training steps, a room for each pooling of the hidden states."""

import importlib

from bench.workload import Workload

# A pooling's room is this class of bench/steps/training_step.py.
ROOMS = {"mean": "MeanStep", "cls": "ClsStep"}


def room(name: str) -> type[Workload]:
    """The workload of a pooling, imported only now: it needs what `xsmoe` depends on, which kernels do not."""
    workload: type[Workload] = getattr(importlib.import_module("bench.steps.training_step"), ROOMS[name])
    return workload
