from xsmoe_kernels.rank_of_target.op import rank_of_target

__all__ = ["rank_of_target"]
