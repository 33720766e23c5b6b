"""Attributes of synthetic items. The image shows half of them, and the caption states the other half."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One attribute of items.

    Attributes:
        name: its name.
        values: its possible values.
        released: how many values exist at the start. Each later window adds one of the others.
        strength: log of the factor by which the wanted value raises the probability that a user chooses an item.
        move: probability that a user who chose one value wants the next value, in the order that is current then.
    """

    name: str
    values: tuple[str, ...]
    released: int
    strength: float
    move: float


COLOURS = {
    "red": (205, 38, 38),
    "orange": (240, 135, 25),
    "yellow": (240, 210, 50),
    "green": (60, 155, 60),
    "teal": (20, 150, 150),
    "blue": (45, 85, 200),
    "purple": (125, 60, 165),
    "pink": (240, 130, 180),
    "brown": (115, 70, 35),
    "black": (35, 35, 40),
}

_TEXTURES = ("plain", "striped", "banded", "dotted", "checked", "zigzag")
_SHAPES = ("disc", "square", "triangle", "diamond", "star", "ring")
_CATEGORIES = (
    *("lamp", "rug", "cushion", "mug", "clock", "blanket"),
    *("vase", "chair", "mirror", "basket", "kettle", "backpack"),
)
_MATERIALS = ("cotton", "oak", "steel", "leather", "glass", "wool", "bamboo", "ceramic")
_STYLES = ("nordic", "vintage", "industrial", "rustic", "baroque", "futuristic")

# The visual attributes come first, then as many textual ones.
ATTRIBUTES = (
    Attribute("colour", tuple(COLOURS), released=8, strength=4.0, move=0.85),
    Attribute("texture", _TEXTURES, released=5, strength=2.5, move=0.0),
    Attribute("shape", _SHAPES, released=6, strength=1.4, move=0.0),
    Attribute("category", _CATEGORIES, released=10, strength=4.0, move=0.85),
    Attribute("material", _MATERIALS, released=7, strength=2.5, move=0.0),
    Attribute("style", _STYLES, released=6, strength=1.4, move=0.0),
)
