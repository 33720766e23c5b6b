"""Item encoders that are built otherwise than a run's settings say: of given sizes, or without a side network."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bench.quality.variants import Kind
from xsmoe.cli.run_config import RunConfig
from xsmoe.nn import ExpertBank, Recommender
from xsmoe.stream.state.seeds import derive, seeded

Experts = Mapping[str, Sequence[int]]


class LastLevel(ExpertBank):
    """A side level that returns the backbone's rows, so that the encoder is its projection of the last level.

    It has no weights that train, counts nothing, and therefore never grows.
    """

    def __init__(self, dim: int) -> None:
        # Levels with top_k are called as modules; the fused launch would compute a mixture.
        super().__init__(dim, rank=1, num_experts=1, top_k=1)
        self.requires_grad_(False)

    def forward(self, x: Tensor, backbone: Tensor, row_weight: Tensor | None = None) -> Tensor:
        return backbone


def build(config: RunConfig, kind: Kind, experts: Experts | None = None) -> Recommender:
    """Build a variant's model with the initial weights that the seed gives.

    Args:
        config: the run's settings.
        kind: see `Variant`.
        experts: of every level of each modality, for "static".
    """
    model = config.build_model()
    with seeded(derive(config.stream.seed, 0, 0, "experts"), torch.device("cpu")):
        for name, side in model.items.ladders().items():
            for level, bank in enumerate(side.levels()):
                if kind == "linear":
                    side.banks[level] = LastLevel(bank.dim)
                elif kind == "static":
                    assert experts is not None
                    side.banks[level] = ExpertBank(bank.dim, bank.rank, experts[name][level], bank.top_k)
    return model
