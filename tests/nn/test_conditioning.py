"""Tests of the conditioning: its formula, levels that pass unchanged, and its place in the model's state."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from xsmoe.nn import Recommender, XSMoE
from xsmoe.nn.conditioning import BLOCK, Condition
from xsmoe.nn.moments import Moments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS: list[Condition] = ["whiten", "standardize"]
DIM = 12


def drawn(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return badly conditioned rows, (count, DIM), far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=generator) * torch.logspace(0, -2, DIM)
    return (torch.randn(count, DIM, generator=generator) @ mixing + 3).to(dtype)


def plain(kind: Condition, rows: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Compute the formula in float64."""
    mean = fitted.mean(0)
    if kind == "standardize":
        return (rows - mean) / fitted.std(0)
    values, vectors = np.linalg.eigh(np.cov(fitted.T, bias=True))
    scale = (np.maximum(values, 0) + 0.01 * values.max()) ** -0.5
    return (rows - mean) @ (vectors * scale) @ vectors.T


def items(kind: Condition, levels: Sequence[Tensor] | None = None) -> XSMoE:
    """Return an encoder of one modality, fitted to these levels if there are any."""
    found = XSMoE(("text",), DIM, num_levels=2, rank=2, out_dim=4, condition=kind)
    if levels is not None:
        found.conditions()["text"].fit([(levels, len(levels[-1]))], levels[-1].dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 300])
def test_the_formula_in_one_rounding(kind: Condition, dtype: torch.dtype, count: int) -> None:
    levels = [drawn(count, dtype, seed) for seed in range(3)]
    asked = [drawn(2 * BLOCK + 3, dtype, 7) for _ in range(3)]
    for fitted, rows, found in zip(levels, asked, items(kind, levels).condition("text", asked), strict=True):
        expected = plain(kind, rows.double().numpy(), fitted.double().numpy())
        assert found.dtype == dtype
        error = np.abs(found.double().numpy() - expected)
        # Half a unit in the last place, plus the error of float32 arithmetic.
        budget = torch.finfo(dtype).eps / 2 * np.abs(expected) + 1e-5 * np.abs(expected).max()
        assert (error <= budget).all()


@pytest.mark.parametrize("cross", [False, True])
def test_chunks_and_an_offset_cost_no_digits(cross: bool) -> None:
    rows = drawn(64) + 4096
    found = Moments(DIM, torch.finfo(torch.float32).eps, cross=cross)
    for start in range(0, 64, 7):
        found.add(rows[start : start + 7], len(rows[start : start + 7]))
    expected = np.cov(rows.double().numpy().T, bias=True)
    expected = expected if cross else np.diag(np.diag(expected))
    np.testing.assert_allclose(found.covariance().numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.mean().numpy(), rows.double().numpy().mean(0), rtol=1e-14)


def test_one_row_counts_for_all_items_that_share_it() -> None:
    shared, rows = drawn(1), drawn(5, seed=1)
    found, expected = (Moments(DIM, 1e-7, cross=True) for _ in range(2))
    found.add(rows, 5)
    found.add(shared, 3)
    expected.add(torch.cat([rows, shared.expand(3, -1)]), 8)
    torch.testing.assert_close(found.covariance(), expected.covariance())
    torch.testing.assert_close(found.mean(), expected.mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_constant_columns_and_levels_pass_to_the_bit(kind: Condition, dtype: torch.dtype) -> None:
    shared, same, columns = drawn(1, dtype), drawn(1, dtype, 1).expand(40, -1), drawn(40, dtype, 2)
    columns[:, 3] = -0.0
    columns[:, 5] = 1.0
    # The next representable number of the dtype: a difference of one rounding step.
    columns[::2, 5] = 1 + torch.finfo(dtype).eps
    columns[:, 8] = 1.0
    columns[0, 8] = 1 + 8 * torch.finfo(dtype).eps
    model = items(kind, [shared, same, columns])
    other = [drawn(1, dtype, 3), drawn(9, dtype, 4), drawn(9, dtype, 5)]
    found = model.condition("text", other)
    assert torch.equal(found[0], other[0])
    assert torch.equal(found[1], other[1])
    for column in range(DIM):
        assert torch.equal(found[2][:, column], other[2][:, column]) == (column in (3, 5)), column
    # The other columns are conditioned as if the constant ones did not exist.
    kept = [column for column in range(DIM) if column not in (3, 5)]
    expected = plain(kind, other[2].double().numpy()[:, kept], columns.double().numpy()[:, kept])
    close = 4 * torch.finfo(dtype).eps * np.abs(expected).max() + 1e-4
    assert np.abs(found[2][:, kept].double().numpy() - expected).max() < close


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_absent_items_stay_zero(kind: Condition) -> None:
    levels = [drawn(1), drawn(30, seed=1), drawn(30, seed=2)]
    model = items(kind, levels)
    present = torch.tensor([True, False, True])
    rows = [level[:3] * present[:, None] for level in levels[1:]]
    found = model.condition("text", [levels[0][:1], *rows], present)
    for level, given in zip(found[1:], rows, strict=True):
        assert not level[1].any()
        assert not torch.equal(level[0], given[0])
    alone = model.condition("text", [levels[0], *(row[2:] for row in rows)])
    assert torch.equal(Recommender(model).condition("text", [levels[0], *rows], present)[1][0], found[1][0])
    assert alone[1].shape == (1, DIM)


def test_rows_pass_until_the_fit_which_is_made_once_and_with_two_items() -> None:
    levels = [drawn(3, seed=seed) for seed in range(3)]
    for model in (items("none"), items("whiten")):
        assert all(map(torch.equal, model.condition("text", levels), levels))
        assert model.conditioned() == ()
    with pytest.raises(ValueError, match="a fit needs at least 2 items, not 1"):
        items("whiten", [level[:1] for level in levels])
    broken = [levels[0], levels[1], levels[2].clone()]
    broken[2][1, 1] = torch.inf
    with pytest.raises(ValueError, match="hidden states are not finite, so no conditioning can be fitted"):
        items("whiten", broken)
    model = items("whiten", levels)
    assert model.conditioned() == ("text",)
    with pytest.raises(RuntimeError, match="is fitted already and never changes"):
        model.conditions()["text"].fit([(levels, 3)], torch.float32)


def test_results_beyond_the_dtype_are_errors_that_name_it() -> None:
    model = items("standardize", [1e-4 * drawn(40, torch.float16, seed) for seed in range(3)])
    rows = [torch.zeros(4, DIM, dtype=torch.float16) for _ in range(3)]
    model.condition("text", rows)
    rows[1][2, 5] = 60000
    with pytest.raises(ValueError, match=r"text, level 1, row 2: .* exceeds torch.float16; use .* bfloat16 or float32"):
        model.condition("text", rows)
    model.condition("text", [level.bfloat16() for level in rows])
    rows[1][2, 5] = torch.nan
    with pytest.raises(ValueError, match="text, level 1, row 2: the hidden state is not finite"):
        model.condition("text", rows)


def test_bad_arguments_are_named() -> None:
    model = items("whiten", [drawn(3, seed=seed) for seed in range(3)])
    rows = [drawn(4)] * 3
    with pytest.raises(ValueError, match=r"modality must be one of \('text',\), not 'image'"):
        model.condition("image", rows)
    with pytest.raises(ValueError, match="levels must be 3 tensors, not 2"):
        model.condition("text", rows[:2])
    with pytest.raises(ValueError, match=r"levels\[1\] must have shape"):
        model.condition("text", [rows[0], rows[0][:, :5], rows[0]])
    with pytest.raises(ValueError, match="levels must have 4 rows each, or 1 that all items share, not 2"):
        model.condition("text", [rows[0], rows[0][:2], rows[0]])
    with pytest.raises(ValueError, match="present must have shape"):
        model.condition("text", rows, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="present must be bool, not torch.float32"):
        model.condition("text", rows, torch.ones(4))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_with_the_model_and_loads_into_any_state_of_another(kind: Condition, tmp_path: Path) -> None:
    levels = [drawn(1), drawn(40, seed=1), drawn(40, seed=2)]
    levels[1][:, 4] = 0
    fitted, fresh, other = items(kind, levels), items(kind), items(kind, [drawn(40, seed=seed) for seed in range(3)])
    state = {name: value.clone() for name, value in fitted.state_dict().items()}
    for model in (fresh, other):
        model.load_state_dict(state)
        assert all(map(torch.equal, model.condition("text", levels), fitted.condition("text", levels)))
    other.load_state_dict(items(kind).state_dict())
    assert other.conditioned() == ()
    recommender = Recommender(fitted)
    recommender.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.condition("text", levels), fitted.condition("text", levels)))


def test_an_inconsistent_state_is_refused() -> None:
    state = items("whiten", [drawn(40, seed=seed) for seed in range(3)]).state_dict()
    for name, value, message in (
        ("varying", torch.ones(5, dtype=torch.bool), r"varying has shape \(5,\), expected \(0,\) or \(12,\)"),
        ("mean", torch.zeros(3), r"mean has shape \(3,\), but 12 conditioned columns need \(12,\)"),
        ("factor", torch.zeros(12), r"factor has shape \(12,\), but 12 conditioned columns need \(12, 12\)"),
    ):
        model = items("whiten")
        with pytest.raises(RuntimeError, match=rf"conditioning\.text\.levels\.1: {message}"):
            model.load_state_dict(state | {f"conditioning.text.levels.1.{name}": value})
    with pytest.raises(RuntimeError, match="conditioning"):
        items("none").load_state_dict(state)


def test_it_stays_float32_whatever_the_model_is_cast_to() -> None:
    levels = [drawn(40, seed=seed) for seed in range(3)]
    model = items("whiten", levels)
    before = model.condition("text", levels)
    for cast in (model.half(), model.to(torch.bfloat16), model.double()):
        assert {value.dtype for name, value in cast.conditioning.named_buffers() if "varying" not in name} == {
            torch.float32
        }
        assert all(map(torch.equal, cast.condition("text", levels), before))
    moved = model.to("meta")
    assert all(value.is_meta for value in moved.conditioning.buffers())


def test_autocast_does_not_reach_it() -> None:
    levels = [drawn(40, seed=seed) for seed in range(3)]
    model = items("whiten", levels)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.condition("text", levels)
    assert all(map(torch.equal, found, model.condition("text", levels)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_with_any_other_rows(kind: Condition) -> None:
    levels = [drawn(40, seed=seed) for seed in range(3)]
    transform = items(kind, levels).conditions()["text"].transforms(torch.device("cpu"))[2]
    rows = drawn(3 * BLOCK, seed=9)
    whole = transform(rows)
    for start in range(0, 3 * BLOCK, BLOCK):
        assert torch.equal(transform(rows[start : start + 5]), whole[start : start + 5])
    some = torch.tensor([17, 300, 130])
    assert torch.equal(transform(rows[some], some), whole[some])
