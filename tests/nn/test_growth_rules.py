"""Tests of growth that does not change the function: split experts, merged experts, and the gates' offset."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tests.nn.test_experts import naive, randomise
from xsmoe.nn import ExpertBank, Recommender, SideMoE, XSMoE
from xsmoe.nn.experts import PruneRule

DIM, RANK = 6, 3


def with_offset(bank: ExpertBank, x: torch.Tensor, backbone: torch.Tensor) -> torch.Tensor:
    """Compute the mixture by its definition."""
    assert bank.gate_offset is not None
    down, up = torch.cat([bank.frozen_down, bank.down]), torch.cat([bank.frozen_up, bank.up])
    x = x.expand_as(backbone)
    outputs = [backbone] + [x + functional.gelu(x @ d.T) @ u for d, u in zip(down, up, strict=True)]
    gates = (x @ bank.router.T + bank.gate_offset).softmax(1)
    return sum(gates[:, e, None] * output for e, output in enumerate(outputs))


def rows(count: int = 50, constant: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1 if constant else count, DIM), torch.randn(count, DIM)


def used(bank: ExpertBank, *shares: float) -> None:
    """Set the counters as if the experts had been used in these proportions."""
    bank.utilization.norm[1:] = torch.tensor(shares)
    bank.utilization.gate[1:] = torch.tensor(shares)


@pytest.fixture
def bank() -> ExpertBank:
    torch.manual_seed(0)
    bank = ExpertBank(DIM, RANK, num_experts=2)
    bank.expand()
    randomise(bank)
    return bank


@pytest.mark.parametrize("constant", [False, True], ids=["rows", "one row"])
@pytest.mark.parametrize("most", range(3))
def test_a_split_leaves_the_function_unchanged(bank: ExpertBank, most: int, constant: bool) -> None:
    x, backbone = rows(constant=constant)
    for _ in range(3):
        before, experts = bank(x, backbone), bank.num_experts
        down, row = torch.cat([bank.frozen_down, bank.down])[most], bank.router[most + 1].detach().clone()
        used(bank, *(9.0 if expert == most else 1.0 for expert in range(experts)))
        bank.expand(new_gate="copy")
        assert (bank.num_experts, bank.num_frozen) == (experts + 1, experts)
        assert torch.equal(bank.down[0], down)
        assert torch.equal(bank.router[-1], row)
        torch.testing.assert_close(bank(x, backbone), before, rtol=0, atol=1e-6)
        torch.testing.assert_close(bank(x, backbone), with_offset(bank, x, backbone), rtol=1e-5, atol=1e-6)


def test_the_published_start_does_change_it(bank: ExpertBank) -> None:
    x, backbone = rows()
    before = bank(x, backbone)
    bank.expand(new_gate="mean")
    assert (bank(x, backbone) - before).abs().max() > 1e-3


def test_a_split_shares_the_gate_mass(bank: ExpertBank) -> None:
    x, backbone = rows()
    bank.utilization.reset()
    bank(x, backbone)
    before = bank.utilization.gate.clone()
    most = int(before[1:].argmax())
    bank.expand(new_gate="copy")
    bank(x, backbone)
    after = bank.utilization.gate
    torch.testing.assert_close(after[most + 1], before[most + 1] / 2)
    torch.testing.assert_close(after[-1], before[most + 1] / 2)
    # The column that encodes the offset hardly changes the counted norms.
    norms = bank.utilization.norm.clone()
    bank.utilization.reset()
    bank.top_k = bank.num_experts
    bank(x, backbone)
    torch.testing.assert_close(norms, bank.utilization.norm, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", ["drop", "merge"])
def test_a_split_after_a_prune_copies_the_most_used_expert(bank: ExpertBank, rule: PruneRule) -> None:
    used(bank, 0.1, 2.0, 9.0)
    dropped = bank.prune(0.1, rule=rule)
    assert dropped is not None
    assert dropped[0] == 0
    total = 11.1 if rule == "merge" else 11.0
    assert float(bank.utilization.gate.sum()) == pytest.approx(total)
    assert float(bank.utilization.norm.sum()) == pytest.approx(total)
    most = torch.cat([bank.frozen_down, bank.down])[1].clone()
    bank.expand(new_gate="copy")
    assert torch.equal(bank.down[0], most)


def test_other_starts_keep_the_offset_of_a_split(bank: ExpertBank) -> None:
    x, backbone = rows()
    bank.expand(new_gate="copy")
    bank.expand(new_gate="mean")
    assert bank.gate_offset is not None
    assert bank.gate_offset[-1] == 0
    torch.testing.assert_close(bank(x, backbone), with_offset(bank, x, backbone))


def test_gradients_are_those_of_the_definition(bank: ExpertBank) -> None:
    bank.expand(new_gate="copy")
    x, backbone = rows()
    leaves = dict(bank.named_parameters())
    assert set(leaves) == {"router", "down", "up"}
    x.requires_grad_()
    inputs, weight = [x, *leaves.values()], torch.randn(50, DIM)
    mine = torch.autograd.grad((bank(x, backbone) * weight).sum(), inputs)
    wanted = torch.autograd.grad((with_offset(bank, x, backbone) * weight).sum(), inputs)
    for one, other in zip(mine, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", range(3))
def test_a_merge_undoes_a_split(bank: ExpertBank, expert: int) -> None:
    x, backbone = rows()
    before = bank(x, backbone)
    used(bank, *(9.0 if one == expert else 1.0 for one in range(3)))
    bank.expand(new_gate="copy")
    # First the frozen original is dropped, then the trainable copy.
    for least, other in ((expert, 3), (3, expert)):
        twin = ExpertBank(DIM, RANK)
        twin.load_state_dict(bank.state_dict())
        used(twin, *(0.1 if one == least else 9.0 for one in range(4)))
        dropped = twin.prune(0.1, rule="merge")
        assert dropped is not None
        assert (dropped[0], dropped[2]) == (least, other)
        assert twin.num_experts == 3
        torch.testing.assert_close(twin(x, backbone), before, rtol=0, atol=1e-6)


def test_a_merge_computes_the_weighted_mean_of_weights_and_gate_rows(bank: ExpertBank) -> None:
    with torch.no_grad():
        bank.down[0] = bank.frozen_down[1] + 1e-3
        bank.up[0] = bank.frozen_up[1] - 1e-3
    state = {name: value.clone() for name, value in bank.state_dict().items()}
    used(bank, 6.0, 0.3, 2.7)
    dropped = bank.prune(0.1, rule="merge")
    assert dropped is not None
    assert (dropped[0], dropped[2]) == (1, 2)
    torch.testing.assert_close(bank.down[0], 0.1 * state["frozen_down"][1] + 0.9 * state["down"][0])
    torch.testing.assert_close(bank.up[0], 0.1 * state["frozen_up"][1] + 0.9 * state["up"][0])
    torch.testing.assert_close(bank.router[2], 0.1 * state["router"][2] + 0.9 * state["router"][3])
    assert bank.gate_offset is not None
    torch.testing.assert_close(bank.gate_offset, torch.tensor([0.0, 0.0, 2.0]).log().nan_to_num(neginf=0.0))
    assert torch.equal(bank.frozen_down, state["frozen_down"][:1])
    x, backbone = rows()
    torch.testing.assert_close(bank(x, backbone), with_offset(bank, x, backbone))


def test_a_merge_of_two_unused_experts_is_their_mean(bank: ExpertBank) -> None:
    used(bank, 0.0, 0.0, 5.0)
    with torch.no_grad():
        bank.frozen_down[1], bank.frozen_up[1] = bank.frozen_down[0] + 1e-3, bank.frozen_up[0]
    mean = bank.frozen_down[:2].mean(0)
    dropped = bank.prune(0.1, rule="merge")
    assert dropped is not None
    assert (dropped[0], dropped[2]) == (0, 1)
    torch.testing.assert_close(bank.frozen_down[0], mean)


def test_a_frozen_expert_that_changes_in_place_is_read_again(bank: ExpertBank) -> None:
    bank.expand(new_gate="copy")
    x, backbone = rows()
    bank(x, backbone)
    assert bank.frozen_experts() is bank.frozen_experts()
    with torch.no_grad():
        bank.frozen_up += 1
    torch.testing.assert_close(bank(x, backbone), with_offset(bank, x, backbone), rtol=1e-4, atol=1e-5)


def test_state_dicts_carry_the_offset_and_old_ones_have_none(bank: ExpertBank) -> None:
    x, backbone = rows()
    old, before = {name: value.clone() for name, value in bank.state_dict().items()}, bank(x, backbone)
    assert "gate_offset" not in old
    bank.expand(new_gate="copy")
    new = {name: value.clone() for name, value in bank.state_dict().items()}
    fresh = ExpertBank(DIM, RANK)
    for _ in range(2):
        fresh.load_state_dict(new)
        assert torch.equal(fresh(x, backbone), bank(x, backbone))
        fresh.load_state_dict(old)
        assert fresh.gate_offset is None
        torch.testing.assert_close(fresh(x, backbone), before)
    with pytest.raises(RuntimeError, match=r"gate_offset has shape \(3,\), but router has 5 rows"):
        fresh.load_state_dict(new | {"gate_offset": torch.zeros(3)})
    fresh.load_state_dict(new)
    fresh.load_state_dict({"down": fresh.down.detach()}, strict=False)
    assert fresh.gate_offset is not None


def test_a_grown_model_is_saved_and_loaded(tmp_path) -> None:
    torch.manual_seed(0)
    model = Recommender(XSMoE(("image", "text"), dim=DIM, rank=RANK, out_dim=4))
    hidden = {name: torch.randn(20, 3, DIM) for name in ("image", "text")}
    before = model.items(hidden)
    model.items.expand(new_gate="copy")
    torch.testing.assert_close(model.items(hidden), before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = Recommender.from_pretrained(tmp_path)
    assert torch.equal(again.items(hidden), model.eval().items(hidden))


@pytest.mark.parametrize(
    "build", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)], ids=["adam", "sgd"]
)
@pytest.mark.parametrize("rule", ["drop", "merge"])
def test_an_optimizer_continues_through_splits_and_merges(
    build: Callable[..., torch.optim.Optimizer], rule: str
) -> None:
    torch.manual_seed(0)
    side = SideMoE(DIM, RANK, num_levels=2, num_experts=2)
    hidden, goal = torch.randn(32, 3, DIM), torch.randn(32, DIM)
    optimizer = build(side.parameters())

    def train(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = functional.mse_loss(side(hidden), goal)
            loss.backward()
            optimizer.step()
        return loss.item()

    train(3)
    bank = side.levels()[0]
    moments = {
        key: value.clone()
        for key, value in optimizer.state[bank.router].items()
        if isinstance(value, torch.Tensor) and value.dim()
    }
    used(bank, 1.0, 99.0)
    (dropped, *_) = side.prune(0.1, optimizer, rule=rule)  # type: ignore[arg-type]
    assert (dropped.expert, dropped.into) == (0, 1 if rule == "merge" else None)
    for key, value in moments.items():
        assert torch.equal(optimizer.state[bank.router][key], value[[0, 2]])
    before = functional.mse_loss(side(hidden), goal).item()
    side.expand(optimizer, new_gate="copy")
    assert functional.mse_loss(side(hidden), goal).item() == pytest.approx(before, abs=1e-6)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in side.parameters()}
    frozen, new = bank.frozen_down.clone(), bank.down.detach().clone()
    assert train(20) < before
    assert torch.equal(bank.frozen_down, frozen)
    assert not torch.equal(bank.down, new)


def test_several_modalities_of_which_one_has_an_offset_run_together() -> None:
    torch.manual_seed(0)
    model = XSMoE(("image", "text"), dim={"image": DIM, "text": 5}, rank=RANK, out_dim=4)
    hidden = {"image": torch.randn(20, 3, DIM), "text": torch.randn(20, 3, 5)}
    before = model(hidden)
    model.side_networks()["text"].levels()[1].expand(new_gate="copy")
    torch.testing.assert_close(model(hidden), before, rtol=0, atol=1e-6)


def test_unknown_rules_are_refused(bank: ExpertBank) -> None:
    used(bank, 1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="rule must be one of drop, merge, not 'keep'"):
        bank.prune(0.9, rule="keep")  # type: ignore[arg-type]
    sparse = ExpertBank(DIM, RANK, num_experts=2, top_k=1)
    with pytest.raises(ValueError, match="new_gate must be 'random' or 'mean' if top_k is set, not 'copy'"):
        sparse.expand(new_gate="copy")


def test_sparse_routing_has_the_offset_of_a_merge() -> None:
    torch.manual_seed(0)
    sparse = ExpertBank(DIM, RANK, num_experts=3, top_k=3)
    randomise(sparse)
    used(sparse, 0.1, 2.0, 3.0)
    assert sparse.prune(0.1, rule="merge") is not None
    x, backbone = rows()
    torch.testing.assert_close(sparse(x, backbone), with_offset(sparse, x, backbone))
    sparse.top_k = None
    torch.testing.assert_close(sparse(x, backbone), with_offset(sparse, x, backbone))
    assert not torch.allclose(naive(sparse, x, backbone), with_offset(sparse, x, backbone))
