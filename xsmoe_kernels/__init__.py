"""Kernels for streaming multimodal recommendation with expandable side mixtures of experts.

Each operator is a function of tensors, and is registered with `torch.library` as `xsmoe::<name>`.
"""

from xsmoe_kernels import cuda_backend, native, triton_backend, xformers_backend
from xsmoe_kernels.dispatch import BackendUnavailable, use_backend
from xsmoe_kernels.environment import __version__, info
from xsmoe_kernels.grouped_mm import grouped_mm
from xsmoe_kernels.in_batch_softmax_loss import in_batch_softmax_loss
from xsmoe_kernels.packed_attention import packed_attention
from xsmoe_kernels.rank_of_target import rank_of_target
from xsmoe_kernels.route_topk import Routing, route_topk
from xsmoe_kernels.side_moe import FrozenExperts, Utilization, side_moe, side_moe_group
from xsmoe_kernels.topk_items import topk_items

__all__ = [
    "BackendUnavailable",
    "FrozenExperts",
    "Routing",
    "Utilization",
    "__version__",
    "grouped_mm",
    "in_batch_softmax_loss",
    "info",
    "packed_attention",
    "rank_of_target",
    "route_topk",
    "side_moe",
    "side_moe_group",
    "topk_items",
    "use_backend",
]

native.load()
triton_backend.load()
cuda_backend.load()
xformers_backend.load()
