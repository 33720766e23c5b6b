from xsmoe_kernels.ops.in_batch_softmax_loss.op import in_batch_softmax_loss

__all__ = ["in_batch_softmax_loss"]
