"""Tests of the expert bank and the side network: values, growth, counters, state dicts, torch's optimizers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from xsmoe.nn import ExpertBank, SideMoE, XSMoE


def naive(bank: ExpertBank, x: torch.Tensor, backbone: torch.Tensor) -> torch.Tensor:
    down, up = torch.cat([bank.frozen_down, bank.down]), torch.cat([bank.frozen_up, bank.up])
    x = x.expand_as(backbone)
    outputs = [backbone] + [x + functional.gelu(x @ d.T) @ u for d, u in zip(down, up, strict=True)]
    gates = (x @ bank.router.T).softmax(1)
    return sum(gates[:, e, None] * output for e, output in enumerate(outputs))


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.numel() and tensor.dtype == torch.float32:
                tensor.copy_(torch.randn_like(tensor) * 0.3)


@pytest.fixture
def bank() -> ExpertBank:
    torch.manual_seed(0)
    bank = ExpertBank(6, 3, num_experts=2)
    bank.expand()
    bank.expand()
    randomise(bank)
    return bank


def test_bank_is_the_published_mixture(bank: ExpertBank) -> None:
    x, backbone = torch.randn(5, 6), torch.randn(5, 6)
    torch.testing.assert_close(bank(x, backbone), naive(bank, x, backbone))
    torch.testing.assert_close(bank(x[:1], backbone), naive(bank, x[:1], backbone))


def test_initial_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    bank = ExpertBank(400, 64, num_experts=4)
    assert bank.down.std().item() == pytest.approx(0.01, rel=0.02)
    assert bank.up.std().item() == pytest.approx(0.01, rel=0.02)
    assert bank.router.abs().max().item() <= 1 / 20
    assert bank.router.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_expand_freezes_and_adds_the_mean(bank: ExpertBank) -> None:
    down, router = torch.cat([bank.frozen_down, bank.down]), bank.router.detach().clone()
    assert (bank.num_experts, bank.num_frozen) == (4, 3)
    bank.expand()
    assert (bank.num_experts, bank.num_frozen) == (5, 4)
    torch.testing.assert_close(bank.frozen_down, down)
    torch.testing.assert_close(bank.down[0], down.mean(0))
    torch.testing.assert_close(bank.router[:-1], router)
    assert bank.router[-1].abs().max() <= 6**-0.5
    assert {name for name, _ in bank.named_parameters()} == {"router", "down", "up"}
    assert bank.utilization.num_experts == 5


def test_expand_with_the_mean_gate(bank: ExpertBank) -> None:
    mean = bank.router[1:].mean(0)
    bank.expand(new_gate="mean")
    torch.testing.assert_close(bank.router[-1], mean)
    with pytest.raises(ValueError, match="new_gate must be one of random, mean, copy, not 'zero'"):
        bank.expand(new_gate="zero")  # type: ignore[arg-type]


def test_expand_draws_its_gate_from_the_generator() -> None:
    rows = []
    for _ in range(2):
        bank = ExpertBank(6, 3)
        bank.expand(generator=torch.Generator().manual_seed(7))
        rows.append(bank.router[-1].detach())
    assert torch.equal(*rows)


@pytest.mark.parametrize("expert", range(4))
def test_prune_drops_the_least_used(bank: ExpertBank, expert: int) -> None:
    x, backbone = torch.randn(5, 6), torch.randn(5, 6)
    bank.utilization.norm[1:] = torch.tensor([3.0, 4.0, 5.0, 6.0])
    bank.utilization.norm[expert + 1] = 0.5
    kept = [e for e in range(4) if e != expert]
    router = bank.router[[0] + [e + 1 for e in kept]].detach()
    down = torch.cat([bank.frozen_down, bank.down])[kept].detach()
    dropped = bank.prune(0.1)
    assert dropped is not None
    assert dropped[0] == expert
    assert dropped[1] == pytest.approx(0.5 / (18.5 - (3 + expert)))
    torch.testing.assert_close(bank.router, nn.Parameter(router))
    torch.testing.assert_close(torch.cat([bank.frozen_down, bank.down]), down)
    assert bank.num_frozen == (2 if expert < 3 else 3)
    torch.testing.assert_close(bank(x, backbone), naive(bank, x, backbone))


def test_prune_leaves_used_single_and_uncounted_experts(bank: ExpertBank) -> None:
    assert bank.prune(1.0) is None, "no rows were counted"
    bank.utilization.norm[1:] = torch.tensor([3.0, 4.0, 5.0, 6.0])
    assert bank.prune(0.1) is None
    with pytest.raises(ValueError, match="threshold must be a share between 0 and 1, not 10"):
        bank.prune(10)
    single = ExpertBank(6, 3)
    single.utilization.norm[0] = 5.0
    assert single.prune(1.0) is None


def test_prune_refuses_counters_that_are_not_finite(bank: ExpertBank) -> None:
    x, backbone = torch.randn(5, 6), torch.randn(5, 6)
    bank(x, backbone)
    bank(x.fill_(float("nan")), backbone)
    state = {name: value.clone() for name, value in bank.state_dict().items()}
    with pytest.raises(ValueError, match=r"bank\.utilization is not finite.* call reset_utilization\(\)"):
        bank.prune(1.0)
    torch.testing.assert_close(bank.state_dict(), state, equal_nan=True)
    bank.utilization.reset()
    assert bank.prune(1.0) is None
    bank(torch.randn(5, 6), backbone)
    assert bank.prune(1.0) is not None
    single = ExpertBank(6, 3)
    single(x, backbone)
    assert single.prune(1.0) is None


def test_counters_grow_in_training_only(bank: ExpertBank) -> None:
    x, backbone = torch.randn(5, 6), torch.randn(5, 6)
    bank.eval()(x, backbone)
    assert bank.utilization.gate.sum() == 0
    bank.train()(x, backbone, torch.full((5,), 3.0))
    assert bank.utilization.gate.sum().item() == pytest.approx(15)
    bank.count_in_eval = True
    bank.eval()(x, backbone)
    assert bank.utilization.gate.sum().item() == pytest.approx(20)


def test_state_dict_loads_into_another_number_of_experts(bank: ExpertBank) -> None:
    x, backbone = torch.randn(5, 6), torch.randn(5, 6)
    bank(x, backbone)
    fresh = ExpertBank(6, 3)
    fresh.load_state_dict(bank.state_dict())
    assert (fresh.num_experts, fresh.num_frozen) == (4, 3)
    torch.testing.assert_close(fresh(x, backbone), bank(x, backbone))
    fresh.load_state_dict(bank.state_dict())
    torch.testing.assert_close(fresh.utilization.norm, bank.utilization.norm)
    assert fresh.down.requires_grad
    with pytest.raises(RuntimeError, match="size mismatch"):
        ExpertBank(7, 3).load_state_dict(bank.state_dict())
    with pytest.raises(RuntimeError, match=r"utilization\.norm"):
        ExpertBank(6, 3).load_state_dict({k: v for k, v in bank.state_dict().items() if k != "utilization.norm"})


def test_a_partial_load_keeps_the_counters() -> None:
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    model({"text": torch.randn(5, 3, 6)})
    counted = model.sides["text"].levels()[0].utilization.norm.clone()
    model.load_state_dict({"projection.bias": torch.zeros(4)}, strict=False)
    assert torch.equal(model.sides["text"].levels()[0].utilization.norm, counted)


def test_built_on_meta_and_materialised() -> None:
    with torch.device("meta"):
        model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    real = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    hidden = {"text": torch.randn(5, 3, 6)}
    assert torch.equal(model(hidden), real(hidden))
    assert model.sides["text"].levels()[0].utilization.norm.device.type == "cpu"


def test_a_cast_keeps_the_counters_precise(bank: ExpertBank) -> None:
    bank(torch.randn(5, 6), torch.randn(5, 6))
    before = bank.utilization.norm.clone()
    bank.to(torch.bfloat16)
    assert bank.frozen_down.dtype == torch.bfloat16
    assert torch.equal(bank.utilization.norm, before)
    y = bank(torch.randn(5, 6, dtype=torch.bfloat16), torch.randn(5, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_loading_in_place_reaches_the_frozen_experts(bank: ExpertBank) -> None:
    x, backbone = torch.randn(5, 6), torch.randn(5, 6)
    bank(x, backbone)
    assert bank.frozen_experts() is bank.frozen_experts()
    state = {name: value.clone() for name, value in bank.state_dict().items()}
    state["frozen_down"] += 1
    bank.load_state_dict(state)
    torch.testing.assert_close(bank(x, backbone), naive(bank, x, backbone))


@pytest.mark.parametrize(
    "build", [torch.optim.Adam, torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)]
)
def test_an_optimizer_of_torch_continues_after_growth(build) -> None:
    torch.manual_seed(0)
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    hidden, goal = {"text": torch.randn(32, 3, 6)}, torch.randn(32, 4)
    optimizer = build(model.parameters())

    def train(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(hidden), goal)
            loss.backward()
            optimizer.step()
        return loss.item()

    train(3)
    bank = model.sides["text"].levels()[0]
    router_state = {key: value.clone() for key, value in optimizer.state[bank.router].items() if value is not None}
    projection_state = optimizer.state[model.projection.weight]
    done = model.expand(optimizer)
    assert [(e.level, e.num_experts, e.num_frozen) for e in done["text"]] == [(0, 2, 1), (1, 2, 1)]
    for key, value in router_state.items():
        carried = optimizer.state[bank.router][key]
        torch.testing.assert_close(carried[:2] if value.dim() else carried, value)
        if value.dim():
            torch.testing.assert_close(carried[2], value[1] if key == "exp_avg_sq" else torch.zeros(6))
    assert optimizer.state[model.projection.weight] is projection_state
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}

    new, frozen = bank.down.detach().clone(), bank.frozen_down.clone()
    gate = bank.router.detach().clone()
    before = functional.mse_loss(model(hidden), goal).item()
    assert train(20) < before
    assert not torch.equal(bank.down, new)
    assert not torch.equal(bank.router[2], gate[2])
    assert torch.equal(bank.frozen_down, frozen)

    bank.utilization.reset()
    bank.utilization.norm[1:] = torch.tensor([1.0, 100.0])
    dropped = model.prune(0.1, optimizer)["text"][0]
    assert (dropped.level, dropped.expert) == (0, 0)
    assert bank.num_experts == 1
    last = bank.down.detach().clone()
    train(3)
    assert not torch.equal(bank.down, last)


def test_an_optimizer_that_lacks_the_experts_is_refused_untouched() -> None:
    model = XSMoE(("text",), dim=6, rank=3, out_dim=4)
    parts = [torch.optim.Adam(model.projection.parameters()), torch.optim.Adam(model.sides.parameters())]
    before = [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"optimizer does not hold sides\.text\.banks\.0\.router"):
        model.expand(parts[0])
    assert [id(p) for p in model.parameters()] == before
    model.expand(parts)
    assert model.sides["text"].num_experts == [2, 2]


def test_a_side_network_runs_level_by_level() -> None:
    torch.manual_seed(0)
    side = SideMoE(6, 3, num_levels=2, num_experts=[1, 3])
    assert side.num_experts == [1, 3]
    randomise(side)
    hidden = torch.randn(5, 3, 6)
    low, high = side.levels()
    expected = naive(high, naive(low, hidden[:, 0], hidden[:, 1]), hidden[:, 2])
    torch.testing.assert_close(side(hidden), expected)
    torch.testing.assert_close(side(list(hidden.unbind(1))), expected)
    constant = [hidden[:1, 0], hidden[:, 1], hidden[:, 2]]
    torch.testing.assert_close(side(constant), side([constant[0].expand(5, -1), *constant[1:]]))
    middle = [hidden[:, 0], hidden[:1, 1], hidden[:, 2]]
    torch.testing.assert_close(side(middle), side([middle[0], middle[1].expand(5, -1), middle[2]]))
    assert side(hidden[:0]).shape == (0, 6)


def test_from_published_loads_the_published_weights() -> None:
    from bench.paper.model import SideNetwork

    torch.manual_seed(0)
    published = SideNetwork(6, 3, 2, num_experts=3)
    randomise(published)
    side = SideMoE.from_published(published.state_dict(), num_frozen=2)
    assert [bank.num_frozen for bank in side.levels()] == [2, 2]
    hidden = torch.randn(7, 3, 6)
    torch.testing.assert_close(side(hidden), published(hidden))


def test_from_ladder_is_a_deprecated_alias() -> None:
    state = {
        "routers.0.linear.weight": torch.randn(2, 6),
        "moes.0.experts.0.fc_down.weight": torch.randn(3, 6),
        "moes.0.experts.0.fc_up.weight": torch.randn(6, 3),
    }
    hidden = torch.randn(4, 2, 6)
    with pytest.warns(DeprecationWarning, match=r"from_ladder is deprecated; call SideMoE\.from_published") as seen:
        side = SideMoE.from_ladder(state, num_frozen=1)
    assert [Path(warning.filename) for warning in seen] == [Path(__file__)]
    assert [bank.num_frozen for bank in side.levels()] == [1]
    assert torch.equal(side(hidden), SideMoE.from_published(state, num_frozen=1)(hidden))


def test_from_published_names_keys_that_do_not_fit() -> None:
    from bench.paper.model import SideNetwork

    state = SideNetwork(6, 3, 1).state_dict()
    with pytest.raises(ValueError, match=r"lacks 'routers\.0\.linear\.weight'; it has no keys"):
        SideMoE.from_published({})
    with pytest.raises(ValueError, match=r"that the published module lacks: extra"):
        SideMoE.from_published(state | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"fc_up\.weight must have shape \(6, 3\), not \(3, 6\)"):
        SideMoE.from_published(state | {"moes.0.experts.0.fc_up.weight": torch.zeros(3, 6)})
    with pytest.raises(ValueError, match="num_frozen = 2"):
        SideMoE.from_published(state, num_frozen=2)
    with pytest.raises(ValueError, match=r"expected \(E \+ 1, 6\) with E at least 1"):
        SideMoE.from_published(state | {"routers.0.linear.weight": torch.zeros(1, 6)})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dim": 0}, "dim must be at least 1, not 0"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"num_levels": 0}, "num_levels must be at least 1, not 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, not 0"),
        ({"num_experts": [1]}, "num_experts must be one number or 2 of them"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_bad_sizes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SideMoE(**{"dim": 6, "rank": 3, "num_levels": 2, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dim": 8.0}, "dim must be an int, not float"),
        ({"rank": "3"}, "rank must be an int, not str"),
        ({"num_experts": True}, "num_experts must be an int, not bool"),
        ({"top_k": torch.tensor(2)}, "top_k must be an int, not Tensor"),
    ],
)
def test_sizes_of_other_types_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ExpertBank(**{"dim": 6, "rank": 3, **arguments})


def test_sizes_may_be_numpy_integers() -> None:
    bank = ExpertBank(np.int64(6), np.int32(3), np.int64(2), top_k=np.int64(1))
    assert {type(size) for size in (bank.dim, bank.rank, bank.top_k)} == {int}
    assert bank(torch.randn(5, 6), torch.randn(5, 6)).shape == (5, 6)


@pytest.mark.parametrize(
    "hidden, message",
    [
        (torch.zeros(5, 6), r"not a Tensor of shape \(5, 6\)"),
        (torch.zeros(5, 2, 6), "has 2 levels"),
        ([torch.zeros(5, 6), torch.zeros(5, 6), torch.zeros(5, 7)], r"level 2 has shape \(5, 7\)"),
        ([torch.zeros(5, 6), torch.zeros(4, 6), torch.zeros(5, 6)], r"same number of items .* not \[4, 5\]"),
    ],
)
def test_bad_hidden_states_are_named(hidden: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SideMoE(6, 3, 2)(hidden)  # type: ignore[arg-type]
