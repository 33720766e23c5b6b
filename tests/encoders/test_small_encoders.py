"""Tests of the small random encoders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from xsmoe.encoders import ImageEncoder, TextEncoder, build_small_image_encoder, build_small_text_encoder


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, texts: list[str], folder_bytes) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = build_small_text_encoder(tmp_path / "one", texts, width=32, layers=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    two = build_small_text_encoder(tmp_path / "two", iter(texts), width=32, layers=2)
    three = build_small_text_encoder(tmp_path / "three", texts, width=32, layers=2, seed=1)
    images = [
        build_small_image_encoder(tmp_path / f"i{s}{n}", width=32, layers=2, seed=s) for s in (0, 1) for n in "ab"
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert folder_bytes(one) == folder_bytes(two) != folder_bytes(three)
    assert folder_bytes(images[0]) == folder_bytes(images[1]) != folder_bytes(images[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i0a", "i0b", "i1a", "i1b", "one", "three", "two"]


def check_that_groups_show(rows: torch.Tensor, groups: torch.Tensor) -> None:
    """Assert that items of one group are similar at every level, and that levels differ from each other."""
    same = groups[:, None] == groups
    same.fill_diagonal_(False)
    for level in normalize(rows - rows.mean(0), dim=2).unbind(1):
        similarity = level @ level.T
        assert similarity[same].mean() > similarity[~same].mean() + 0.4
    for level in (1, 2):
        assert (rows[:, level] - rows[:, level - 1]).norm() > 0.3 * rows[:, level - 1].norm()


def test_texts_that_share_words_are_closer_at_every_level(text_encoder: TextEncoder, texts: list[str]) -> None:
    kinds = [" ".join(text.split()[:-2]) for text in texts]
    groups = torch.tensor([kinds.index(kind) for kind in kinds])
    assert len(groups.unique()) == 25
    check_that_groups_show(text_encoder.encode(texts), groups)


def test_images_of_like_colours_are_closer_at_every_level(image_encoder: ImageEncoder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = [(220, 40, 40), (40, 40, 220), (40, 220, 40), (200, 200, 200)]
    for number in range(20):
        pixels = np.array(colours[number % 4]) + rng.normal(0, 25, (16, 16, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
    rows = image_encoder.encode([tmp_path / f"{number}.png" for number in range(20)])
    check_that_groups_show(rows, torch.arange(20) % 4)


def test_rare_words_are_spelled_and_none_is_unknown(tmp_path: Path) -> None:
    folder = build_small_text_encoder(tmp_path / "t", ["aa aa aa bb cab"], vocab_size=12, width=8, layers=1)
    vocabulary = set(TextEncoder(folder)._tokenizer.get_vocab())
    assert {"aa", "[CLS]", "a", "##a", "c", "##c"} <= vocabulary
    assert "cab" not in vocabulary
    rows = TextEncoder(folder).encode(["cab", "bac", "zz", "yy"])[:, 1]
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)
    torch.testing.assert_close(rows[2], rows[3])


def test_folders_and_sizes_are_checked(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give another one, or load the encoder in it"):
        build_small_text_encoder(tmp_path, texts)
    (tmp_path / "empty").mkdir()
    build_small_image_encoder(tmp_path / "empty", width=8, layers=1)
    with pytest.raises(ValueError, match="is not empty; give another one, or load the encoder in it"):
        build_small_image_encoder(tmp_path / "empty", width=8, layers=1)
    with pytest.raises(ValueError, match="width must be a multiple of 4"):
        build_small_text_encoder(tmp_path / "x", texts, width=30)
    with pytest.raises(ValueError, match="layers must be at least 1"):
        build_small_text_encoder(tmp_path / "x", texts, layers=0)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        build_small_image_encoder(tmp_path / "x", image_size=20, patch_size=8)
    assert not (tmp_path / "x").exists()
