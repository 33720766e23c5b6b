"""Dropout with a faster random mask on a CPU."""

import torch
from torch import Tensor, nn

DRAWS = 1 << 16
"""Number of equally likely random values. The probability is rounded to a multiple of 1 / DRAWS, also for scaling."""


class Dropout(nn.Dropout):
    """`nn.Dropout` with a cheaper mask in eager code on a CPU.

    An element uses 16 bits of torch's generator, so one random word is enough for four elements. The mask of
    `nn.Dropout` takes longer than a narrow layer's LayerNorm, residual and activation together.
    """

    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * DRAWS)
        plain = not self.training or self.inplace or input.device.type != "cpu" or dropped in (0, DRAWS)
        if plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().forward(input)
        count = input.numel()
        words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[:count].view(input.shape)
        keep = (draws >= dropped - DRAWS // 2).to(input.dtype)
        return input * keep * (DRAWS / (DRAWS - dropped))
