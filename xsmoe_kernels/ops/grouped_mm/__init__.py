from xsmoe_kernels.ops.grouped_mm.op import grouped_mm

__all__ = ["grouped_mm"]
