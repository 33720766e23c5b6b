"""A whole stream under protocol="paper", compared with the paper's formulation at every step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from bench.paper import model as paper
from bench.paper.parameter_names import user_encoder_name
from bench.paper.protocol import Interaction, cut_windows, split_window
from tests.stream import tiny
from xsmoe.data import make_windows
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.stream import Stream, StreamConfig, StreamingTrainer, epoch, trainer
from xsmoe.stream.evaluation import window_evaluation

K_CORE, THRESHOLD = 3, 0.45


def assert_close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert that the norm of the difference is below 1e-5 of the norm."""
    assert mine.shape == theirs.shape
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


class Twin:
    """The paper's model with counters of its own. It copies our weights before every comparison."""

    def __init__(self, model: Recommender, table: dict[str, torch.Tensor], log: list[Interaction]) -> None:
        self.model, self.table = model, table
        self.windows = cut_windows(log, 3)
        self.items = paper.ItemEncoder(tiny.DIMS, 2, 2, 8)
        self.users = paper.UserEncoder(8, blocks=1, inner=16, dropout=0.0)
        self.popularity = torch.empty(0)
        self.compared = {"steps": 0, "pruned": 0, "expanded": 0, "evaluations": 0}

    def copy_weights(self) -> None:
        self.items.projection.load_state_dict(self.model.items.projection.state_dict())
        ours = self.model.users.state_dict()
        self.users.load_state_dict({name: ours[user_encoder_name(name)] for name in self.users.state_dict()})
        for modality, level, bank in self.model.items.banks():
            side = self.items.sides[modality]
            side.routers[level].linear.weight.data.copy_(bank.router)
            down, up = torch.cat([bank.frozen_down, bank.down]), torch.cat([bank.frozen_up, bank.up])
            for expert, d, u in zip(side.moes[level].experts, down, up, strict=True):
                expert.fc_down.weight.data.copy_(d)
                expert.fc_up.weight.data.copy_(u.T)

    def loss(self, item_ids: torch.Tensor) -> torch.Tensor:
        self.copy_weights()
        self.items.zero_grad()
        self.users.zero_grad()
        hidden = paper.gather_hidden(self.table, item_ids)
        return paper.training_loss(self.items, self.users, hidden, item_ids, self.popularity)

    def compare_gradients(self) -> None:
        assert_close(self.model.items.projection.weight.grad, self.items.projection.weight.grad)
        ours = dict(self.model.users.named_parameters())
        for name, parameter in self.users.named_parameters():
            assert_close(ours[user_encoder_name(name)].grad, parameter.grad)
        for modality, level, bank in self.model.items.banks():
            side = self.items.sides[modality]
            assert_close(bank.router.grad, side.routers[level].linear.weight.grad)
            experts = side.moes[level].experts
            assert all(p.grad is None for expert in experts[: bank.num_frozen] for p in expert.parameters())
            for place, expert in enumerate(experts[bank.num_frozen :]):
                assert_close(bank.down.grad[place], expert.fc_down.weight.grad)
                assert_close(bank.up.grad[place], expert.fc_up.weight.grad.T)

    def compare_counters(self) -> None:
        for modality, level, bank in self.model.items.banks():
            moe = self.items.sides[modality].moes[level]
            assert_close(bank.utilization.norm, moe.norm_mass)
            assert_close(bank.utilization.gate, moe.gate_mass)
            assert_close(bank.utilization.shares(), moe.shares())


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> tuple[Twin, StreamingTrainer]:
    generator = torch.Generator().manual_seed(0)
    features = tiny.features()
    rows = features.hidden(np.arange(tiny.NUM_ITEMS))
    # Item 0 of the paper's code is padding, so its items start at 1.
    table = {
        name: torch.cat([torch.randn(1, 3, tiny.DIMS[name], generator=generator), torch.stack(levels, 1)])
        for name, levels in rows.items()
    }
    flat = tiny.windows(2, users=9, each=30)
    users, items = (np.concatenate([getattr(w, name) for w in flat]) for name in ("users", "items"))
    times = np.arange(len(users)) + 1000
    windows = make_windows(users, items, times, 3, string_sort=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = XSMoE(tuple(tiny.DIMS), dim=tiny.DIMS, rank=2, out_dim=8)
        model = Recommender(encoder, UserEncoder(8, num_blocks=1, inner_dim=16, dropout=0.0))
        with torch.no_grad():
            for _, _, bank in encoder.banks():
                bank.down.normal_(std=0.5)
                bank.up.normal_(std=0.5)
    config = StreamConfig(
        protocol="paper", batch_size=4, epochs=3, warmup_epochs=0, lr=1e-2, k_core=K_CORE, prune_threshold=THRESHOLD
    )
    twin = Twin(model, table, list(zip(users.tolist(), (items + 1).tolist(), times.tolist(), strict=True)))
    run = StreamingTrainer(model, Stream(windows, features, protocol="paper"), config)
    real_step, real_epoch, real_grow = epoch.train_step, trainer.train_epoch, trainer.grow

    def train_epoch(model: Recommender, features: Any, sequences: Any, *arguments: Any, **named: Any) -> Any:
        split = split_window(twin.windows[named["window"]], K_CORE)
        ours = {
            user: (sequences.items[sequences.offsets[place] : sequences.offsets[place + 1]] + 1).tolist()
            for place, user in enumerate(sequences.users.tolist())
        }
        assert ours == split.train
        twin.popularity = paper.item_popularity(split.train, tiny.NUM_ITEMS)
        twin.items.reset()
        return real_epoch(model, features, sequences, *arguments, **named)

    def step(model: Recommender, given: Any, *arguments: Any) -> torch.Tensor:
        batch = given.batch
        ids = [[batch.items[code] + 1 for code in row if code >= 0] for row in batch.rejected.tolist()]
        expected = twin.loss(paper.pad_sequences(ids))
        expected.backward()
        loss = real_step(model, given, *arguments)
        assert_close(loss, expected.detach())
        twin.compare_gradients()
        twin.compared["steps"] += 1
        return loss

    def compared(real: Callable[..., Any], model: Recommender, features: Any, task: Any, device: Any) -> Any:
        twin.compare_counters()
        twin.copy_weights()
        twin.items({name: rows[task.candidates + 1] for name, rows in twin.table.items()})
        ranks = real(model, features, task, device)
        twin.compare_counters()
        twin.compared["evaluations"] += 1
        return ranks

    def grow(items: XSMoE, config: StreamConfig, window: int, **options: Any) -> Any:
        twin.copy_weights()
        twin.compare_counters()
        before = {(modality, level): bank.num_experts for modality, level, bank in items.banks()}
        done = real_grow(items, config, window, **options)
        dropped = twin.items.prune(THRESHOLD)
        for modality, levels in dropped.items():
            ours = {record["level"]: record["expert"] for record in done["pruned"][modality]}
            assert ours == {level: expert for level, expert in enumerate(levels) if expert is not None}
            twin.compared["pruned"] += len(ours)
        twin.items.expand(
            {name: [bank.router[-1].detach() for bank in side.levels()] for name, side in items.side_networks().items()}
        )
        for modality, level, bank in items.banks():
            experts = twin.items.sides[modality].moes[level].experts
            assert before[modality, level] + 1 - len(
                [p for p in done["pruned"][modality] if p["level"] == level]
            ) == len(experts)
            down, up = torch.cat([bank.frozen_down, bank.down]), torch.cat([bank.frozen_up, bank.up])
            for mine, theirs in zip(zip(down, up, strict=True), experts, strict=True):
                assert_close(mine[0], theirs.fc_down.weight)
                assert_close(mine[1], theirs.fc_up.weight.T)
            router = twin.items.sides[modality].routers[level].linear.weight
            assert_close(bank.router, router)
            twin.compared["expanded"] += 1
        return done

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        (epoch, "train_step", step),
        (trainer, "train_epoch", train_epoch),
        (trainer, "rank_with_model", partial(compared, trainer.rank_with_model)),
        (window_evaluation, "rank_targets", partial(compared, window_evaluation.rank_targets)),
        (trainer, "grow", grow),
    ]
    for module, name, function in replacements:
        monkeypatch.setattr(module, name, function)
    return twin, run


def test_every_step_prune_and_expansion_equals_the_published_code(twin: tuple[Twin, StreamingTrainer]) -> None:
    naive, run = twin
    lines = run.fit()
    steps = sum(line["steps"] for line in lines if line["kind"] == "epoch")
    assert naive.compared["steps"] == steps >= 3 * 3 * 2
    assert naive.compared["evaluations"] == sum(line["kind"] in ("epoch", "test") for line in lines)
    assert naive.compared["pruned"] > 0
    assert naive.compared["expanded"] == 2 * 4
