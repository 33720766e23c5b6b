"""The user encoder: packed sequences give what padded ones give in the published formulation."""

import numpy as np
import pytest
import torch

from bench.published import UserEncoder as PaddedUserEncoder
from bench.published_names import our_name
from xsmoe.nn import UserEncoder


def test_packed_equals_padded() -> None:
    torch.manual_seed(0)
    padded, packed = PaddedUserEncoder(dim=16, inner=32).eval(), UserEncoder(16, inner_dim=32).eval()
    packed.load_state_dict({our_name(key): value for key, value in padded.state_dict().items()})
    lengths = [10, 1, 4, 7]
    rows = torch.randn(sum(lengths), 16)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    x, mask = torch.zeros(len(lengths), 10, 16), torch.zeros(len(lengths), 10)
    for user, length in enumerate(lengths):
        x[user, 10 - length :] = rows[offsets[user] : offsets[user + 1]]
        mask[user, 10 - length :] = 1
    expected = padded(x, mask)
    ours = packed(rows, offsets, lengths=lengths)
    for user, length in enumerate(lengths):
        torch.testing.assert_close(
            ours[offsets[user] : offsets[user + 1]], expected[user, 10 - length :], rtol=1e-5, atol=1e-5
        )


def test_a_later_item_changes_no_earlier_query() -> None:
    torch.manual_seed(0)
    encoder = UserEncoder(8, inner_dim=16).eval()
    rows, offsets = torch.randn(5, 8), torch.tensor([0, 3, 5])
    changed = rows.clone()
    changed[2] += 1
    before, after = encoder(rows, offsets), encoder(changed, offsets)
    assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]])
    assert not torch.equal(before[2], after[2])


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    encoder = UserEncoder(8, inner_dim=16, dropout=0.5)
    rows, offsets = torch.randn(5, 8), torch.tensor([0, 3, 5])
    assert not torch.equal(encoder(rows, offsets), encoder(rows, offsets))
    encoder.eval()
    assert torch.equal(encoder(rows, offsets), encoder(rows, offsets))


def test_no_sequences() -> None:
    assert UserEncoder(8)(torch.zeros(0, 8), torch.zeros(1, dtype=torch.int64)).shape == (0, 8)


def test_too_long_a_sequence_and_bad_heads_are_named() -> None:
    with pytest.raises(ValueError, match="max_length"):
        UserEncoder(8, max_length=2)(torch.zeros(3, 8), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="num_heads must divide dim = 9"):
        UserEncoder(9)
