"""Padding does not change loss, gradients and counters of a batch."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.stream import tiny
from xsmoe.data import Sequences
from xsmoe.nn import Batch, Recommender, UserEncoder, XSMoE
from xsmoe.stream.batches.padding import ITEMS, Capacity
from xsmoe_kernels import in_batch_softmax_loss, use_backend
from xsmoe_kernels.runtime import dispatch

CAPACITY = Capacity(9, 10)
CATALOGUE = 400
BACKENDS = ("reference", "native", "triton")


def needs(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if reason := dispatch.unavailable_reason("in_batch_softmax_loss", backend, "cpu", dtype):
        pytest.skip(reason)


def batch(users: int = 7, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 12, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Batch.from_sequences(rng.integers(0, CATALOGUE, offsets[-1]), offsets, np.log(rng.random(CATALOGUE)))


def recommender(**options: Any) -> Recommender:
    """Return a recommender with trained and frozen experts of the same scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        items = XSMoE(tuple(tiny.DIMS), dim=tiny.DIMS, rank=3, out_dim=8, **options)
        for _, _, bank in items.banks():
            torch.nn.init.normal_(bank.down, std=0.5)
            torch.nn.init.normal_(bank.up, std=0.5)
        items.expand()
        return Recommender(items, UserEncoder(8, num_blocks=2, inner_dim=16, dropout=0.0)).train()


def hidden(batch: Batch, dtype: torch.dtype, *, constant: bool = False) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tables = {name: torch.randn(3, CATALOGUE, dim, generator=generator) for name, dim in tiny.DIMS.items()}
    levels = {name: [level.to(dtype).index_select(0, batch.items) for level in tables[name]] for name in tables}
    if constant:
        for name in levels:
            levels[name][0] = tables[name][0, :1].to(dtype)
    return levels


def outcome(model: Recommender, batch: Batch, given: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.items.reset_utilization()
    loss = model(given, batch)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for modality, level, bank in model.items.banks():
        found[f"norm {modality} {level}"] = bank.utilization.norm.clone()
        found[f"gate {modality} {level}"] = bank.utilization.gate.clone()
    return found


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).norm() / value.norm().clamp(min=1e-30))
        if value.norm() > 0
        else float(found[name].norm())
        for name, value in expected.items()
    )


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("users", [1, 7, 9])
def test_a_padded_step_is_the_step_in_double_precision(users: int, constant: bool) -> None:
    model, plain = recommender().double(), batch(users)
    padded = CAPACITY.pad(plain)
    expected = outcome(model, plain, hidden(plain, torch.float64, constant=constant))
    # The factor is a float32, like the denominator of the mean in every kernel.
    assert worst(outcome(model, padded, hidden(padded, torch.float64, constant=constant)), expected) < 1e-7


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("options", [{}, {"top_k": 1}], ids=str)
def test_a_padded_step_is_the_step_to_rounding(backend: str, options: dict[str, Any]) -> None:
    needs(backend)
    model, plain = recommender(**options), batch()
    padded = CAPACITY.pad(plain).packed()
    with use_backend(backend):
        expected = outcome(model, plain, hidden(plain, torch.float32))
        assert worst(outcome(model, padded, hidden(padded, torch.float32)), expected) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_has_exactly_zero_loss_and_gradients(backend: str, dtype: torch.dtype) -> None:
    needs(backend, dtype)
    plain = batch(2)
    padded = Capacity(3, 10).pad(plain)
    generator = torch.Generator().manual_seed(2)
    queries, items = (
        (8 * torch.randn(size, 16, generator=generator)).to(dtype).requires_grad_()
        for size in (len(padded.inputs), len(padded.items))
    )

    def loss(one: Batch, rows: slice, columns: slice) -> torch.Tensor:
        result = in_batch_softmax_loss(
            queries[rows], items[columns], one.targets, one.rejected, users=one.users, logq=one.logq, counts=one.counts
        )
        return result if one.factor is None else result * one.factor

    rows, columns = slice(0, len(plain.inputs)), slice(0, len(plain.items))
    with use_backend(backend):
        found = loss(padded, slice(None), slice(None))
        expected = loss(plain, rows, columns)
        of_queries, of_items = torch.autograd.grad(found, (queries, items))
        wanted = torch.autograd.grad(expected, (queries, items))
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    for mine, true in zip((of_queries, of_items), wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance * float(true.abs().max()))
    assert not of_queries[rows.stop :].any()
    assert not of_items[columns.stop :].any()


def test_results_do_not_depend_on_padding_values() -> None:
    model, padded = recommender(), CAPACITY.pad(batch())
    added = padded.counts == 0
    given = hidden(padded, torch.float32)
    expected = outcome(model, padded, given)
    other = {
        name: [torch.where(added[:, None], 3.0 - level, level) for level in levels] for name, levels in given.items()
    }
    found = outcome(model, padded, other)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_shapes_depend_only_on_the_number_of_distinct_items() -> None:
    capacity = Capacity(40, 10)
    shapes = {}
    for seed in range(6):
        for users in (2, 30, 40):
            one = batch(users, seed)
            padded = capacity.pad(one)
            (num_items,) = padded.items.shape
            assert 1 <= num_items - len(one.items) <= ITEMS
            assert num_items % ITEMS == 0
            kind = tuple(tensor.shape for tensor in padded.tensors().values())
            assert shapes.setdefault(num_items, kind) == kind
    assert len(shapes) > 1
    whole = Batch.from_sequences(np.arange(2 * ITEMS) % ITEMS, np.arange(0, 2 * ITEMS + 1, 8), np.zeros(ITEMS))
    assert len(whole.items) == ITEMS
    assert len(capacity.pad(whole).items) == 2 * ITEMS


def test_padding_items_are_valid_and_never_negatives() -> None:
    one = batch()
    padded = CAPACITY.pad(one)
    added = slice(len(one.items), None)
    assert set(padded.items[added].tolist()) == {int(one.items[0])}
    assert not padded.counts[added].any()
    assert padded.lengths is None
    assert padded.offsets[len(one.offsets) :].unique().tolist() == [len(one.inputs)]
    assert padded.factor == pytest.approx(90 / len(one.inputs))


def test_batch_larger_than_the_capacity_is_rejected() -> None:
    with pytest.raises(ValueError, match="at most 6 sequences of 10 inputs, not 7 of 9"):
        Capacity(6, 10).pad(batch())
    lengths = Sequences(np.arange(1), np.arange(6), np.array([0, 6]))
    long = Batch.from_sequences(lengths.items, lengths.offsets, np.zeros(6))
    with pytest.raises(ValueError, match="at most 6 sequences of 4 inputs, not 1 of 5"):
        Capacity(6, 4).pad(long)
