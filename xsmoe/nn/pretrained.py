"""Saving and loading of modules in the Hugging Face layout: a folder with `config.json` and `model.safetensors`."""

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from torch import nn

from xsmoe.atomic_files import replace_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class Pretrained(nn.Module, ABC):
    """A module with a config of its constructor's arguments. The number of experts is in the weights, not in it."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments for an equal module, as plain JSON values."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build the module that `config` describes, with new initial weights."""
        return cls(**config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is created if it is missing.

        Each file is replaced atomically, the weights first.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        config = {"architecture": type(self).__name__, **self.config()}
        replace_file(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
        replace_file(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Load a module that `save_pretrained` wrote, in evaluation mode.

        Raises:
            ValueError: a file is missing or damaged, or the folder contains another kind of module.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {file}; expected a folder that {cls.__name__}.save_pretrained wrote")
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            weights = load_file(folder / WEIGHTS_FILE)
        except (json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{folder} is damaged: {error}") from error
        if (found := config.pop("architecture", None)) != cls.__name__:
            raise ValueError(f"{folder} holds a {found}; load it with {found}.from_pretrained, not {cls.__name__}")
        module = cls.from_config(config)
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {folder / CONFIG_FILE}: {error}") from error
        return module.eval()
