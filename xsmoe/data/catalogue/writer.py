"""The writer of a generated catalogue: it draws the images, generates the captions and writes the tables."""

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
    """Write the drifting catalogue, a synthetic dataset whose users choose items by image and text.

    It shows the benefit of streaming on contents. It does not show how well a model performs on real data.
    `xsmoe.data.catalogue.generator` describes how users choose and how the catalogue drifts.
    `make_windows(..., num_windows)` yields the windows of the drift. The same arguments produce the same bytes with the
    same versions of numpy, Pillow and pyarrow.

    Args:
        out_folder: the folder for interactions.parquet, items.parquet and images/*.png.
        seed: at least 0.
        num_windows: at least 2.
        users: number of active users in each window, each with 6 to 15 interactions. After a window 15 % of them leave
            and as many arrive. With `returning`, the number of users of each regime.
        items: number of items at the start, at least 16 per window.
        new_items: number of items that arrive with each later window.
        returning: number of regimes of tastes that alternate, one window each; at least 2 and fewer than the windows.
            A regime returns after some windows of absence. 0 selects no regimes; then the catalogue drifts.
        image_size: width and height in pixels, at least 16.
        progress: called after each image with the number of images drawn so far and the total number.

    Raises:
        ValueError: an argument is out of its range.
    """
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 (smaller images show no texture), not {image_size}")
    catalogue = generate(
        seed=seed, num_windows=num_windows, users=users, items=items, new_items=new_items, returning=returning
    )
    interactions = catalogue.interactions()
    ids = catalogue.item_ids()

    folder = Path(out_folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    # While the images of an older catalogue are replaced, the folder must not be a valid dataset.
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
