"""Tests of image encoders against transformers, and of their errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from xsmoe.encoders import ImageEncoder
from xsmoe.encoders.image import read_image


def paths(folder: Path, count: int = 9) -> list[str]:
    return [str(folder / f"{number}.png") for number in range(count)]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise_last", [True, False])
def test_pooled_levels_are_those_of_the_model(
    image_folder: Path, pictures: Path, pooling: str, normalise_last: bool
) -> None:
    encoder = ImageEncoder(image_folder, pooling=pooling, normalise_last=normalise_last)
    assert (encoder.levels, encoder.dim, encoder.image_size) == ((0, 1, 2), 32, (16, 16))
    assert encoder.last_level_normalised is normalise_last
    got = encoder.encode(paths(pictures), batch_size=4)
    model = AutoModel.from_pretrained(image_folder).eval()
    for path, rows in zip(paths(pictures), got, strict=True):
        small = Image.open(path).resize((16, 16), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            outputs = model(pixel_values=pixels, output_hidden_states=True)
        last = outputs.last_hidden_state if normalise_last else outputs.hidden_states[-1]
        for level, state in enumerate([*outputs.hidden_states[:2], last]):
            expected = state[0, 0] if pooling == "cls" else state[0, 1:].mean(0)
            torch.testing.assert_close(rows[level], expected, rtol=1e-5, atol=1e-5)


def test_level_0_of_the_class_token_is_the_same_to_the_bit(image_folder: Path, pictures: Path) -> None:
    rows = ImageEncoder(image_folder, pooling="cls").encode(paths(pictures, 20), batch_size=7)
    assert torch.equal(rows[:, 0], rows[:1, 0].expand(20, -1))
    assert (rows[1:, 1] != rows[:1, 1]).any(1).all()


def test_rows_do_not_depend_on_the_batch(image_encoder: ImageEncoder, pictures: Path) -> None:
    alone = image_encoder.encode(paths(pictures), batch_size=1)
    torch.testing.assert_close(image_encoder.encode(paths(pictures)), alone, rtol=1e-5, atol=1e-5)
    assert image_encoder.encode([]).shape == (0, 3, 32)


def test_other_sizes_and_normalisations(image_folder: Path, pictures: Path, image_encoder: ImageEncoder) -> None:
    larger = ImageEncoder(image_folder, image_size=(24, 32))
    assert larger.encode(paths(pictures)).shape == (9, 3, 32)
    assert larger.spec().options["image_size"] == [24, 32]
    shifted = ImageEncoder(image_folder, mean=[0.5, 0.4, 0.3], std=0.25)
    assert shifted.spec().compatibility_key() != image_encoder.spec().compatibility_key()
    assert not torch.allclose(shifted.encode(paths(pictures)), image_encoder.encode(paths(pictures)), atol=0.1)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16", "RGBA", "LA"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    levels = np.where(np.arange(64).reshape(8, 8) % 8 < 4, 0, 255).astype(np.uint8)
    if mode == "I;16":
        Image.fromarray(levels.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(levels).convert("RGB").convert(mode).save(path)
    pixels = read_image(path, (8, 8))
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)
    assert (pixels == levels[:, :, None]).all()


def test_transparent_pixels_become_white_and_orientation_is_applied(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    clear[:2, :, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", (4, 4))[:, 0, 0].tolist() == [0, 0, 255, 255]
    upright = Image.fromarray(np.array([[0, 0], [255, 255]], dtype=np.uint8).repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 3
    upright.rotate(180).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert np.abs(read_image(tmp_path / "turned.jpg", (16, 16))[:, :, 0] - np.array(upright).astype(int)).max() < 3


def test_an_image_that_cannot_be_read_is_named_or_reported(
    image_encoder: ImageEncoder, pictures: Path, tmp_path: Path
) -> None:
    good = (pictures / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    bad = [tmp_path / name for name in ("cut.png", "text.png", "empty.png", "folder.png", "absent.png")]
    for path in bad:
        with pytest.raises(ValueError, match=rf"image .*{path.name} cannot be read \("):
            image_encoder.encode([path])
    values = [pictures / "0.png", *bad, pictures / "1.png"]
    failures: dict[int, str] = {}
    rows = image_encoder.encode(values, batch_size=3, failures=failures)
    assert sorted(failures) == [1, 2, 3, 4, 5]
    assert "absent.png cannot be read (there is no such file)" in failures[5]
    assert not rows[1:6].any()
    torch.testing.assert_close(rows[[0, 6]], image_encoder.encode(paths(pictures, 2)))


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def test_cls_is_refused_without_a_class_token(tmp_path: Path, pictures: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **TINY)).save_pretrained(tmp_path)
    assert ImageEncoder(tmp_path).encode(paths(pictures)).shape == (9, 3, 32)
    with pytest.raises(ValueError, match=r"pooling 'cls' needs a class token.*use 'mean'"):
        ImageEncoder(tmp_path, pooling="cls")


def test_unsupported_architectures_are_refused(tmp_path: Path, text_folder: Path) -> None:
    ViTMAEModel(ViTMAEConfig(image_size=16, patch_size=8, **TINY)).save_pretrained(tmp_path / "mae")
    with pytest.raises(ValueError, match="masks or merges patches"):
        ImageEncoder(tmp_path / "mae")
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    SwinModel(config).save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="hidden states of one shape"):
        ImageEncoder(tmp_path / "swin")
    with pytest.raises(ValueError, match="has no patch_size in its config"):
        ImageEncoder(text_folder)


def test_arguments_are_checked(image_folder: Path) -> None:
    with pytest.raises(ValueError, match="std must be positive"):
        ImageEncoder(image_folder, std=0)
    with pytest.raises(ValueError, match="mean must be one number or one for each of R, G and B"):
        ImageEncoder(image_folder, mean=[0.5, 0.5])
    with pytest.raises(ValueError, match="image_size must be positive"):
        ImageEncoder(image_folder, image_size=0)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        ImageEncoder(image_folder, workers=0)
