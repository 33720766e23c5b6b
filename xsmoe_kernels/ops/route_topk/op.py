"""Top-k routing of rows to experts."""

from typing import NamedTuple

import torch
from torch import Tensor

from xsmoe_kernels.ops.route_topk import reference
from xsmoe_kernels.runtime import checks, dispatch, registration
from xsmoe_kernels.runtime.declaration import Input, Operator


class Routing(NamedTuple):
    """The choice of k experts for each of N rows.

    Attributes:
        gates: (N, k), the weight of each chosen expert, largest first, in the logits' dtype; differentiable.
        experts: (N, k) int64, the chosen experts, in the order of their gates.
        order: (N*k,) int64, the flat indices n*k + j sorted by expert, stably.
        offsets: (E+1,) int64; `order[offsets[e]:offsets[e+1]]` are the choices of expert e.
    """

    gates: Tensor
    experts: Tensor
    order: Tensor
    offsets: Tensor


def route_topk(logits: Tensor, k: int, *, renormalize: bool = True) -> Routing:
    """Choose the k experts with the largest logits for each row, and sort the choices by expert.

    The gates are those of a softmax over all E experts; with `renormalize` the gates of a row's k chosen experts are
    divided by their sum. Computed in float32 (float64 for float64). Autocast leaves the logits as they are.

    Args:
        logits: (N, E) floating; N may be 0. Of equal logits the lower expert comes first.
        k: the number of experts per row, from 1 to E.
        renormalize: whether a row's gates sum to 1.

    Returns:
        gates, experts, order and offsets; `order // k` are the rows for `grouped_mm` with these `offsets`.

    Raises:
        TypeError: logits is no floating Tensor, k no int, or renormalize no bool.
        ValueError: logits is not (N, E), or k is out of range.
    """
    if not torch.compiler.is_compiling():
        checks.tensor("logits", logits, "N", "E")
        k = checks.integer("k", k)
        checks.flag("renormalize", renormalize)
    return Routing(*_operator(logits, k, renormalize, dispatch.requested()))


def _check(logits: Tensor, k: int) -> None:
    _, num_experts = checks.floating("logits", logits, "N", "E").shape
    checks.integer("k", k, 1, num_experts, bound="the number of experts")


def _fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_experts = logits.shape
    indices = logits.new_empty((num_rows, k), dtype=torch.int64)
    order, offsets = indices.new_empty(num_rows * k), indices.new_empty(num_experts + 1)
    return logits.new_empty((num_rows, k)), indices, order, offsets


_operator = registration.define(
    Operator(
        "route_topk",
        inputs=(Input("logits", grad=True), Input("k", "SymInt", backward=False), Input("renormalize", "bool")),
        outputs=("gates", "experts", "order", "offsets"),
        saved=("experts",),
    ),
    reference=reference.forward,
    reference_backward=reference.backward,
    fake=_fake,
    check=_check,
)
