"""Frozen image encoders."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from xsmoe.encoders.encoder import FrozenEncoder, Pooling, batches

DEFAULT_SIZE = 224


class ImageEncoder(FrozenEncoder):
    """A frozen image encoder of the ViT family. "mean" pools over the patches, without class and register tokens.

    An image is rotated by its EXIF orientation, converted to RGB (transparent pixels become white), resized to the
    encoder's size without keeping its aspect ratio (bilinear), and normalised.

    Args:
        image_size: side in pixels, or (height, width). Default: the size in the model's config, or 224 without one.
        mean, std: normalisation of the pixel values in [0, 1]: one number, or one for each of R, G, B.
        workers: number of threads that read images; default one per CPU core, at most 8.
        name_or_path, pooling, levels, normalise_last, device, compute_dtype: see `FrozenEncoder`, which also lists the
            attributes and the errors.
    """

    kind: ClassVar[Literal["text", "image"]] = "image"

    def __init__(
        self,
        name_or_path: str | PathLike[str],
        *,
        pooling: Pooling = "mean",
        levels: Sequence[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        normalise_last: bool = True,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        workers: int | None = None,
    ) -> None:
        self._wanted_size = image_size
        self.mean, self.std = _per_channel("mean", mean), _per_channel("std", std)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {std}")
        self.workers = workers if workers is not None else min(8, os.cpu_count() or 1)
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        super().__init__(
            name_or_path,
            pooling=pooling,
            levels=levels,
            normalise_last=normalise_last,
            device=device,
            compute_dtype=compute_dtype,
        )

    def encode(
        self,
        values: Sequence[str | PathLike[str]],
        *,
        batch_size: int = 64,
        failures: dict[int, str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the hidden states of N image files, (N, levels, D) float32 on the CPU.

        The arguments are those of `FrozenEncoder.encode`.

        Raises:
            ValueError: an image cannot be read, and `failures` is None. The message names the file.
        """
        rows = torch.zeros(len(values), len(self.levels), self.dim)
        todo = batches(len(values), batch_size)
        with ThreadPoolExecutor(self.workers) as pool:

            def start(batch: slice) -> list[Future[np.ndarray]]:
                return [pool.submit(read_image, path, self.image_size) for path in values[batch]]

            reading = start(todo[0]) if todo else []
            for number, batch in enumerate(todo):
                current = reading
                # Read the next batch while the model processes this one.
                reading = start(todo[number + 1]) if number + 1 < len(todo) else []
                images, places = [], []
                for place, future in enumerate(current, start=batch.start):
                    try:
                        images.append(future.result())
                        places.append(place)
                    except ValueError as error:
                        if failures is None:
                            for waiting in reading:
                                waiting.cancel()
                            raise
                        failures[place] = str(error)
                if images:
                    rows[places] = self._rows({"pixel_values": self._pixels(np.stack(images))})
                if progress is not None:
                    progress(len(current))
        return rows

    def _tower(self, model: Any) -> Any:
        return getattr(model, "vision_model", model)

    def _prepare(self) -> None:
        config = self.model.config
        own = _pair(getattr(config, "image_size", None) or DEFAULT_SIZE)
        self.image_size = own if self._wanted_size is None else _pair(self._wanted_size)
        self._arguments: dict[str, Any] = {}
        accepted = inspect.signature(self.model.forward).parameters
        if self.image_size != own and "interpolate_pos_encoding" in accepted:
            self._arguments["interpolate_pos_encoding"] = True
        if getattr(config, "patch_size", None) is None:
            raise ValueError(
                f"encoder {self.name!r}, a {type(self.model).__name__}, has no patch_size in its config; use an image "
                "encoder of the ViT family"
            )
        patch = _pair(config.patch_size)
        self._patches = (self.image_size[0] // patch[0]) * (self.image_size[1] // patch[1])

    def _states(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return super()._states({**inputs, **self._arguments})

    def _pixels(self, images: np.ndarray) -> Tensor:
        """Normalise (B, H, W, 3) uint8 and return it as (B, 3, H, W) on the device."""
        pixels = torch.from_numpy(images).to(self.device).float() / 255
        mean, std = torch.tensor(self.mean, device=self.device), torch.tensor(self.std, device=self.device)
        return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous().to(self.compute_dtype)

    def _example(self) -> dict[str, Tensor]:
        return {"pixel_values": self._pixels(np.zeros((1, *self.image_size, 3), dtype=np.uint8))}

    def _check_tokens(self, inputs: Mapping[str, Tensor], tokens: int) -> None:
        # In models of this family, tokens that are no patches (the class token, registers) come first.
        self._prefix = tokens - self._patches
        if self._prefix < 0:
            raise ValueError(
                f"encoder {self.name!r}, a {type(self.model).__name__}, returns {tokens} tokens for {self._patches} "
                "patches; an encoder that masks or merges patches is not supported, use a plain ViT"
            )
        if self.pooling == "cls" and self._prefix == 0:
            raise ValueError(
                f"pooling 'cls' needs a class token, which encoder {self.name!r} does not have; use 'mean'"
            )

    def _pool(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.pooling == "cls":
            return hidden[:, 0].float()
        return hidden[:, self._prefix :].float().mean(1)

    def _options(self) -> dict[str, Any]:
        return {"image_size": list(self.image_size), "mean": list(self.mean), "std": list(self.std)}


def read_image(path: str | PathLike[str], size: tuple[int, int]) -> np.ndarray:
    """Read an image file as (height, width, 3) uint8, resized to the given size (height, width).

    Raises:
        ValueError: the file is missing or is not a readable image. The message names the file.
    """
    try:
        with Image.open(Path(path)) as opened:
            image = _as_rgb(ImageOps.exif_transpose(opened))
            return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    except MemoryError:
        raise
    except Exception as error:  # On damaged files, decoders raise errors of many types.
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"image {path} cannot be read ({reason})") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits per pixel to 8 bits instead of scaling them.
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(height, width) < 1:
        raise ValueError(f"image_size must be positive, not {size}")
    return height, width


def _per_channel(name: str, value: float | Sequence[float]) -> tuple[float, float, float]:
    values = [float(value)] * 3 if isinstance(value, (int, float)) else [float(channel) for channel in value]
    if len(values) != 3:
        raise ValueError(f"{name} must be one number or one for each of R, G and B, not {value}")
    return values[0], values[1], values[2]
