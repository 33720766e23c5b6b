"""Small encoders with random weights, for demonstrations and tests without pretrained weights.

A random transformer is a usable feature extractor, because its residual connections preserve its tokens and patches.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from xsmoe.encoders.loading import quiet_transformers
from xsmoe.extras import extra

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MAX_POSITIONS = 64


def build_small_text_encoder(
    folder: str | PathLike[str],
    texts: Iterable[str],
    *,
    width: int = 64,
    layers: int = 4,
    vocab_size: int = 8192,
    seed: int = 0,
) -> Path:
    """Write a small BERT with random weights, and a WordPiece tokenizer whose vocabulary comes from `texts`.

    The same arguments produce the same bytes. The global random state does not change.

    Args:
        folder: the new folder; it must not exist or must be empty. It is created atomically.
        texts: texts whose most frequent words become tokens. All their characters become tokens too.
        width: D, a multiple of 4.
        layers: L.
        vocab_size: maximum number of tokens; characters are kept even if they exceed it.

    Returns:
        The folder, which `TextEncoder` can load.

    Raises:
        ValueError: the folder is not empty, the width is not a multiple of 4, or there is no layer.
    """
    heads = _heads(width, layers)

    def write(draft: Path) -> None:
        with extra("train"):
            from transformers import BertConfig, BertModel

        tokenizer = _tokenizer(texts, vocab_size)
        tokenizer.save_pretrained(draft)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=MAX_POSITIONS,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=width**-0.5,
        )
        model = BertModel(config, add_pooling_layer=False)
        # Positions contribute little to a text's meaning. Keep them small relative to the words.
        model.embeddings.position_embeddings.weight.data *= 0.25
        model.save_pretrained(draft)

    return _build(Path(folder), seed, write)


def build_small_image_encoder(
    folder: str | PathLike[str],
    *,
    image_size: int = 32,
    patch_size: int = 8,
    width: int = 64,
    layers: int = 4,
    seed: int = 0,
) -> Path:
    """Write a small ViT with random weights for images of image_size x image_size pixels.

    The same arguments produce the same bytes. The global random state does not change.

    Args:
        folder: the new folder; it must not exist or must be empty. It is created atomically.
        image_size, patch_size: in pixels; image_size must be a multiple of patch_size.
        width: D, a multiple of 4.
        layers: L.

    Returns:
        The folder, which `ImageEncoder` can load.

    Raises:
        ValueError: the folder is not empty, sizes do not fit, or there is no layer.
    """
    heads = _heads(width, layers)
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size, not {image_size} with {patch_size}")

    def write(draft: Path) -> None:
        with extra("train"):
            from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            initializer_range=width**-0.5,
        )
        ViTModel(config, add_pooling_layer=False).save_pretrained(draft)

    return _build(Path(folder), seed, write)


def _heads(width: int, layers: int) -> int:
    if width < 4 or width % 4:
        raise ValueError(f"width must be a multiple of 4, the number of attention heads, not {width}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, not {layers}")
    return 4


def _build(folder: Path, seed: int, write: Callable[[Path], None]) -> Path:
    """Call `write` on a temporary folder, with a separate random state, and rename the folder to `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder {folder} is not empty; give another one, or load the encoder in it")
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with quiet_transformers(progress_bars=False), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed accelerators too, but this fork_rng does not restore their state.
        torch.random.default_generator.manual_seed(seed)
        write(draft)
    if folder.exists():
        folder.rmdir()
    os.replace(draft, folder)
    return folder


def _tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    with extra("train"):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in words for character in word})
    tokens = [*SPECIAL_TOKENS.values(), *characters, *(f"##{character}" for character in characters)]
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    tokens += frequent[: max(0, vocab_size - len(tokens))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **SPECIAL_TOKENS)
