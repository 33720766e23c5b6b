"""Helpers for tests of route_topk's GPU kernels, for every backend."""

import torch
from torch import Tensor

from tests.kernels.helpers.error_budget import assert_within_budget
from tests.kernels.helpers.triton_gpu import DEVICE

CHOICES = ("experts", "order", "offsets")
KINDS = ("plain", "ties", "special", "lowest", "transposed", "wide", "unaligned", "shifted")


def on(backend: str, logits: Tensor, k: int, renormalize: bool, grad: Tensor) -> tuple[Tensor, ...]:
    """Return gates, experts, order and offsets, and the gradient of the logits for one of the gates."""
    routing = torch.ops.xsmoe.route_topk(logits, k, renormalize, backend)
    grad = grad.to(logits.dtype)
    return *routing, torch.ops.xsmoe.route_topk_backward(grad, logits, routing[1], renormalize, backend)


def assert_agrees(backend: str, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, ...]:
    """Fail unless choices are those of the reference, and gates and gradients are within the error budget."""
    generator = torch.Generator().manual_seed(k)
    grad = torch.randn(len(logits), k, generator=generator).to(logits)
    actual, same_dtype = (on(name, logits, k, renormalize, grad) for name in (backend, "reference"))
    exact = on("reference", logits.double(), k, renormalize, grad)
    for name, value, wanted in zip(CHOICES, actual[1:4], same_dtype[1:4], strict=True):
        assert torch.equal(value, wanted), name
    for place, name in ((0, "gates"), (4, "gradient")):
        values = actual[place], same_dtype[place], exact[place]
        assert torch.equal(values[0].isnan(), values[1].isnan()), f"{name}: other places are NaN"
        assert_within_budget(*(value.nan_to_num() for value in values), name)
    return actual


def random_logits(num_rows: int, num_experts: int, dtype: torch.dtype, kind: str = "plain", seed: int = 0) -> Tensor:
    """Return logits on the device: with ties, with numbers that are not finite, or in another layout."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_experts, generator=generator)
    if kind == "ties":
        logits = logits.round()
    if kind == "special":
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -torch.nan])
        special = values[torch.randint(len(values), (num_rows, num_experts), generator=generator)]
        logits = torch.where(torch.rand(num_rows, num_experts, generator=generator) < 0.2, special, logits)
    if kind == "lowest":
        logits = torch.where(torch.rand(num_rows, num_experts, generator=generator) < 0.6, -torch.inf, logits)
    logits = logits.to(DEVICE, dtype)
    if kind == "transposed":
        return logits.T.contiguous().T
    if kind in ("wide", "unaligned"):
        # For the latter the distance of rows is odd, so that most begin where no 16 bytes do.
        others = num_experts if kind == "wide" else 1 + num_experts % 2
        return torch.cat([logits, torch.full_like(logits[:, :1], torch.nan).expand(-1, others)], dim=1)[:, :num_experts]
    if kind == "shifted":
        return torch.cat([logits.new_full((1,), torch.nan), logits.flatten()])[1:].view(num_rows, num_experts)
    return logits
