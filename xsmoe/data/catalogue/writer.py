"""From a generated log to a dataset's folder: draws the images, words the captions, writes the tables."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from xsmoe.data.catalogue.attributes import ATTRIBUTES
from xsmoe.data.catalogue.captions import caption
from xsmoe.data.catalogue.drawing import draw
from xsmoe.data.catalogue.generator import generate
from xsmoe.data.dataset import ITEMS, Dataset, Items, write_dataset


def write_catalogue(
    out_folder: str | PathLike[str],
    *,
    seed: int = 0,
    num_windows: int = 6,
    users: int = 1000,
    items: int = 600,
    new_items: int = 80,
    returning: int = 0,
    image_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Writes the drifting catalogue, a synthetic dataset whose users follow what items look and read like.

    It shows what streaming on contents gains, not how well a model does on real data. `xsmoe.data.catalogue.generator`
    describes how users choose and how the catalogue drifts. Cut with `make_windows(..., num_windows)`, the windows are
    those of the drift. The same arguments give the same bytes with the same versions of numpy, Pillow and pyarrow.

    Args:
        out_folder: gets interactions.parquet, items.parquet and images/*.png.
        seed: at least 0.
        num_windows: at least 2.
        users: active in each window, with 6 to 15 interactions each; 15 % leave after it and as many arrive.
        items: on sale at the start, at least 16 per window.
        new_items: arrive with each later window.
        returning: regimes of tastes that alternate, a window each, so that each comes back after windows of absence; at
            least 2 and fewer than the windows. 0: none, the world drifts. With it `users` are those of each regime.
        image_size: width and height in pixels, at least 16.
        progress: called with the number of images drawn and the number in all, after each one.

    Raises:
        ValueError: an argument out of its range.
    """
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16, for a texture to be seen, not {image_size}")
    catalogue = generate(
        seed=seed, num_windows=num_windows, users=users, items=items, new_items=new_items, returning=returning
    )
    interactions = catalogue.interactions()
    ids = catalogue.item_ids()

    folder = Path(out_folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    # While the images of an older catalogue are being replaced, the folder must not pass for a dataset.
    (folder / ITEMS).unlink(missing_ok=True)
    pencil, pen = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    texts, images = np.empty(len(ids), object), np.empty(len(ids), object)
    for item, (name, places) in enumerate(zip(ids, catalogue.attributes.tolist(), strict=True)):
        values = {attribute.name: attribute.values[place] for attribute, place in zip(ATTRIBUTES, places, strict=True)}
        texts[item] = caption(values["category"], values["material"], values["style"], pen)
        images[item] = f"images/{name}.png"
        draw(values["colour"], values["texture"], values["shape"], image_size, pencil).save(folder / images[item])
        if progress is not None:
            progress(item + 1, len(ids))
    return write_dataset(folder, interactions, Items(ids, texts, images))
