"""Tests of the user encoder: packed sequences return the same as padded ones in the published formulation."""

import numpy as np
import pytest
import torch

from bench.paper.model import UserEncoder as PaddedUserEncoder
from bench.paper.parameter_names import user_encoder_name
from xsmoe.nn import UserEncoder


@pytest.mark.parametrize("lengths", [[10, 1, 4, 7], [10] * 6, [1, 2], [3]], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_packed_equals_padded(lengths: list[int], training: bool) -> None:
    """The results and the gradients of the embeddings and of every parameter are equal."""
    torch.manual_seed(0)
    padded, packed = PaddedUserEncoder(dim=16, inner=32, dropout=0.0), UserEncoder(16, inner_dim=32, dropout=0.0)
    packed.load_state_dict({user_encoder_name(key): value for key, value in padded.state_dict().items()})
    padded.train(training), packed.train(training)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    rows = torch.randn(sum(lengths), 16, requires_grad=True)
    upstream = torch.randn(sum(lengths), 16)
    users = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    places = torch.arange(sum(lengths)) + 10 - offsets[1:][users]
    x = torch.zeros(len(lengths), 10, 16).index_put((users, places), rows)
    mask = torch.zeros(len(lengths), 10).index_put((users, places), torch.ones(()))
    expected = padded(x, mask)[users, places]
    ours = packed(rows, offsets, lengths=lengths)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    names = [user_encoder_name(name) for name, _ in padded.named_parameters()]
    wanted = torch.autograd.grad(expected, [rows, *padded.parameters()], upstream)
    found = torch.autograd.grad(ours, [rows, *(packed.get_parameter(name) for name in names)], upstream)
    for name, mine, theirs in zip(("rows", *names), found, wanted, strict=True):
        assert torch.linalg.norm(mine - theirs) <= 1e-5 * torch.linalg.norm(theirs) + 1e-6, name


def test_one_product_and_three_are_the_same() -> None:
    torch.manual_seed(0)
    block = UserEncoder(16, inner_dim=32).blocks[0]
    x = torch.randn(7, 16)
    apart = block._projected(x)
    with torch.autocast("cpu", torch.bfloat16):
        together = block._projected(x)
    for one, other in zip(apart, together, strict=True):
        assert other.dtype == torch.bfloat16
        torch.testing.assert_close(other.float(), one, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_hooks_and_replacements_of_a_projection_are_called(autocast: bool) -> None:
    block, called = UserEncoder(16, inner_dim=32).blocks[0], []
    block.key.register_forward_hook(lambda *_: called.append("key"))

    class Adapted(torch.nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            called.append("query")
            return super().forward(rows)

    block.query = Adapted(16, 16, bias=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        block._projected(torch.randn(7, 16))
    assert called == ["query", "key"]


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
    with pytest.raises(TypeError, match="dim must be an int, not str"):
        UserEncoder("128")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads must be at least 1, not 0"):
        UserEncoder(8, num_heads=0)


def test_sizes_may_be_numpy_integers(tmp_path) -> None:
    encoder = UserEncoder(np.int64(8), np.int64(1), np.int64(2), np.int64(16), max_length=np.int64(4))
    encoder.save_pretrained(tmp_path)
    assert UserEncoder.from_pretrained(tmp_path).config() == encoder.config()
