"""Rank a full catalogue for many users, without a matrix of all scores.

`rank_of_target` returns the rank of a held-out item, and `topk_items` the best items. Both leave out what the user has
seen, which is a flat tensor of item ids with offsets. A small case is checked against all scores.

    python examples/rank_catalogue.py --items 200000 --users 512
"""

import argparse

import torch
from torch import Tensor

from xsmoe_kernels import rank_of_target, topk_items


def draw_seen(users: int, items: int, most: int) -> tuple[Tensor, Tensor]:
    """Return the ids of seen items, one user after the other, and the offsets (users + 1,) of each user's part."""
    lengths = torch.randint(1, most + 1, (users,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(items, (int(offsets[-1]),)), offsets


def check(queries: Tensor, items: Tensor, targets: Tensor, seen: tuple[Tensor, Tensor]) -> None:
    """Raise AssertionError if the operators differ from a ranking of all scores."""
    values, offsets = seen
    scores = queries @ items.T
    for user in range(len(queries)):
        target = scores[user, targets[user]].clone()
        scores[user, values[offsets[user] : offsets[user + 1]]] = -torch.inf
        scores[user, targets[user]] = target
    own = scores.gather(1, targets[:, None])
    assert torch.equal(rank_of_target(queries, items, targets, seen), 1 + (scores > own).sum(1))


def main() -> None:
    """Rank, and print metrics and one user's best items."""
    parser = argparse.ArgumentParser(description="Rank a full catalogue.")
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    items = torch.randn(options.items, options.dim)
    targets = torch.randint(options.items, (options.users,))
    queries = torch.randn(options.users, options.dim) + 0.3 * items[targets]  # a model that is partly right
    seen = draw_seen(options.users, options.items, most=50)

    few = 16
    check(queries[:few], items, targets[:few], (seen[0], seen[1][: few + 1]))
    print(f"ranks of {few} users are those of a full sort")

    ranks = rank_of_target(queries, items, targets, seen)
    ndcg = ((ranks <= options.k) / (1 + ranks.float()).log2()).mean()
    print(
        f"{options.users} users, {options.items} items: HR@{options.k} {(ranks <= options.k).float().mean():.3f}, "
        f"NDCG@{options.k} {ndcg:.3f}, MRR {(1 / ranks).mean():.3f}"
    )
    scores, ids = topk_items(queries, items, options.k, seen)
    assert not torch.isin(ids[0], seen[0][: seen[1][1]]).any()
    best = ", ".join(f"{item} ({score:.2f})" for item, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True))
    print(f"best items of user 0 that are new to them: {best}")


if __name__ == "__main__":
    main()
