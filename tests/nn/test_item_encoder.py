"""Tests of the item encoder: modalities, widths, growth, saving."""

import json

import numpy as np
import pytest
import torch

from xsmoe.nn import Recommender, SideMoE, UserEncoder, XSMoE


def hidden_of(model: XSMoE, rows: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(rows, model.num_levels + 1, dim) for name, dim in model.dims.items()}


@pytest.mark.parametrize("modalities", [("text",), ("image",), ("image", "text"), ("text", "audio", "image")])
def test_any_subset_of_modalities(modalities: tuple[str, ...]) -> None:
    model = XSMoE(modalities, dim={name: 4 + 2 * place for place, name in enumerate(modalities)}, rank=2, out_dim=3)
    hidden = hidden_of(model)
    tops = [model.sides[name](hidden[name]) for name in modalities]
    torch.testing.assert_close(model(hidden), model.projection(torch.cat(tops, 1)))
    model.expand()
    assert model(hidden).shape == (5, 3)


def test_levels_and_modalities_may_grow_apart() -> None:
    model = XSMoE(("image", "text"), dim=6, rank=2, out_dim=3)
    model.expand()
    model(hidden_of(model))
    model.sides["text"].levels()[1].utilization.norm[1] = 0
    assert {name: len(pruned) for name, pruned in model.prune(0.1).items()} == {"image": 0, "text": 1}
    assert [bank.num_experts for _, _, bank in model.banks()] == [2, 2, 2, 1]
    assert model(hidden_of(model)).shape == (5, 3)


def test_row_weight_counts_rows() -> None:
    model = XSMoE(("text",), dim=6, rank=2, out_dim=3)
    model(hidden_of(model), row_weight=torch.tensor([1.0, 0, 2, 0, 4]))
    assert [b.utilization.gate.sum().item() for _, _, b in model.banks()] == pytest.approx([7, 7])
    model.reset_utilization()
    assert [b.utilization.gate.sum().item() for _, _, b in model.banks()] == [0, 0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"modalities": "text"}, "modalities must be a sequence of distinct names, not 'text'"),
        ({"modalities": ()}, "modalities must be a sequence"),
        ({"modalities": ("a", "a")}, "modalities must be a sequence of distinct"),
        ({"modalities": ("text.long",)}, "modalities holds 'text.long', which cannot name a module"),
        ({"modalities": ("type",)}, "modalities holds 'type', which cannot name a module"),
        ({"dim": {"image": 6}}, "dim must name a width for each of"),
        ({"dim": {"image": 6, "text": 0}}, r"dim\['text'\] must be at least 1, not 0"),
        ({"out_dim": 0}, "out_dim must be at least 1, not 0"),
    ],
)
def test_bad_modalities_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XSMoE(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dim": "768"}, "dim must be an int, not str"),
        ({"dim": {"image": 6.0, "text": 6}}, r"dim\['image'\] must be an int, not float"),
        ({"rank": 2.0}, "rank must be an int, not float"),
        ({"out_dim": None}, "out_dim must be an int, not NoneType"),
        ({"num_levels": "2"}, "num_levels must be an int, not str"),
        ({"num_experts": "2"}, "num_experts must be an int, not str"),
        ({"num_experts": [1, 2.0]}, "num_experts must be an int, not float"),
        ({"top_k": 1.0}, "top_k must be an int, not float"),
    ],
)
def test_sizes_of_other_types_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        XSMoE(**{"dim": 6, "rank": 2, "out_dim": 3, **arguments})


def test_sizes_may_be_numpy_integers(tmp_path) -> None:
    sizes = {"dim": np.int64(6), "num_levels": np.int64(2), "rank": np.int64(2), "out_dim": np.int64(3)}
    model = XSMoE(("text",), **sizes, num_experts=np.array([1, 2]), top_k=np.int64(1))
    assert model.sides["text"].num_experts == [1, 2]
    assert XSMoE(("text",), **sizes, num_experts=np.int64(2)).sides["text"].num_experts == [2, 2]
    model.save_pretrained(tmp_path)
    assert XSMoE.from_pretrained(tmp_path).config() == model.config()


def test_prune_refuses_counters_that_are_not_finite_and_drops_nothing() -> None:
    model = XSMoE(("image", "text"), dim=6, rank=2, out_dim=3, num_experts=2)
    model(hidden_of(model))
    model.sides["text"].levels()[1].utilization.norm[1] = float("nan")
    with pytest.raises(ValueError, match=r"sides\.text\.banks\.1\.utilization is not finite"):
        model.prune(1.0)
    assert {bank.num_experts for _, _, bank in model.banks()} == {2}


def test_a_missing_or_extra_modality_is_named() -> None:
    model = XSMoE(("image", "text"), dim=6, rank=2, out_dim=3)
    hidden = hidden_of(model)
    with pytest.raises(ValueError, match=r"exactly the modalities \('image', 'text'\), not \('image',\)"):
        model({"image": hidden["image"]})
    with pytest.raises(ValueError, match="exactly the modalities"):
        model({**hidden, "audio": hidden["text"]})
    with pytest.raises(ValueError, match=r"text must be a Tensor \(N, 3, 6\)"):
        model({**hidden, "text": hidden["text"][:, :2]})


def test_one_item_of_a_modality_is_not_shared_by_all() -> None:
    model = XSMoE(("image", "text"), dim=6, rank=2, out_dim=3)
    hidden = hidden_of(model, 3)
    message = r"text holds 1 item, but another modality holds 3; .* \(1, D\) in a sequence of levels"
    with pytest.raises(ValueError, match=message):
        model({**hidden, "text": hidden["text"][:1]})
    with pytest.raises(ValueError, match="image holds 1 item"):
        model({"image": hidden["image"][:1], "text": list(hidden["text"].unbind(1))})
    shared = [hidden["text"][:1, 0], hidden["text"][:, 1], hidden["text"][:, 2]]
    assert model({**hidden, "text": shared}).shape == (3, 3)
    assert model({name: value[:1] for name, value in hidden.items()}).shape == (1, 3)


def test_hidden_states_of_another_type_are_named_without_their_values() -> None:
    model = XSMoE(("text",), dim=6, rank=2, out_dim=3)
    hidden = hidden_of(model)["text"]
    with pytest.raises(TypeError, match=r"^hidden must be a mapping .* for each of \('text',\), not a Tensor$"):
        model(hidden)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^text must be a Tensor \(N, 3, 6\) or a sequence .*, not a NoneType$"):
        model({"text": None})  # type: ignore[dict-item]


def test_saved_and_loaded_with_its_experts(tmp_path) -> None:
    model = XSMoE(("image", "text"), dim={"image": 6, "text": 4}, rank=2, out_dim=8, num_experts=2)
    model.expand()
    recommender = Recommender(model, UserEncoder(8, num_blocks=1, inner_dim=16))
    recommender.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = Recommender.from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert [b.num_frozen for _, _, b in loaded.items.banks()] == [2, 2, 2, 2]
    for name, value in recommender.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    torch.testing.assert_close(loaded.items(hidden_of(model)), recommender.eval().items(hidden_of(model)))


def test_folders_that_cannot_be_loaded_are_named(tmp_path) -> None:
    SideMoE(4, 2, 1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json; expected a folder that XSMoE\.save_pretrained wrote"):
        XSMoE.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds a SideMoE; load it with SideMoE\.from_pretrained, not XSMoE"):
        XSMoE.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim": 5}))
    with pytest.raises(ValueError, match="does not fit"):
        SideMoE.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="is damaged"):
        SideMoE.from_pretrained(tmp_path)


def test_a_side_network_prunes_all_levels_or_none() -> None:
    side = SideMoE(8, 2, num_levels=2, num_experts=3)
    side(torch.randn(5, 3, 8))
    side.levels()[1].utilization.norm[1] = float("nan")
    with pytest.raises(ValueError, match=r"^banks\.1\.utilization is not finite"):
        side.prune(threshold=1.0)
    assert side.num_experts == [3, 3]


def test_sizes_of_a_side_network_may_be_those_of_numpy(tmp_path) -> None:
    two = np.int64(2)
    side = SideMoE(np.int64(8), two, num_levels=two, num_experts=two, top_k=two)
    assert side.num_experts == [2, 2]
    side.save_pretrained(tmp_path)
    assert SideMoE.from_pretrained(tmp_path).config() == side.config()
    with pytest.raises(TypeError, match="num_levels must be an int, not float"):
        SideMoE(8, 2, num_levels=2.0)


def test_ladders_is_a_deprecated_alias() -> None:
    model = XSMoE(modalities=("text",), dim=8, num_levels=2, rank=2, out_dim=4)
    with pytest.warns(DeprecationWarning, match=r"XSMoE\.ladders is deprecated; call XSMoE\.side_networks"):
        assert model.ladders() == model.side_networks()
