"""Tests of hidden states in memory, against the store."""

import numpy as np
import pytest
import torch

from xsmoe.encoders import HiddenStateStore, InMemoryFeatures, ItemFeatures, ModalitySpec


def as_features(features: ItemFeatures) -> ItemFeatures:
    """Return the argument. Type checkers verify here that both implementations match the protocol."""
    return features


@pytest.fixture
def hidden() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"text": torch.randn(6, 3, 4, generator=generator), "image": torch.randn(6, 3, 5, generator=generator)}


def test_memory_and_store_return_the_same(hidden: dict[str, torch.Tensor], tmp_path) -> None:
    hidden["text"][:, 0] = 2
    has = {"image": np.array([True, True, False, True, False, True])}
    spec = {name: ModalitySpec(dim=t.shape[2], levels=(0, 1, 2), dtype=torch.float32) for name, t in hidden.items()}
    store = HiddenStateStore.create(tmp_path, spec)
    store.append([str(i) for i in range(6)], hidden, has)
    levels = {name: list(tensor.unbind(1)) for name, tensor in hidden.items()}
    levels["text"][0] = levels["text"][0][:1]
    memory, stored = as_features(InMemoryFeatures(levels, has)), as_features(store)
    for name in ("num_items", "modalities", "dims", "num_levels"):
        assert getattr(memory, name) == getattr(stored, name)
    for name in hidden:
        assert (memory.present(name) == stored.present(name)).all()
    for items in (np.array([5, 0, 0, 2]), torch.tensor([1]), np.arange(6, dtype=np.int32), np.zeros(0, dtype=np.int64)):
        for modalities in (None, ["image"]):
            one, two = memory.hidden(items, modalities), stored.hidden(items, modalities)
            assert list(one) == list(two)
            for name in one:
                assert all(torch.equal(a, b) for a, b in zip(one[name], two[name], strict=True))
    assert memory.hidden(np.array([0]), dtype=torch.bfloat16)["image"][1].dtype == torch.bfloat16


def test_a_constant_level_is_zero_where_the_modality_is_lacking() -> None:
    levels = {"text": [torch.ones(1, 4), torch.ones(3, 4)]}
    features = InMemoryFeatures(levels, {"text": np.array([True, False, True])})
    assert features.hidden(np.array([0, 2]))["text"][0].shape == (1, 4)
    assert features.hidden(np.array([0, 1]))["text"][0].tolist() == [[1.0] * 4, [0.0] * 4]
    assert torch.equal(levels["text"][1], torch.ones(3, 4))


def test_fingerprint_covers_the_items_asked_for(hidden: dict[str, torch.Tensor]) -> None:
    features = InMemoryFeatures(hidden)
    grown = InMemoryFeatures({name: torch.cat([tensor, tensor]) for name, tensor in hidden.items()})
    assert features.fingerprint() == grown.fingerprint()
    assert features.fingerprint(6) == grown.fingerprint(6) != grown.fingerprint(7)
    hidden["text"][2, 1, 1] += 1
    assert InMemoryFeatures(hidden).fingerprint(6) != grown.fingerprint(6)
    assert InMemoryFeatures({"text": hidden["text"]}).fingerprint() != grown.fingerprint()


@pytest.mark.parametrize(
    "levels, present, message",
    [
        ({}, None, "at least one modality"),
        ({"text": [torch.ones(3, 4)]}, None, "at least 2 levels"),
        ({"text": [torch.ones(2, 4), torch.ones(3, 4)]}, None, r"\[0\] must have shape \(3, 4\), or \(1, 4\)"),
        ({"text": torch.ones(3, 2, 4), "image": torch.ones(3, 3, 4)}, None, "has 3 levels, other modalities 2"),
        ({"text": torch.ones(3, 2, 4), "image": torch.ones(2, 2, 4)}, None, r"must have shape \(3, 4\)"),
        ({"text": torch.ones(3, 2, 4)}, {"text": np.ones(2)}, r"present\['text'\] must have shape \(3,\)"),
        ({"text": torch.ones(3, 2, 4)}, {"image": np.ones(3)}, "no modality 'image'; there are text"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(levels, present, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InMemoryFeatures(levels, present)


def test_rows_out_of_range_are_refused(hidden: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"items must lie in \[0, 6\), but holds 6"):
        InMemoryFeatures(hidden).hidden(np.array([6]))
