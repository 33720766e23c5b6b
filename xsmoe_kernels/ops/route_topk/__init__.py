from xsmoe_kernels.ops.route_topk.op import Routing, route_topk

__all__ = ["Routing", "route_topk"]
