"""Step inputs: the batch, also packed into one tensor, and hidden states."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from tests.stream import tiny
from xsmoe.nn import Batch
from xsmoe.stream.batches.padding import Capacity
from xsmoe.stream.precision import hidden_dtype

CPU = torch.device("cpu")


def test_a_step_gets_the_hidden_states_of_its_distinct_items() -> None:
    given = tiny.step_input(np.array([0, 2]))
    assert given.batch.items.tolist() == [4, 6, 7]
    expected = tiny.features().hidden(given.batch.items.numpy())
    for name, levels in expected.items():
        for mine, level in zip(given.hidden[name], levels, strict=True):
            assert torch.equal(mine, level)


def test_hidden_states_have_the_requested_dtype() -> None:
    given = tiny.step_input(np.array([1]), torch.bfloat16)
    assert {level.dtype for levels in given.hidden.values() for level in levels} == {torch.bfloat16}


def test_lengths_are_those_of_the_offsets() -> None:
    batch = tiny.step_input(np.array([2, 0, 1])).batch
    assert batch.lengths == tuple(batch.offsets.diff().tolist()) == (2, 1, 4)
    assert batch.num_padding(11) == 3 * 10 - 7


def test_moving_a_batch_keeps_its_values() -> None:
    given = tiny.step_input(np.array([0, 1]))
    moved = given.to(CPU)
    for field in fields(Batch):
        mine, theirs = getattr(given.batch, field.name), getattr(moved.batch, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert moved.hidden.keys() == given.hidden.keys()


@pytest.mark.parametrize("capacity", [None, Capacity(3, 6)])
def test_a_packed_batch_is_the_same_in_one_tensor(capacity: Capacity | None) -> None:
    batch = tiny.step_input(np.array([1, 0]), capacity=capacity).batch
    packed = batch.packed()
    assert packed.packed() is packed
    for one in (packed, packed.to(CPU), packed.clone()):
        assert one.storage is not None
        assert one.lengths == batch.lengths
        assert set(one.tensors()) == set(batch.tensors())
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, batch.tensors()[name]), name
            assert tensor.untyped_storage().data_ptr() == one.storage.data_ptr(), name
            assert tensor.data_ptr() - one.storage.data_ptr() in range(0, one.storage.nbytes, 256), name
    assert packed.clone().storage.data_ptr() != packed.storage.data_ptr()  # type: ignore[union-attr]


def test_input_copies_the_values_of_another_with_the_same_key() -> None:
    capacity = Capacity(3, 6)
    mine, theirs = (tiny.step_input(np.array(users), capacity=capacity) for users in ([1], [0, 2]))
    assert mine.graph_key() == theirs.graph_key()
    assert mine.graph_key() != tiny.step_input(np.array([1])).graph_key()
    assert mine.graph_key() != tiny.step_input(np.array([1]), torch.bfloat16, capacity).graph_key()
    copy = mine.clone()
    copy.copy_(theirs)
    for one, other in zip(copy.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(mine.batch.items, theirs.batch.items), "a copy is no alias"


@pytest.mark.parametrize(
    ("device", "precision", "top_k", "expected"),
    [
        ("cpu", "auto", None, torch.float32),
        ("cpu", "bfloat16", None, torch.bfloat16),
        ("cpu", "bfloat16", 1, torch.float32),
        ("cuda", "auto", None, torch.bfloat16),
        ("cuda", "float32", None, torch.float32),
    ],
)
def test_hidden_states_have_the_dtype_of_the_step(
    device: str, precision: Any, top_k: int | None, expected: torch.dtype
) -> None:
    config = tiny.config(device=device, precision=precision)
    assert hidden_dtype(tiny.model(top_k=top_k), config) == expected
