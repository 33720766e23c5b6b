from xsmoe_kernels.topk_items.op import topk_items

__all__ = ["topk_items"]
