"""Tests of lazy Adam against one dense Adam per row, each with its own step count."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xsmoe import LazyAdam
from xsmoe.nn import lazy_adam

ROWS, WIDTH = 12, 3
BETAS, EPS = (0.9, 0.999), 1e-8


@pytest.fixture(params=["host", "in place"], autouse=True)
def duplicates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Select how entries of one row are summed: on the CPU, or as on all other devices."""
    if request.param == "in place":
        monkeypatch.setattr(lazy_adam, "_summed", lazy_adam._summed_in_place)
    return str(request.param)


class Reference:
    """One Adam per row, in float64, which steps if the row's gradient is not zero."""

    def __init__(self, table: Tensor, betas: tuple[float, float] = BETAS) -> None:
        self.table = table.detach().double().clone()
        self.betas = betas
        self.steps, self.first, self.second = [0] * len(table), 0 * self.table, 0 * self.table

    def step(self, gradient: Tensor, lr: float) -> None:
        gradient, (beta1, beta2) = gradient.double(), self.betas
        for row in range(len(self.table)):
            if not gradient[row].any():
                continue
            self.steps[row] += 1
            self.first[row] = beta1 * self.first[row] + (1 - beta1) * gradient[row]
            self.second[row] = beta2 * self.second[row] + (1 - beta2) * gradient[row] ** 2
            first = self.first[row] / (1 - beta1 ** self.steps[row])
            second = self.second[row] / (1 - beta2 ** self.steps[row])
            self.table[row] -= lr * first / (second.sqrt() + EPS)


def draw(generator: torch.Generator, entries: int = 9) -> Tensor:
    """Draw a sparse gradient with duplicates, and with zeros at row 0 like those of padding."""
    rows = torch.randint(ROWS, (entries,), generator=generator)
    values = torch.randn(entries, WIDTH, generator=generator) * 10.0 ** torch.randint(-3, 2, (entries, 1))
    rows[-3:], values[-3:] = 0, 0
    return torch.sparse_coo_tensor(rows[None], values, (ROWS, WIDTH), check_invariants=True)


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(ROWS, WIDTH)), nn.Parameter(torch.randn(4, 2))


@pytest.mark.parametrize("on_device", [False, True], ids=["rate a float", "rate a tensor"])
@pytest.mark.parametrize("betas", [BETAS, (0.0, 0.9)])
def test_each_row_has_its_own_adam(on_device: bool, betas: tuple[float, float]) -> None:
    table, dense = parameters()
    expected, usual = Reference(table, betas), copy.deepcopy(dense)
    optimizer = LazyAdam([table, dense], lr=torch.tensor(0.1) if on_device else 0.1, betas=betas)
    other = torch.optim.Adam([usual], lr=0.1, betas=betas, fused=True)
    generator = torch.Generator().manual_seed(1)
    for number in range(200):
        rate = 0.1 * 0.99**number
        for group in (optimizer.param_groups[0], other.param_groups[0]):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        gradient = draw(generator)
        table.grad, dense.grad = gradient, torch.randn(4, 2, generator=generator)
        usual.grad = dense.grad.clone()
        optimizer.step()
        other.step()
        expected.step(gradient.to_dense(), rate)
    assert optimizer.state[table]["step"].tolist() == expected.steps
    # Relative to a row's largest entry, because steps of different rates may cancel.
    scale = expected.table.abs().amax(1, keepdim=True).clamp(min=0.1)
    assert ((table.detach().double() - expected.table) / scale).abs().max() <= 1e-6
    for name, moment in (("exp_avg", expected.first), ("exp_avg_sq", expected.second)):
        torch.testing.assert_close(optimizer.state[table][name].double(), moment, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense, usual, rtol=1e-6, atol=1e-7)


def test_rows_that_a_gradient_does_not_touch_stay_to_the_bit() -> None:
    table, _ = parameters()
    optimizer = LazyAdam([table], lr=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        table.grad = draw(generator)
        optimizer.step()
    before = {"table": table.detach().clone()} | {name: value.clone() for name, value in optimizer.state[table].items()}
    rows, values = torch.tensor([[4, 0, 7, 0, 7, 9]]), torch.zeros(6, WIDTH)
    values[0], values[2], values[4] = 1.0, 2.0, -2.0
    table.grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=True)
    optimizer.step()
    after = {"table": table.detach()} | optimizer.state[table]
    for name, value in before.items():
        changed = (after[name] != value).reshape(ROWS, -1).any(1)
        assert changed.nonzero().flatten().tolist() == [4], f"{name}: entries of row 7 add up to zero"


def test_gradients_that_are_accumulated_are_one_gradient() -> None:
    tables = [parameters()[0] for _ in range(2)]
    optimizers = [LazyAdam([table], lr=0.1) for table in tables]
    rows = [torch.tensor([1, 5, 5]), torch.tensor([5, 2, 1])]
    for _ in range(3):
        for table, optimizer, parts in zip(tables, optimizers, (rows, [torch.cat(rows)]), strict=True):
            optimizer.zero_grad()
            for part in parts:
                nn.functional.embedding(part, table, sparse=True).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-7)


def test_no_entries_are_no_step() -> None:
    table, _ = parameters()
    before = table.detach().clone()
    optimizer = LazyAdam([table])
    table.grad = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, WIDTH), table.shape, check_invariants=True
    )
    optimizer.step()
    assert torch.equal(table, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    table, expected = nn.Parameter(parameters()[0].detach().to(dtype)), Reference(parameters()[0].to(dtype))
    optimizer = LazyAdam([table], lr=0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        table.grad = draw(generator).to(dtype)
        optimizer.step()
        # Entries of one row are summed before rounding.
        expected.step(table.grad.double().to_dense(), 0.1)
    assert {value.dtype for name, value in optimizer.state[table].items() if name != "step"} == {dtype}
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(table.detach().double(), expected.table, rtol=tolerance, atol=tolerance)


def test_a_row_whose_gradient_is_not_finite_shows_it() -> None:
    table, _ = parameters()
    values = torch.full((1, WIDTH), torch.nan)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[3]]), values, table.shape, check_invariants=True)
    LazyAdam([table]).step()
    assert table.isfinite().all(1).logical_not().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("bad", [None, "table", "dense"])
def test_a_scaler_unscales_all_gradients_or_skips_all_parameters(bad: str | None) -> None:
    scaled, plain = parameters(), parameters()
    optimizers = [LazyAdam(both, lr=0.1) for both in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    rows = torch.tensor([5, 2, 5, 0])

    def loss(table: Tensor, dense: Tensor) -> Tensor:
        return nn.functional.embedding(rows, table, sparse=True).square().sum() + dense.square().sum()

    def scaled_step(spoiled: str | None) -> None:
        optimizers[0].zero_grad()
        scaler.scale(loss(*scaled)).backward()
        if spoiled == "table":
            scaled[0].grad._values()[1, 0] = torch.inf  # type: ignore[union-attr]
        if spoiled == "dense":
            scaled[1].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizers[0])
        scaler.update()

    def plain_step() -> None:
        optimizers[1].zero_grad()
        loss(*plain).backward()
        optimizers[1].step()

    for number in range(4):
        if number == 2 and bad is not None:
            before = [one.detach().clone() for one in scaled]
            state = copy.deepcopy(optimizers[0].state_dict()["state"])
            scaled_step(bad)
            assert all(map(torch.equal, before, scaled))
            for place, values in optimizers[0].state_dict()["state"].items():
                for name, value in values.items():
                    assert torch.equal(value, state[place][name]), (place, name)
            assert scaler.get_scale() == 128.0
        scaled_step(None)
        plain_step()
    for mine, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_its_state_loads_into_another_optimizer() -> None:
    table, dense = parameters()
    optimizer = LazyAdam([table, dense], lr=0.1)
    generator = torch.Generator().manual_seed(4)

    def step(one: LazyAdam, table: nn.Parameter, dense: nn.Parameter, gradient: Tensor) -> None:
        table.grad, dense.grad = gradient.clone(), torch.ones(4, 2)
        one.step()

    for _ in range(3):
        step(optimizer, table, dense, draw(generator))
    copies = [nn.Parameter(one.detach().clone()) for one in (table, dense)]
    other = LazyAdam(copies, lr=0.3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        gradient = draw(generator)
        step(optimizer, table, dense, gradient)
        step(other, copies[0], copies[1], gradient)
    assert torch.equal(table, copies[0])
    assert torch.equal(dense, copies[1])
    assert other.state[copies[0]]["step"].dtype == torch.float32


def test_hooks_of_a_step_run_once() -> None:
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    table, _ = parameters()
    optimizer, seen = LazyAdam([table]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    table.grad = draw(torch.Generator().manual_seed(0))
    optimizer.step()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("setting", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
def test_settings_without_a_lazy_rule_are_refused(setting: dict[str, Any]) -> None:
    table, dense = parameters()
    (name,) = setting
    optimizer = LazyAdam([{"params": [table, dense], **setting}])
    table.grad = draw(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"^{name} is .* put that parameter into a group of its own, without {name}"):
        optimizer.step()
    apart = LazyAdam([{"params": [table]}, {"params": [dense], **setting}])
    dense.grad = torch.ones(4, 2)
    apart.step()


def test_gradients_that_change_their_layout_are_refused() -> None:
    table, _ = parameters()
    sparse = draw(torch.Generator().manual_seed(0))
    for first, then in ((sparse, sparse.to_dense()), (sparse.to_dense(), sparse)):
        optimizer = LazyAdam([table])
        table.grad = first
        optimizer.step()
        table.grad = then
        with pytest.raises(RuntimeError, match=r"shape \(12, 3\) has a (sparse|dense) gradient, but had"):
            optimizer.step()


def test_an_eps_of_zero_is_refused() -> None:
    table, _ = parameters()
    table.grad = draw(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"eps must be above 0 for a parameter with sparse gradients, not 0\.0"):
        LazyAdam([table], eps=0.0).step()


def test_two_sparse_dimensions_are_refused() -> None:
    table, _ = parameters()
    table.grad = torch.ones(ROWS, WIDTH).to_sparse()
    with pytest.raises(ValueError, match="must have 1 sparse dimension, not 2"):
        LazyAdam([table]).step()


class NothingDependsOnValues(TorchDispatchMode):
    """A dispatch mode that fails if an operation reads values on the host, or if its result's shape depends on them."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.forbidden), f"{name} waits for the device"
        assert name != "index" or all(one is None or one.dtype != torch.bool for one in args[1]), "indexed by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_can_be_captured(duplicates: str, scaled: bool) -> None:
    table, _ = parameters()
    optimizer: Any = LazyAdam([table], lr=torch.tensor(0.1))
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    generator = torch.Generator().manual_seed(5)
    table.grad = draw(generator)
    optimizer.step()
    table.grad = draw(generator)
    if duplicates == "host":
        with NothingDependsOnValues(), pytest.raises(AssertionError, match="nonzero waits for the device"):
            optimizer.step()
    else:
        with NothingDependsOnValues():
            optimizer.step()
