"""Tests of copies and state dicts of an expert bank, and of optimizers that continue after loading."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from xsmoe.nn import ExpertBank, XSMoE
from xsmoe_kernels import FrozenExperts, side_moe

HIDDEN = torch.randn(16, 3, 6, generator=torch.Generator().manual_seed(1))


def through_a_file(bank: ExpertBank) -> ExpertBank:
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, ExpertBank)
    return loaded


def averaged(bank: ExpertBank) -> ExpertBank:
    module = torch.optim.swa_utils.AveragedModel(bank).module
    assert isinstance(module, ExpertBank)
    return module


def used_bank() -> ExpertBank:
    """Return a bank with cached frozen experts."""
    torch.manual_seed(0)
    bank = ExpertBank(32, 4, 3).eval()
    bank.expand()
    bank(torch.randn(5, 32), torch.randn(5, 32))
    return bank


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank)), through_a_file, averaged],
    ids=["deepcopy", "pickle", "torch.save", "AveragedModel"],
)
def test_a_copy_notices_changes_of_its_frozen_experts(copied: Callable[[ExpertBank], ExpertBank]) -> None:
    bank = used_bank()
    x, backbone = torch.randn(5, 32), torch.randn(5, 32)
    twin = copied(bank)
    assert torch.equal(twin(x, backbone), bank(x, backbone))
    prepacked = [one.frozen_experts().pack() for one in (twin, bank)]
    assert (prepacked[0] is None) == (prepacked[1] is None), "the copy must use prepacked weights too"
    with torch.no_grad():
        twin.frozen_down.mul_(50)
    fresh = FrozenExperts(twin.frozen_down.clone(), twin.frozen_up.clone())
    changed = twin(x, backbone)
    assert torch.equal(changed, side_moe(x, backbone, twin.router, twin.down, twin.up, frozen=fresh))
    assert not torch.equal(changed, bank(x, backbone))


def test_an_average_copies_frozen_experts_that_changed() -> None:
    bank = used_bank()
    x, backbone = torch.randn(5, 32), torch.randn(5, 32)
    average = torch.optim.swa_utils.AveragedModel(bank)
    average.module(x, backbone)
    with torch.no_grad():
        bank.frozen_up.copy_(torch.randn_like(bank.frozen_up))
    average.update_parameters(bank)
    assert torch.equal(average.module(x, backbone), bank(x, backbone))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"router": (9, 6)},
            "bank.router has 9 rows, but bank.frozen_down and bank.down hold 3 and 1 experts, which need 5",
        ),
        ({"down": (2, 3, 6)}, "bank.down holds 2 experts, but bank.up holds 1"),
        ({"frozen_up": (2, 3, 6)}, "bank.frozen_down holds 3 experts, but bank.frozen_up holds 2"),
        (
            {"router": (1, 6)} | dict.fromkeys(("down", "up", "frozen_down", "frozen_up"), (0, 3, 6)),
            "bank.router has 1 rows, but bank.frozen_down and bank.down hold 0 and 0 experts, at least one is needed",
        ),
        (dict.fromkeys(("down", "up"), (1, 2, 6)), "size mismatch for bank.down"),
        (
            {"router": (0, 6)},
            "bank.router has 0 rows, but bank.frozen_down and bank.down hold 3 and 1 experts, which need 5",
        ),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_an_inconsistent_state_dict_is_refused_and_resizes_nothing(
    change: dict[str, tuple[int, ...]], message: str, strict: bool
) -> None:
    source = ExpertBank(6, 3, num_experts=3)
    source.expand()
    state = source.state_dict() | {name: torch.zeros(shape) for name, shape in change.items()}
    holder = nn.ModuleDict({"bank": ExpertBank(6, 3, num_experts=2)})
    with pytest.raises(RuntimeError, match=message):
        holder.load_state_dict({f"bank.{name}": value for name, value in state.items()}, strict=strict)
    bank = holder["bank"]
    assert (bank.num_experts, bank.num_frozen) == (2, 0)
    assert bank(torch.randn(5, 6), torch.randn(5, 6)).isfinite().all()


def test_a_part_that_does_not_fit_the_rest_is_refused() -> None:
    source, bank = ExpertBank(6, 3, num_experts=4), ExpertBank(6, 3, num_experts=2)
    with pytest.raises(RuntimeError, match="router has 5 rows, but .* hold 0 and 2 experts, which need 3"):
        bank.load_state_dict({"router": source.router}, strict=False)


def grown() -> XSMoE:
    """Return a network whose levels have three experts, two of them frozen."""
    torch.manual_seed(2)
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    model.expand()
    model.expand()
    return model


def loss_of(model: XSMoE) -> torch.Tensor:
    return functional.mse_loss(model({"text": HIDDEN}), HIDDEN[:, 0, :4])


def train(model: XSMoE, optimizer: torch.optim.Optimizer, steps: int) -> torch.Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    return loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("assign", [False, True])
def test_loading_other_experts_keeps_the_parameters_of_an_optimizer(build: Any, assign: bool) -> None:
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    # As long as a loss exists, autograd keeps the old shapes.
    loss = loss_of(model)
    loss.backward()
    optimizer = build(model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    model.load_state_dict(grown().state_dict(), assign=assign)
    assert model.sides["text"].num_experts == [3, 3]
    if assign:
        optimizer = build(model.parameters())
    else:
        assert {id(p): name for name, p in model.named_parameters()} == names
        assert all(p.grad is None for name, p in model.named_parameters() if name.endswith("router"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_model_and_optimizer_that_load_both_train_as_if_uninterrupted(build: Any) -> None:
    model = grown()
    optimizer = build(model.parameters())
    train(model, optimizer, 3)
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    other = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    others = build(other.parameters())
    alive = train(other, others, 2)
    other.load_state_dict(weights)
    others.load_state_dict(moments)
    assert torch.equal(train(model, optimizer, 3), train(other, others, 3))
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert alive.requires_grad


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("experts", [1, 5])
def test_state_of_other_experts_is_refused_ahead_of_the_step(build: Any, experts: int) -> None:
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4, num_experts=3)
    optimizer = build(model.parameters())
    train(model, optimizer, 2)
    model.load_state_dict(XSMoE(("text",), dim=6, rank=3, out_dim=4, num_experts=experts).state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"has shape .*; load the optimizer's state too, with optimizer\.load_st"
        ):
            train(model, optimizer, 1)
    assert [name for name, p in model.named_parameters() if not torch.equal(p, before[name])] == []


def test_every_load_of_other_experts_checks_the_optimizer_state() -> None:
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for experts in (2, 3):
        optimizer.state.clear()
        model.load_state_dict(XSMoE(("text",), dim=6, rank=3, out_dim=4, num_experts=experts).state_dict())
        train(model, optimizer, 2)
    model.load_state_dict(XSMoE(("text",), dim=6, rank=3, out_dim=4, num_experts=4).state_dict())
    with pytest.raises(RuntimeError, match="load the optimizer's state too"):
        train(model, optimizer, 1)


def test_hooks_on_a_parameter_survive_another_number_of_experts() -> None:
    bank, called = ExpertBank(6, 3), []
    bank.router.register_hook(lambda grad: called.append(tuple(grad.shape)))
    bank.load_state_dict(ExpertBank(6, 3, 4).state_dict())
    bank(torch.randn(5, 6), torch.randn(5, 6)).sum().backward()
    assert called == [(5, 6)]
