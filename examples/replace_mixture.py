"""Replace an eager mixture of experts in your own module by `side_moe`, and compare both.

`EagerMixture` is what one writes first: a module per expert and a softmax router. `FusedMixture` keeps its parameters
and its state dict, and calls the operator instead.

    python examples/replace_mixture.py --rows 2048 --dim 256
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from xsmoe_kernels import side_moe


class EagerMixture(nn.Module):
    """A softmax mixture of the backbone's row and of residual bottleneck experts, in plain PyTorch."""

    def __init__(self, dim: int, rank: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts + 1, bias=False)
        self.down = nn.ModuleList(nn.Linear(dim, rank, bias=False) for _ in range(experts))
        self.up = nn.ModuleList(nn.Linear(rank, dim, bias=False) for _ in range(experts))

    def forward(self, x: Tensor, backbone: Tensor) -> Tensor:
        """Mix rows x (N, D) with the backbone's rows (N, D)."""
        gates = self.router(x).softmax(dim=-1)
        mixed = gates[:, :1] * backbone
        for index, (down, up) in enumerate(zip(self.down, self.up, strict=True), start=1):
            mixed = mixed + gates[:, index : index + 1] * (x + up(functional.gelu(down(x))))
        return mixed


class FusedMixture(EagerMixture):
    """The same function with the same parameters, in one operator."""

    def forward(self, x: Tensor, backbone: Tensor) -> Tensor:
        """Mix rows x (N, D) with the backbone's rows (N, D)."""
        down = torch.stack(list(self.down.parameters()))  # (E, R, D)
        up = torch.stack([weight.T for weight in self.up.parameters()])  # (E, R, D): a row of `up` per bottleneck unit
        return side_moe(x, backbone, self.router.weight, down, up)


def step(module: nn.Module, x: Tensor, backbone: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of all parameters."""
    out = module(x, backbone)
    return out.detach(), list(torch.autograd.grad(out.square().mean(), list(module.parameters())))


def milliseconds(module: nn.Module, x: Tensor, backbone: Tensor, repeats: int) -> float:
    """Return the shortest time of a forward and backward pass. Call it after a first step has warmed up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(module, x, backbone)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    """Compare outputs and gradients, then print the time of both."""
    parser = argparse.ArgumentParser(description="Compare an eager mixture of experts with side_moe.")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    eager = EagerMixture(options.dim, options.rank, options.experts)
    fused = FusedMixture(options.dim, options.rank, options.experts)
    fused.load_state_dict(eager.state_dict())
    x, backbone = torch.randn(options.rows, options.dim), torch.randn(options.rows, options.dim)

    expected, expected_gradients = step(eager, x, backbone)
    found, found_gradients = step(fused, x, backbone)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    print(f"largest difference of outputs: {(found - expected).abs().max():.1e}; all gradients agree")
    for name, module in (("eager", eager), ("side_moe", fused)):
        print(f"{name}: {milliseconds(module, x, backbone, options.repeats):.2f} ms, forward and backward")


if __name__ == "__main__":
    main()
