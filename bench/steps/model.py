"""What the models of all training steps have alike: sizes that do not change, and dropout."""

from torch import nn

PLACES = 11
"""Items of a user: ten inputs, and the target of the last of them."""
LEVELS, BLOCKS, OUT_DIM, DROPOUT = 2, 2, 128, 0.1


def drop_out(model: nn.Module, rate: float) -> None:
    """Sets the rate of every dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
