"""Tests of optimizers that support growth, and of those that do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from xsmoe.nn import ExpertBank, XSMoE

LR = 1e-3


@pytest.mark.parametrize(
    "build",
    [
        lambda parameters: torch.optim.Adam(parameters, LR),
        lambda parameters: torch.optim.Adam(parameters, LR, amsgrad=True, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, LR, weight_decay=0.0, foreach=True),
        lambda parameters: torch.optim.NAdam(parameters, LR),
        lambda parameters: torch.optim.RAdam(parameters, LR),
    ],
    ids=["Adam", "AMSGrad", "AdamW", "NAdam", "RAdam"],
)
def test_steps_of_a_new_gate_row_are_as_large_as_those_of_old_rows(build: Callable[..., torch.optim.Optimizer]) -> None:
    bank = ExpertBank(8, 2)
    optimizer = build(bank.parameters())

    def step() -> torch.Tensor:
        before = bank.router.detach().clone()
        optimizer.zero_grad()
        sum(p.sum() for p in bank.parameters()).backward()
        optimizer.step()
        return (bank.router.detach() - before).abs() / LR

    for _ in range(1000):
        step()
    bank.expand(optimizer)
    sizes = torch.stack([step() for _ in range(30)])
    assert sizes.max() <= 1.5
    assert sizes[-1].min() >= 0.5


def test_an_optimizer_that_keeps_parameters_elsewhere_is_refused_untouched() -> None:
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    optimizer = torch.optim.LBFGS(model.parameters())
    before = [id(p) for p in model.parameters()]
    for grow in (model.expand, lambda optimizer: model.prune(0.1, optimizer)):
        with pytest.raises(
            ValueError, match="optimizer is LBFGS, which keeps parameters in _params .* build a new LBFGS"
        ):
            grow(optimizer)
    assert [id(p) for p in model.parameters()] == before
    elsewhere = nn.Linear(2, 2)
    model.expand([torch.optim.Adam(model.parameters()), torch.optim.LBFGS(elsewhere.parameters())])
    assert model.sides["text"].num_experts == [2, 2]


def schedule() -> Any:
    return torch.optim.lr_scheduler.ConstantLR(torch.optim.Adam(nn.Linear(2, 2).parameters()))


@pytest.mark.parametrize(
    "optimizer, message",
    [
        ("adam", "optimizer must be a torch.optim.Optimizer, a list of them, or None, not str"),
        (schedule(), "or None, not ConstantLR; pass its .optimizer"),
        (torch.optim.Adam, "or None, not type"),
        ({}, "or None, not dict"),
        (["adam"], "or None, not a list with str"),
    ],
    ids=["str", "scheduler", "type", "dict", "list"],
)
def test_arguments_that_are_no_optimizer_are_named(optimizer: Any, message: str) -> None:
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    bank = model.sides["text"].levels()[0]
    for grow in (model.expand, bank.expand, lambda given: model.prune(0.1, given)):
        with pytest.raises(TypeError, match=message):
            grow(optimizer)
    assert model.sides["text"].num_experts == [1, 1]
