"""Side level: a softmax mixture of the backbone's row and of residual experts of rank R."""

from xsmoe_kernels.ops.side_moe.frozen_experts import FrozenExperts
from xsmoe_kernels.ops.side_moe.group import side_moe_group
from xsmoe_kernels.ops.side_moe.op import side_moe
from xsmoe_kernels.ops.side_moe.utilization import Utilization

__all__ = ["FrozenExperts", "Utilization", "side_moe", "side_moe_group"]
