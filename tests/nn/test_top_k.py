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


BAD = [
    ({"row_weight": torch.ones(1)}, ValueError, r"row_weight must have shape \(4,\), not \(1,\)"),
    ({"row_weight": torch.ones(4, dtype=torch.int64)}, TypeError, "row_weight must be float32, .* not torch.int64"),
    ({"backbone": torch.zeros(1, 6)}, ValueError, "x must have the 1 rows of backbone, .* not 4"),
    ({"backbone": torch.zeros(4, 6).double()}, TypeError, "backbone is torch.float64, but x is torch.float32"),
    ({"backbone": torch.zeros(4, 6, device="meta")}, ValueError, "backbone is on meta, but x is on cpu"),
    ({"x": torch.zeros(2, 6)}, ValueError, "x must have the 4 rows of backbone, or a single row .* not 2"),
    ({"x": torch.zeros(4, 2, 6)}, ValueError, r"x must have shape \(N, D\), not \(4, 2, 6\)"),
    ({"x": torch.zeros(4, 5)}, ValueError, r"x must have shape \(N, 6\), not \(4, 5\)"),
    ({"x": [0.0]}, TypeError, "x must be a Tensor .* not list"),
]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_rows_are_named_as_the_dense_mixture_names_them(
    change: dict[str, object], error: type[Exception], message: str, top_k: int | None
) -> None:
    rows = {"x": torch.zeros(4, 6), "backbone": torch.zeros(4, 6), "row_weight": torch.ones(4)}
    bank = bank_of(top_k)
    with pytest.raises(error, match=message):
        bank(**{**rows, **change})
    assert not bank.utilization.gate.any()


@pytest.mark.parametrize("rows", [5, 1])
def test_autocast_casts_what_it_does_for_the_dense_mixture(rows: int) -> None:
    torch.manual_seed(1)
    x, backbone, found = torch.randn(rows, 6), torch.randn(5, 6).bfloat16(), []
    for top_k in (None, 4):
        bank = bank_of(top_k)
        with torch.autocast("cpu", torch.bfloat16):
            y = bank(x, backbone)
        assert y.dtype == torch.bfloat16
        found.append((y.detach().float(), bank.utilization.norm, bank.utilization.gate))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-2, atol=0)


def test_routes_on_the_meta_device() -> None:
    bank = bank_of(2).to("meta")
    y = bank(torch.zeros(1, 6, device="meta"), torch.zeros(5, 6, device="meta"))
    assert (y.shape, y.device.type) == ((5, 6), "meta")
