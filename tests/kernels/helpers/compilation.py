"""torch.compile for tests of the kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compiled(function: Callable[..., Any], *, backend: Any = "aot_eager") -> Callable[..., Any]:
    """Compile `function` to one graph, without cached code; graph breaks and too many recompilations raise."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def unbacked(*tensors: Tensor) -> None:
    """Hide the tensors' sizes from the compiler, as if they depended on data."""
    for tensor in tensors:
        for dim in range(tensor.dim()):
            torch._dynamo.decorators.mark_unbacked(tensor, dim)
