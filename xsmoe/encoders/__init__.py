"""Frozen pretrained encoders, and the store of their hidden states.

Importing this package does not import transformers. Constructing an encoder does.
"""

from xsmoe.extras import extra

with extra("train"):
    from xsmoe.encoders.encode import EncodeReport, Unreadable, encode_items
    from xsmoe.encoders.encoder import FrozenEncoder
    from xsmoe.encoders.features import InMemoryFeatures, ItemFeatures
    from xsmoe.encoders.image import ImageEncoder
    from xsmoe.encoders.loading import resolve
    from xsmoe.encoders.manifest import ModalitySpec, StoreError
    from xsmoe.encoders.small import build_small_image_encoder, build_small_text_encoder
    from xsmoe.encoders.store import HiddenStateStore
    from xsmoe.encoders.text import TextEncoder

__all__ = [
    "EncodeReport",
    "FrozenEncoder",
    "HiddenStateStore",
    "ImageEncoder",
    "InMemoryFeatures",
    "ItemFeatures",
    "ModalitySpec",
    "StoreError",
    "TextEncoder",
    "Unreadable",
    "build_small_image_encoder",
    "build_small_text_encoder",
    "encode_items",
    "resolve",
]
