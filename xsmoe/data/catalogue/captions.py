"""Captions of synthetic items. They state what the image does not show: category, material and style."""

import numpy as np

_BRANDS = (
    *("Halden", "Marlowe", "Ostrava", "Kestrel & Co", "Bramble", "Fjordline", "Lumen House", "Tessaro", "Quince"),
    *("Northgate", "Velora", "Arden Mills", "Sable Row", "Pemberton", "Juniper Lane", "Castellan", "Rookwood", "Minto"),
)
_QUALITIES = ("sturdy", "slender", "handmade", "compact", "elegant", "classic", "light", "timeless", "practical")
_SENTENCES = (
    "{style} {category} in {material}, by {brand}.",
    "{brand} {material} {category} with {style} lines.",
    "{quality} {category} made of {material}, {style} in style. From {brand}.",
    "The {quality} {brand} {category}: {material}, with {style} details.",
    "{material} {category} for the {style} home, {quality} and made to last. {brand}.",
    "New from {brand}: the {quality} {style} {category} of {material}.",
)


def caption(category: str, material: str, style: str, rng: np.random.Generator) -> str:
    """Return a short description of an item with these attributes. Wording, brand and quality word are random."""
    brand, quality, sentence = (words[rng.integers(len(words))] for words in (_BRANDS, _QUALITIES, _SENTENCES))
    text = sentence.format(category=category, material=material, style=style, brand=brand, quality=quality)
    return text[0].upper() + text[1:]
