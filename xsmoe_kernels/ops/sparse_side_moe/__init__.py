from xsmoe_kernels.ops.sparse_side_moe.op import sparse_side_moe

__all__ = ["sparse_side_moe"]
