"""Dropout whose random numbers are cheap on the CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional

_STEPS = 1 << 16


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 bits a number on the CPU, where torch draws one number after another.

    There the rate is that of the nearest 65,536th, and what is kept grows by the inverse of just that.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return functional.dropout(input, self.p, self.training)
        dropped = round(self.p * _STEPS)
        if dropped == _STEPS:
            return input * 0
        words = torch.empty((input.numel() + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        return input * (bits >= dropped - _STEPS // 2).to(input.dtype).mul_(_STEPS / (_STEPS - dropped))
