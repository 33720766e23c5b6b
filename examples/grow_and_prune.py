"""Grow and prune a bank of experts in your own training loop, with the optimizer that you have.

For each new window of data, `prune` drops the least used expert if its share is small. Then `expand` freezes all
experts and adds a trainable one. Give both the optimizer: they remove from it what is frozen, and keep the state of
what stays. Call them between two optimizer steps.

    python examples/grow_and_prune.py --windows 5 --threshold 0.2
"""

import argparse

import torch
from torch import Tensor

from xsmoe.nn import ExpertBank


def draw_window(number: int, rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows x, the backbone's rows and targets (rows, dim). Each window has another map from x to target."""
    generator = torch.Generator().manual_seed(number)
    x, backbone = (torch.randn(rows, dim, generator=generator) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return x, backbone, x + 0.5 * torch.relu(x @ rotation)


def main() -> None:
    """Train one bank over several windows, and print what grows, what goes and what the optimizer holds."""
    parser = argparse.ArgumentParser(description="Grow and prune a bank of experts while it trains.")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="steps of a window")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.3, help="drop the least used expert below this share")
    options = parser.parse_args()

    torch.manual_seed(0)
    bank = ExpertBank(options.dim, rank=16)
    optimizer = torch.optim.Adam(bank.parameters(), lr=1e-2)
    for window in range(options.windows):
        if window > 0:
            print(f"shares: {[round(share, 2) for share in bank.utilization.shares().tolist()]}")
            dropped = bank.prune(options.threshold, optimizer)
            if dropped is not None:
                print(f"window {window}: dropped expert {dropped[0]}, which had a share of {dropped[1]:.2f}")
            bank.expand(optimizer, new_gate="mean")
            bank.utilization.reset()
        x, backbone, target = draw_window(window, options.rows, options.dim)
        losses = []
        for _ in range(options.steps):
            loss = (bank(x, backbone) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        print(
            f"window {window}: {bank.num_experts} experts, {bank.num_frozen} of them frozen; "
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the optimizer trains {trained} numbers"
        )


if __name__ == "__main__":
    main()
