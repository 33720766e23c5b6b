"""Tests of the batch and of the recommender's loss."""

import numpy as np
import pytest
import torch

from xsmoe.nn import Batch, Recommender, UserEncoder, XSMoE

ITEMS = np.array([7, 3, 7, 9, 3, 5], dtype=np.int64)
OFFSETS = np.array([0, 4, 6], dtype=np.int64)


def test_batch_holds_distinct_items_and_their_followers() -> None:
    log_share = np.log(np.arange(1, 11) / 55)
    batch = Batch.from_sequences(ITEMS, OFFSETS, log_share)
    assert batch.items.tolist() == [3, 5, 7, 9]
    assert batch.counts.tolist() == [2, 1, 2, 1]
    assert batch.items[batch.inputs].tolist() == [7, 3, 7, 3]
    assert batch.items[batch.targets].tolist() == [3, 7, 9, 5]
    assert batch.offsets.tolist() == [0, 3, 4]
    assert batch.users.tolist() == [0, 0, 0, 1]
    assert batch.rejected.tolist() == [[2, 0, 2, 3], [0, 1, -1, -1]]
    np.testing.assert_allclose(batch.logq.numpy(), log_share[[3, 5, 7, 9]], rtol=1e-6)


def test_batch_without_sequences_and_with_too_short_a_sequence() -> None:
    empty = Batch.from_sequences(ITEMS[:0], OFFSETS[:1], np.zeros(10))
    assert (len(empty.items), len(empty.inputs), empty.rejected.shape) == (0, 0, (0, 0))
    with pytest.raises(ValueError, match="offsets must give every sequence at least 2 items, but one has 1"):
        Batch.from_sequences(ITEMS[:1], np.array([0, 1]), np.zeros(10))


def test_loss_learns_and_counts_occurrences() -> None:
    torch.manual_seed(0)
    model = Recommender(XSMoE(("text",), dim=6, rank=2, out_dim=8), UserEncoder(8, inner_dim=16, dropout=0.0))
    table = torch.randn(10, 3, 6)
    batch = Batch.from_sequences(ITEMS, OFFSETS, np.log(np.full(10, 0.1)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model({"text": table[batch.items]}, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    bank = model.items.sides["text"].levels()[0]
    assert bank.utilization.gate.sum().item() == pytest.approx(30 * len(ITEMS))


def test_queries_are_those_after_the_last_items() -> None:
    torch.manual_seed(0)
    model = Recommender(XSMoE(("text",), dim=6, rank=2, out_dim=8), UserEncoder(8, inner_dim=16)).eval()
    rows, offsets = torch.randn(5, 8), torch.tensor([0, 3, 5])
    torch.testing.assert_close(model.queries(rows, offsets), model.users(rows, offsets)[[2, 4]])


def test_widths_must_agree() -> None:
    with pytest.raises(ValueError, match=r"users\.dim must equal items\.out_dim = 8, but is 16"):
        Recommender(XSMoE(("text",), dim=6, out_dim=8), UserEncoder(16))
