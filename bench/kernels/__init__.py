"""A room for each operator: its sizes, rivals and floor."""

import importlib

from bench.workload import Workload

# An operator's room is bench/kernels/<operator>.py, and this is the class in it.
ROOMS = {
    "side_moe": "SideMoE",
    "route_topk": "RouteTopk",
    "grouped_mm": "GroupedMM",
    "rank_of_target": "RankOfTarget",
    "topk_items": "TopkItems",
    "in_batch_softmax_loss": "InBatchSoftmaxLoss",
    "packed_attention": "PackedAttention",
}


def room(operator: str) -> type[Workload]:
    """The workload of an operator."""
    module = importlib.import_module(f"bench.kernels.{operator}")
    workload: type[Workload] = getattr(module, ROOMS[operator])
    return workload
