"""A benchmark for each operator: its inputs, its baselines and its least work."""

OPERATORS = {
    "side_moe": "bench.ops.side_moe:SideMoE",
    "route_topk": "bench.ops.route_topk:RouteTopk",
    "grouped_mm": "bench.ops.grouped_mm:GroupedMM",
    "rank_of_target": "bench.ops.ranking:RankOfTarget",
    "topk_items": "bench.ops.ranking:TopkItems",
    "in_batch_softmax_loss": "bench.ops.in_batch_softmax_loss:InBatchSoftmaxLoss",
    "packed_attention": "bench.ops.packed_attention:PackedAttention",
}
