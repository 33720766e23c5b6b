"""The recommender: an item encoder and a user encoder, trained by next-item prediction."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor
from torch.nn import functional

from xsmoe.nn.batch import Batch
from xsmoe.nn.item_encoder import XSMoE
from xsmoe.nn.pretrained import Pretrained
from xsmoe.nn.side_network import Hidden
from xsmoe.nn.user_encoder import UserEncoder
from xsmoe_kernels import in_batch_softmax_loss
from xsmoe_kernels.runtime.profiler_ranges import named_range


class Recommender(Pretrained):
    """Scores an item for a user by the dot product of the user's query and the item's embedding, arXiv 2508.05993.

    Args:
        items: the item encoder.
        users: the user encoder; its `dim` must equal the item encoder's `out_dim`.
    """

    def __init__(self, items: XSMoE, users: UserEncoder | None = None) -> None:
        super().__init__()
        users = UserEncoder(items.out_dim) if users is None else users
        if users.dim != items.out_dim:
            raise ValueError(f"users.dim must equal items.out_dim = {items.out_dim}, but is {users.dim}")
        self.items, self.users = items, users

    def config(self) -> dict[str, Any]:
        return {"items": self.items.config(), "users": self.users.config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(XSMoE.from_config(config["items"]), UserEncoder.from_config(config["users"]))

    def forward(self, hidden: Mapping[str, Hidden], batch: Batch) -> Tensor:
        """Return the in-batch softmax loss with logQ correction, over the batch's distinct items.

        Each distinct item is encoded once. It counts in the utilization as often as it occurs in the batch.

        Args:
            hidden: the conditioned hidden states of `batch.items`, in the form of `XSMoE.forward`.
            batch: see `Batch`; its `ids` require a model with IDs.

        Returns:
            The mean loss, a scalar.
        """
        with named_range("encode"):
            embeddings = self.items(hidden, row_weight=batch.counts, ids=batch.ids)
        with named_range("attend"):
            inputs = functional.embedding(batch.inputs, embeddings)
            queries = self.users(inputs, batch.offsets, lengths=batch.lengths)
        with named_range("loss"):
            loss = in_batch_softmax_loss(
                queries,
                embeddings,
                batch.targets,
                batch.rejected,
                users=batch.users,
                logq=batch.logq,
                counts=batch.counts,
            )
            return loss if batch.factor is None else loss * batch.factor

    def condition(self, modality: str, levels: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """Condition hidden states, see `XSMoE.condition`."""
        return self.items.condition(modality, levels, present)

    def queries(self, embeddings: Tensor, offsets: Tensor, *, lengths: Sequence[int] | None = None) -> Tensor:
        """Return the query of each sequence after its last item.

        Args:
            embeddings: (M, dim), the concatenated item embeddings of the sequences. No sequence is empty.
            offsets: (B + 1,) int64.
            lengths: see `UserEncoder.forward`.

        Returns:
            (B, dim).
        """
        return functional.embedding(offsets[1:] - 1, self.users(embeddings, offsets, lengths=lengths))
