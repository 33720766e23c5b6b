"""xformers' attention for NVIDIA GPUs: registers it without importing xformers, and knows why it cannot serve."""

import importlib.metadata
import re

import torch

from xsmoe_kernels.runtime import dispatch

OLDEST = (0, 0, 35)
MODULE = "ops.packed_attention.xformers_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load() -> None:
    """Registers the kernels with `dispatch`, or the reason why there are none."""
    reason = _absence()
    for name in ("forward", "backward"):
        operator = "packed_attention" + ("_backward" if name == "backward" else "")
        if reason is not None:
            dispatch.declare_absent("cuda", reason, operator)
            continue
        dispatch.register(
            operator,
            "cuda",
            dispatch.when_needed(f"{MODULE}:{name}"),
            devices=("cuda",),
            dtypes=DTYPES,
            refuses=dispatch.when_needed(f"{MODULE}:refuses_{name}"),
        )


def _absence() -> str | None:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    try:
        version = importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        return "xformers is not installed; `pip install xformers`"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
        return f"xformers {version} is older than {'.'.join(map(str, OLDEST))}; `pip install --upgrade xformers`"
    return None
