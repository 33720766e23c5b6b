from xsmoe_kernels.ops.rank_of_target.op import rank_of_target

__all__ = ["rank_of_target"]
