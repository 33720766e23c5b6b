from xsmoe_kernels.packed_attention.op import packed_attention

__all__ = ["packed_attention"]
