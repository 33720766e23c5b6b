from xsmoe_kernels.ops.topk_items.op import topk_items

__all__ = ["topk_items"]
