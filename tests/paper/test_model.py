"""The paper's formulation against hand-computed numbers and torch's own Transformer layer."""

import math

import pytest
import torch
from torch import Tensor, nn

from bench.paper import model as paper
from bench.paper import protocol

INF = math.inf


def random_hidden(rows: int, levels: int, dim: int) -> Tensor:
    return torch.randn(rows, levels + 1, dim)


def numbered_experts(norms: list[float]) -> paper.SideNetwork:
    """Return one level whose expert weights and gate rows hold their own number."""
    side = paper.SideNetwork(dim=4, rank=2, num_levels=1, num_experts=len(norms))
    with torch.no_grad():
        for number, expert in enumerate(side.moes[0].experts, start=1):
            expert.fc_down.weight.fill_(number)
            expert.fc_up.weight.fill_(10 * number)
        side.routers[0].linear.weight.copy_(torch.arange(len(norms) + 1.0)[:, None].expand(-1, 4))
    side.moes[0].norm_mass[1:] = torch.tensor(norms)
    return side


def test_state_dict_has_the_published_keys() -> None:
    shapes = {name: tuple(value.shape) for name, value in paper.SideNetwork(6, 3, 2, 2).state_dict().items()}
    experts = {
        f"moes.{i}.experts.{j}.{part}.weight": shape
        for i in range(2)
        for j in range(2)
        for part, shape in (("fc_down", (3, 6)), ("fc_up", (6, 3)))
    }
    assert shapes == experts | {f"routers.{i}.linear.weight": (3, 6) for i in range(2)}


def test_gates_sum_to_one() -> None:
    gates = paper.Router(5, 3)(torch.randn(7, 5))
    assert gates.shape == (7, 4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(7))


def test_one_level_by_hand() -> None:
    side = paper.SideNetwork(dim=1, rank=1, num_levels=1).double()
    with torch.no_grad():
        side.moes[0].experts[0].fc_down.weight.fill_(2)
        side.moes[0].experts[0].fc_up.weight.fill_(3)
        side.routers[0].linear.weight.copy_(torch.tensor([[0.0], [math.log(3)]]))
    # x = 1, so the gates are 1/4 and 3/4, and the expert gives 1 + 3 GELU(2).
    expert = 1 + 3 * 2 * 0.5 * (1 + math.erf(2 / math.sqrt(2)))
    y = side(torch.tensor([[[1.0], [-8.0]]], dtype=torch.float64))
    assert y.item() == pytest.approx(0.25 * -8 + 0.75 * expert)
    assert side.moes[0].norm_mass.tolist() == pytest.approx([2, 0.75 * expert])
    assert side.moes[0].gate_mass.tolist() == pytest.approx([0.25, 0.75])


def test_second_level_reads_the_first() -> None:
    side, hidden = paper.SideNetwork(4, 2, num_levels=2), random_hidden(5, 2, 4)
    first, second = paper.SideNetwork(4, 2, num_levels=1), paper.SideNetwork(4, 2, num_levels=1)
    for i, part in enumerate((first, second)):
        part.moes[0], part.routers[0] = side.moes[i], side.routers[i]
    middle = first(hidden[:, :2])
    torch.testing.assert_close(side(hidden), second(torch.stack([middle, hidden[:, 2]], dim=1)))


def test_counters_grow_on_every_forward_until_reset() -> None:
    side = paper.SideNetwork(dim=2, rank=1, num_levels=1)
    with torch.no_grad():
        side.routers[0].linear.weight.zero_()
        side.moes[0].experts[0].fc_up.weight.zero_()
    # Equal gates, and an expert that is the identity: norms 5 / 2 and 13 / 2, then a row of padding.
    hidden = torch.tensor([[[5.0, 12.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    for times, mode in enumerate((True, False), start=1):
        side.train(mode)(hidden)
        assert side.moes[0].norm_mass.tolist() == pytest.approx([2.5 * times, 6.5 * times])
        assert side.moes[0].gate_mass.tolist() == pytest.approx([times, times])
    assert side.moes[0].shares().tolist() == [1]
    side.reset()
    assert side.moes[0].norm_mass.tolist() == side.moes[0].gate_mass.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("norms", "dropped"), [([5, 0.5, 4.5], 1), ([0.5, 0.4, 9.1], 1), ([8, 1, 1], None), ([3], None), ([0, 0], None)]
)
def test_prune_drops_the_least_used_below_tau(norms: list[float], dropped: int | None) -> None:
    side = numbered_experts(norms)
    assert side.prune(tau=0.1) == [dropped]
    branches = [b for b in range(len(norms) + 1) if dropped is None or b != dropped + 1]
    assert [e.fc_down.weight[0, 0].item() for e in side.moes[0].experts] == branches[1:]
    assert side.routers[0].linear.weight[:, 0].tolist() == branches
    assert side.moes[0].norm_mass[1:].tolist() == torch.tensor([norms[b - 1] for b in branches[1:]]).tolist()
    assert side(random_hidden(3, 1, 4)).shape == (3, 4)


def test_expand_adds_the_mean_and_freezes_the_rest() -> None:
    side, row = numbered_experts([1, 1, 1]), torch.full((4,), 7.0)
    side.prune(tau=0.5)
    side.expand([row])
    moe = side.moes[0]
    # Expert 1 went, so 2 and 3 are left.
    assert [e.fc_down.weight[0, 0].item() for e in moe.experts] == [2, 3, 2.5]
    assert [e.fc_up.weight[0, 0].item() for e in moe.experts] == [20, 30, 25]
    assert [p.requires_grad for p in moe.experts.parameters()] == [False] * 4 + [True] * 2
    assert side.routers[0].linear.weight[:, 0].tolist() == [0, 2, 3, 7]
    side(random_hidden(3, 1, 4)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in side.parameters())


def test_new_gate_row_is_drawn_as_a_linear_layer_is() -> None:
    router = paper.Router(400, 1).double()
    router.grow()
    weight = router.linear.weight
    assert weight.shape == (3, 400)
    assert weight.dtype == torch.float64
    assert 0.9 / 20 < weight[-1].abs().max().item() <= 1 / 20


def test_item_encoder_projects_the_modalities_in_order() -> None:
    encoder = paper.ItemEncoder({"text": 4, "image": 6}, num_levels=2, rank=3, out_dim=5)
    hidden = {"image": random_hidden(7, 2, 6), "text": random_hidden(7, 2, 4)}
    last = torch.cat([encoder.sides["text"](hidden["text"]), encoder.sides["image"](hidden["image"])], dim=1)
    torch.testing.assert_close(encoder(hidden), last @ encoder.projection.weight.T + encoder.projection.bias)
    assert encoder.prune() == {"text": [None, None], "image": [None, None]}
    encoder.expand()
    assert encoder(hidden).shape == (7, 5)


def test_user_encoder_equals_torchs_own_layers() -> None:
    encoder = paper.UserEncoder(dim=8, heads=2, blocks=2, inner=12).double().eval()
    x, real = torch.randn(3, 10, 8, dtype=torch.float64), torch.ones(3, 10, dtype=torch.bool)
    real[1, :4] = False
    y = encoder.layer_norm(x + encoder.position_embedding.weight)
    for block in encoder.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, layer_norm_eps=1e-6, batch_first=True).double()
        attention, feed_forward = block.attention, block.feed_forward
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(
                torch.cat([w.weight for w in (attention.w_q, attention.w_k, attention.w_v)])
            )
            layer.self_attn.in_proj_bias.zero_()
            layer.self_attn.out_proj.weight.copy_(attention.fc.weight)
            layer.self_attn.out_proj.bias.zero_()
        layer.linear1, layer.linear2 = feed_forward.w_1, feed_forward.w_2
        layer.norm1, layer.norm2 = attention.layer_norm, feed_forward.layer_norm
        causal = torch.ones(10, 10, dtype=torch.bool).triu(1)
        # A padding row that may see nothing would be NaN in torch's layer: let it see itself.
        hidden = (causal | ~real[:, None, :]) & ~torch.eye(10, dtype=torch.bool)
        y = layer(y, src_mask=hidden.repeat_interleave(2, dim=0))
    torch.testing.assert_close(encoder(x, real)[real], y[real])


def test_user_encoder_is_causal_blind_to_padding_and_finite() -> None:
    encoder = paper.UserEncoder(dim=8, inner=12).eval()
    x, real = torch.randn(1, 10, 8), torch.ones(1, 10)
    real[0, :3] = 0
    y = encoder(x, real)
    assert y.isfinite().all()
    changed = x.clone()
    changed[0, :3] = torch.randn(3, 8)
    changed[0, 8:] = torch.randn(2, 8)
    torch.testing.assert_close(encoder(changed, real)[0, 3:8], y[0, 3:8])
    assert not torch.allclose(encoder(changed, real)[0, 8:], y[0, 8:])


def test_user_encoder_initial_weights() -> None:
    encoder = paper.UserEncoder()
    names = {name for name, _ in encoder.named_parameters() if name.endswith("bias") and "norm" not in name}
    assert names == {f"blocks.{b}.feed_forward.w_{i}.bias" for b in (0, 1) for i in (1, 2)}
    assert all(not encoder.get_parameter(name).any() for name in names)
    deviation = encoder.blocks[0].feed_forward.w_1.weight.std().item()
    assert deviation == pytest.approx(math.sqrt(2 / (128 + 512)), rel=0.02)
    assert encoder.position_embedding.weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 10)), rel=0.1)


def test_pad_and_gather() -> None:
    ids = paper.pad_sequences([[1, 2], [1, 2, 3, 4]], max_items=3)
    assert ids.tolist() == [[0, 1, 2], [2, 3, 4]]
    rows = paper.gather_hidden({"text": torch.arange(5.0)[:, None, None] + 1}, ids)["text"]
    assert rows.flatten().tolist() == [0, 2, 3, 3, 4, 5]


def test_loss_by_hand() -> None:
    # Columns:           pad a  b     b  c  c
    ids = torch.tensor([[0, 1, 2], [2, 3, 3]])
    popularity = torch.tensor([0.0, 0.2, 0.3, 0.5], dtype=torch.float64)
    embeddings = torch.tensor([[9.0, 1, 2], [2, 3, 3]], dtype=torch.float64)[..., None]
    queries = torch.tensor([[5.0, 1], [2, -1]], dtype=torch.float64)[..., None]
    la, lb, lc = (math.log(p) for p in (0.2, 0.3, 0.5))
    logits = paper.masked_logits(queries, embeddings, ids, popularity)
    expected = [
        [[-INF, 5 - la, -INF, -INF, 15 - lc, 15 - lc], [-INF, -INF, 2 - lb, -INF, 3 - lc, 3 - lc]],
        [[-INF, 2 - la, -INF, -INF, 6 - lc, -INF], [-INF, -1 - la, -INF, -INF, -INF, -3 - lc]],
    ]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64))
    # User 0 counts only where the input is a (its first input is padding); c repeats, so it counts twice there.
    b, c = math.exp(2) / 0.3, math.exp(3) / 0.5
    losses = [
        -math.log(b / (b + 2 * c)),
        -math.log((math.exp(6) / 0.5) / (math.exp(6) / 0.5 + math.exp(2) / 0.2)),
        -math.log((math.exp(-3) / 0.5) / (math.exp(-3) / 0.5 + math.exp(-1) / 0.2)),
    ]
    loss = paper.in_batch_cross_entropy(queries, embeddings, ids, popularity)
    assert loss.item() == pytest.approx(sum(losses) / 3)


def test_popularity() -> None:
    popularity = paper.item_popularity({"u": [1, 2], "v": [2, 2]}, num_items=3)
    assert popularity.tolist() == [1, 0.25, 0.75, 0]


def train_step(model: paper.Recommender, batch: paper.Batch, optimizer: torch.optim.Optimizer) -> float:
    """Take one optimizer step; return the loss before it."""
    optimizer.zero_grad()
    loss = model(batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def test_train_steps_lower_the_loss_before_and_after_expansion() -> None:
    torch.manual_seed(0)
    encoder = paper.ItemEncoder({"text": 8, "image": 6}, num_levels=2, rank=3, out_dim=16)
    model = paper.Recommender(encoder, paper.UserEncoder(dim=16, inner=32, dropout=0))
    sequences = [torch.randint(1, 13, (n,)).tolist() for n in (2, 5, 11, 11)]
    ids = paper.pad_sequences(sequences)
    table = {"text": random_hidden(13, 2, 8), "image": random_hidden(13, 2, 6)}
    popularity = paper.item_popularity(dict(enumerate(sequences)), 12)
    batch = paper.Batch(paper.gather_hidden(table, ids), ids, popularity)
    for _ in range(2):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = [train_step(model, batch, optimizer) for _ in range(10)]
        assert losses[-1] < losses[0]
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        encoder.prune()
        encoder.expand()


def test_padding_adds_equal_gate_mass_and_no_norm() -> None:
    side, rows = paper.SideNetwork(4, 2, num_levels=2, num_experts=3), random_hidden(3, 2, 4)
    side(rows)
    before = [(moe.norm_mass.clone(), moe.gate_mass.clone()) for moe in side.moes]
    side.reset()
    side(torch.cat([rows, torch.zeros(8, 3, 4)]))
    for moe, (norms, gates) in zip(side.moes, before, strict=True):
        torch.testing.assert_close(moe.norm_mass, norms)
        torch.testing.assert_close(moe.gate_mass, gates + 8 / 4)


def test_rank_hits_and_ndcg() -> None:
    scores = torch.tensor([0.0, 3, 5, 3, 9])
    assert protocol.target_rank(scores, target=3, history=[]) == 4
    assert protocol.target_rank(scores, target=1, history=[4, 0]) == 2
    assert protocol.target_rank(scores, target=4, history=[4]) == INF
    assert protocol.hit_ratio([1, 3, 11, INF], k=10) == 0.5
    assert protocol.ndcg([1, 3, 11, INF], k=10) == pytest.approx((1 + 0.5) / 4)


def test_windows_sort_by_the_text_of_the_timestamp() -> None:
    windows = protocol.cut_windows([("u", item, time) for item, time in enumerate((9, 10, 2, 11))], 2)
    assert [[time for _, _, time in window] for window in windows] == [[10, 11], [2, 9]]


def test_split_by_hand() -> None:
    # w falls to the 5-core, which v just passes; of the 20 interactions left, 17 are for training.
    users = ["w", *"uv" * 2, "w", *"u" * 12, *"vvuv"]
    interactions = [(user, item, 100 + item) for item, user in enumerate(users)]
    split = protocol.split_window(interactions, k_core=5)
    u = [i for i, user in enumerate(users) if user == "u"]
    v = [i for i, user in enumerate(users) if user == "v"]
    assert (len(u), len(v)) == (15, 5)
    assert split.train == {"u": u[3:14], "v": v[:3]}
    assert split.validation == {"v": v[3:]}
    assert split.test == {"u": u[-11:], "v": v}
