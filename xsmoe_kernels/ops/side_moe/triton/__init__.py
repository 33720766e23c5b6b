"""The Triton kernels of `side_moe` and `side_moe_group`: what launches them."""

from xsmoe_kernels.ops.side_moe.triton.backward import backward, group_backward
from xsmoe_kernels.ops.side_moe.triton.forward import forward, group_forward

__all__ = ["backward", "forward", "group_backward", "group_forward"]
