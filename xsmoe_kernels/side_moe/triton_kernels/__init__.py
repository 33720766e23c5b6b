"""The Triton kernels of `side_moe` and `side_moe_group`: what launches them."""

from xsmoe_kernels.side_moe.triton_kernels.backward import backward, group_backward
from xsmoe_kernels.side_moe.triton_kernels.forward import forward, group_forward

__all__ = ["backward", "forward", "group_backward", "group_forward"]
