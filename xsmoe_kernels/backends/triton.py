"""Triton backend for GPUs: register the kernels without importing Triton, or the reason why there are none.

TRITON_INTERPRET=1    Triton's own setting, read when xsmoe_kernels is imported: kernels run in Triton's interpreter, on
                      CPU tensors too, if `use_backend("triton")` selects them. It is slow and meant for tests.
"""

import functools
import importlib.metadata
import os
import re
from typing import Any

import torch

from xsmoe_kernels.ops.route_topk import limits as route_limits
from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.runtime import dispatch
from xsmoe_kernels.triton_utils import tuning

OLDEST = (3, 6)
OLDEST_FOR_AMD = (3, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHERS = {
    "grouped_mm": "ops.grouped_mm.triton_launchers:forward",
    "grouped_mm_backward": "ops.grouped_mm.triton_launchers:backward",
    "in_batch_softmax_loss": "ops.in_batch_softmax_loss.triton_launchers:forward",
    "in_batch_softmax_loss_backward": "ops.in_batch_softmax_loss.triton_launchers:backward",
    "rank_of_target": "ops.rank_of_target.triton_kernels:forward",
    "route_topk": "ops.route_topk.triton_kernels:forward",
    "route_topk_backward": "ops.route_topk.triton_kernels:backward",
    "side_moe": "ops.side_moe.triton.forward:forward",
    "side_moe_backward": "ops.side_moe.triton.backward:backward",
    "side_moe_group": "ops.side_moe.triton.forward:group_forward",
    "side_moe_group_backward": "ops.side_moe.triton.backward:group_backward",
    "topk_items": "ops.topk_items.triton_launchers:forward",
}
"""The function that launches an operator's kernels, as "module:name"."""
RANKING = ("rank_of_target", "topk_items")
"""The operators whose second argument is the scored items."""


def load() -> None:
    """Register the kernels with `dispatch`, or the reason why there are none."""
    if reason := _missing_reason():
        dispatch.set_unavailable("triton", reason)
        return
    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    for operator, launcher in LAUNCHERS.items():
        rejects = functools.partial(_rejects, REJECTS.get(operator))
        kernel = dispatch.lazy_import(launcher)
        dispatch.register(operator, "triton", kernel, devices=devices, dtypes=DTYPES, rejects=rejects)


def interpreted() -> bool:
    """Return whether Triton's interpreter is requested."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _rejects_ranking(device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    return item_scores.too_many_items(arguments[1], "triton") if arguments else None


REJECTS: dict[str, dispatch.Rejects] = {
    **dict.fromkeys(RANKING, _rejects_ranking),
    "route_topk": route_limits.rejects_forward,
    "route_topk_backward": route_limits.rejects_backward,
}
"""Further limits of some operators' kernels."""


def _rejects(others: dispatch.Rejects | None, device: torch.device, dtype: torch.dtype, *arguments: Any) -> str | None:
    return tuning.too_old(device) or (others(device, dtype, *arguments) if others else None)


def _missing_reason() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed; `pip install triton`"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    oldest = OLDEST if torch.version.hip is None else OLDEST_FOR_AMD
    if found < oldest:
        return f"triton {version} is older than {'.'.join(map(str, oldest))}; `pip install --upgrade triton`"
    return None
