"""torch.compile as the kernels' tests use it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compiled(function: Callable[..., Any], *, backend: Any = "aot_eager") -> Callable[..., Any]:
    """`function` as one graph, freshly compiled; whatever breaks the graph or recompiles too often raises."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def unbacked(*tensors: Tensor) -> None:
    """Hides the tensors' sizes from the compiler, as if the data decided them."""
    for tensor in tensors:
        for dim in range(tensor.dim()):
            torch._dynamo.decorators.mark_unbacked(tensor, dim)
