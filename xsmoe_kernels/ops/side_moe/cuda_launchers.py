"""`side_moe` on backend "cuda": CUDA kernels for what goes over rows; launchers and products are Triton's."""

from functools import partial

import torch
from torch import Tensor

from xsmoe_kernels.ops.side_moe import triton as triton_kernels
from xsmoe_kernels.ops.side_moe.triton.launch import Launch
from xsmoe_kernels.ops.side_moe.triton.row_kernels import Counted, GateGradients, RowKernels

_library = torch.ops.xsmoe_cuda
# Looked up once: eager calls are bound by the host.
_side_moe_gate = _library.side_moe_gate.default
_side_moe_count = _library.side_moe_count.default
_side_moe_logit_gradient = _library.side_moe_logit_gradient.default


def _gate(launch: Launch) -> list[Tensor]:
    gates: list[Tensor] = _side_moe_gate(launch.x, [level.router for level in launch.levels])
    return gates


def _count(_: Launch, counted: Counted) -> tuple[list[Tensor], list[Tensor]]:
    norms, masses = _side_moe_count(*counted)
    return norms, masses


def _logit_gradient(
    launch: Launch, given: GateGradients, need_logits: bool, need_backbone: bool
) -> tuple[list[Tensor], list[Tensor]]:
    backbone = [level.backbone for level in launch.levels]
    grad_logits, grad_backbone = _side_moe_logit_gradient(launch.x, backbone, *given, need_logits, need_backbone)
    return grad_logits, grad_backbone


CUDA = RowKernels(_gate, _count, _logit_gradient)

forward = partial(triton_kernels.forward, rows=CUDA)
backward = partial(triton_kernels.backward, rows=CUDA)
group_forward = partial(triton_kernels.group_forward, rows=CUDA)
group_backward = partial(triton_kernels.group_backward, rows=CUDA)
