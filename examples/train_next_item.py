"""Train a small next-item recommender in your own loop, with `XSMoE` as the item encoder.

The items' hidden states would come from a frozen encoder. Here they are noisy copies of a topic, and each user follows
one topic, so that a model that reads the hidden states can predict the next item. The user tower is a GRU: any module
that maps item embeddings to queries will do.

    python examples/train_next_item.py --steps 200
"""

import argparse

import torch
from torch import Tensor, nn

from xsmoe.nn import XSMoE
from xsmoe_kernels import in_batch_softmax_loss, rank_of_target

TOPICS, LEVELS, LENGTH = 8, 3, 6


class TwoTowers(nn.Module):
    """Items from hidden states, users from the items that they chose."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.items = XSMoE(modalities=("text",), dim=dim, num_levels=LEVELS - 1, rank=16, out_dim=out_dim)
        self.users = nn.GRU(out_dim, out_dim, batch_first=True)

    def queries(self, embeddings: Tensor, places: Tensor) -> Tensor:
        """Return a query after every item: embeddings (C, d), places (B, L) in them -> (B, L, d)."""
        return self.users(embeddings[places])[0]


def draw_catalogue(num_items: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return each item's topic and its hidden states (items, levels, dim)."""
    topics = torch.randint(TOPICS, (num_items,))
    return topics, torch.randn(TOPICS, LEVELS, dim)[topics] + torch.randn(num_items, LEVELS, dim)


def draw_users(topics: Tensor, count: int) -> Tensor:
    """Return (count, LENGTH + 1) items: each user chooses items of one topic."""
    return torch.stack([torch.multinomial((topics == t).float(), LENGTH + 1) for t in torch.randint(TOPICS, (count,))])


def train_step(model: TwoTowers, hidden: Tensor, chosen: Tensor, log_share: Tensor) -> Tensor:
    """Return the loss of a batch of users, whose other items are the negatives."""
    distinct, places, counts = chosen.unique(return_inverse=True, return_counts=True)  # each item is encoded once
    embeddings = model.items({"text": hidden[distinct]}, row_weight=counts.float())
    queries = model.queries(embeddings, places[:, :-1])
    users = torch.arange(len(chosen)).repeat_interleave(LENGTH)
    return in_batch_softmax_loss(
        queries.flatten(0, 1),
        embeddings,
        places[:, 1:].flatten(),
        rejected=places,  # a user's own items are no negatives
        users=users,
        logq=log_share[distinct],
        counts=counts,
    )


@torch.no_grad()
def hit_rate(model: TwoTowers, hidden: Tensor, chosen: Tensor, k: int) -> float:
    """Return how often the last item is among the k best of all items that its user has not chosen before."""
    model.eval()
    catalogue = model.items({"text": hidden})
    inputs = chosen[:, :-1]
    queries = model.queries(catalogue, inputs)[:, -1]
    offsets = torch.arange(len(chosen) + 1) * inputs.shape[1]
    ranks = rank_of_target(queries, catalogue, chosen[:, -1], seen=(inputs.flatten(), offsets))
    model.train()
    return (ranks <= k).float().mean().item()


def main() -> None:
    """Train, and print the loss and the hit rate before and after."""
    parser = argparse.ArgumentParser(description="Train a small next-item recommender.")
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--users", type=int, default=32, help="users of a batch")
    options = parser.parse_args()

    torch.manual_seed(0)
    topics, hidden = draw_catalogue(options.items, options.dim)
    log, tested = draw_users(topics, 1000), draw_users(topics, 200)
    log_share = (log.flatten().bincount(minlength=options.items) / log.numel()).log()
    model = TwoTowers(options.dim, out_dim=24)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    print(f"before: HR@20 {hit_rate(model, hidden, tested, 20):.2f}")
    for step in range(options.steps):
        loss = train_step(model, hidden, log[torch.randperm(len(log))[: options.users]], log_share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"after: HR@20 {hit_rate(model, hidden, tested, 20):.2f}")


if __name__ == "__main__":
    main()
