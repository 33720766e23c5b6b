"""Kernels for streaming multimodal recommendation with expandable side mixtures of experts.

Each operator is a function of tensors. `sparse_side_moe` is a composition of others; all others are registered with
`torch.library` as `xsmoe::<name>`.
"""

from xsmoe_kernels.backends import cpu as cpu_backend
from xsmoe_kernels.backends import cuda as cuda_backend
from xsmoe_kernels.backends import triton as triton_backend
from xsmoe_kernels.backends import xformers as xformers_backend
from xsmoe_kernels.ops.grouped_mm import grouped_mm
from xsmoe_kernels.ops.in_batch_softmax_loss import in_batch_softmax_loss
from xsmoe_kernels.ops.packed_attention import packed_attention
from xsmoe_kernels.ops.rank_of_target import rank_of_target
from xsmoe_kernels.ops.route_topk import Routing, route_topk
from xsmoe_kernels.ops.side_moe import FrozenExperts, Utilization, side_moe, side_moe_group
from xsmoe_kernels.ops.sparse_side_moe import sparse_side_moe
from xsmoe_kernels.ops.topk_items import topk_items
from xsmoe_kernels.runtime.dispatch import BackendUnavailable, use_backend
from xsmoe_kernels.runtime.environment import __version__, info

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
    "sparse_side_moe",
    "topk_items",
    "use_backend",
]

cpu_backend.load()
triton_backend.load()
cuda_backend.load()
xformers_backend.load()
