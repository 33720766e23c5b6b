"""Sparse routing: equal to a softmax over the backbone and the chosen experts, and to the dense mixture at k = E."""

import pytest
import torch
from torch.nn import functional

from xsmoe.nn import ExpertBank, XSMoE


def bank_of(top_k: int | None, dtype: torch.dtype = torch.float32) -> ExpertBank:
    torch.manual_seed(0)
    bank = ExpertBank(6, 3, num_experts=2, top_k=top_k)
    bank.expand()
    bank.expand()
    with torch.no_grad():
        for tensor in (bank.router, bank.down, bank.up, bank.frozen_down, bank.frozen_up):
            tensor.copy_(torch.randn_like(tensor) * 0.5)
    return bank.to(dtype)


@pytest.mark.parametrize("rows", [5, 1])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_value_and_counters_against_loops(k: int, rows: int) -> None:
    bank, weight = bank_of(k), torch.tensor([1.0, 2, 3, 4, 0])
    x, backbone = torch.randn(rows, 6), torch.randn(5, 6)
    down, up = torch.cat([bank.frozen_down, bank.down]), torch.cat([bank.frozen_up, bank.up])
    expected, norm, gate = torch.zeros(5, 6), torch.zeros(5), torch.zeros(5)
    for n in range(5):
        row = x[n % rows]
        logits = bank.router @ row
        chosen = logits[1:].topk(k).indices.tolist()
        gates = torch.cat([logits[:1], logits[1:][chosen]]).softmax(0)
        outputs = [backbone[n]] + [row + functional.gelu(down[e] @ row) @ up[e] for e in chosen]
        for branch, g, output in zip([0, *(e + 1 for e in chosen)], gates, outputs, strict=True):
            expected[n] += g * output
            norm[branch] += weight[n] * g * output.norm()
            gate[branch] += weight[n] * g
    torch.testing.assert_close(bank(x, backbone, weight), expected)
    torch.testing.assert_close(bank.utilization.norm.float(), norm)
    torch.testing.assert_close(bank.utilization.gate.float(), gate)


def test_all_experts_chosen_is_the_dense_mixture() -> None:
    x, backbone = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    results = []
    for top_k in (None, 4, 9):
        bank = bank_of(top_k, torch.float64)
        bank.utilization.reset()
        y = bank(x, backbone)
        gradients = torch.autograd.grad(y.square().sum(), [bank.router, bank.down, bank.up])
        results.append((y, *gradients, bank.utilization.norm, bank.utilization.gate))
    for sparse in results[1:]:
        for mine, dense in zip(sparse, results[0], strict=True):
            torch.testing.assert_close(mine, dense, rtol=1e-6, atol=1e-9)


def test_frozen_experts_take_no_gradient_and_rows_do() -> None:
    bank = bank_of(2, torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    backbone = torch.randn(5, 6, dtype=torch.float64)
    bank(x, backbone).sum().backward()
    assert x.grad is not None
    assert bank.down.grad is not None
    assert bank.frozen_down.grad is None
    assert torch.autograd.gradcheck(lambda x: bank(x, backbone), x)


def test_no_rows_and_a_whole_model() -> None:
    assert bank_of(2)(torch.zeros(0, 6), torch.zeros(0, 6)).shape == (0, 6)
    model = XSMoE(("a", "b"), dim={"a": 6, "b": 4}, rank=2, out_dim=3, top_k=1)
    model.expand()
    hidden = {"a": [torch.randn(1, 6), torch.randn(4, 6), torch.randn(4, 6)], "b": torch.randn(4, 3, 4)}
    model(hidden).sum().backward()
    assert model(hidden).shape == (4, 3)
    assert {bank.top_k for _, _, bank in model.banks()} == {1}
