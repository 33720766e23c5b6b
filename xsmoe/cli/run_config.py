"""A run's folder as the commands see it: its settings in config.json, its users in users.txt."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from xsmoe.data import Window
from xsmoe.encoders import HiddenStateStore
from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.stream import StreamConfig
from xsmoe.stream.config import decisive, saved_model
from xsmoe.stream.source import Missing
from xsmoe.stream.state.checkpoints import write_atomically
from xsmoe.stream.state.seeds import derive, seeded
from xsmoe_kernels import __version__

CONFIG = "config.json"
USERS = "users.txt"
MODEL = "model"
DEFAULT_WINDOWS = 10
MODEL_SETTINGS = ("rank", "out_dim", "top_k", "condition", "ids")
MODEL_DEFAULTS = {"default": {"condition": "whiten", "ids": True}, "paper": {"condition": "none", "ids": False}}
NEEDED = {"new_gate": "expand", "grow": "expand", "prune_rule": "prune", "prune_threshold": "prune"}
"""Settings of growth, and what has to be on for them."""


@dataclass(frozen=True)
class RunConfig:
    """All that decides what a run computes.

    Attributes:
        dataset, store: folders.
        windows: how many the dataset's interactions are cut into.
        modalities: those the model uses.
        missing: what happens to items that lack one of them, "drop" or "zero".
        model: what `Recommender.from_config` takes.
        stream: the trainer's settings.
    """

    dataset: Path
    store: Path
    windows: int
    modalities: tuple[str, ...]
    missing: Missing
    model: dict[str, Any]
    stream: StreamConfig

    @classmethod
    def new(cls, given: Mapping[str, Any], store: HiddenStateStore) -> Self:
        """Settings from those given, by name, and the defaults for all others.

        Args:
            given: "dataset", "store", and any of "windows", "modalities", "missing", `MODEL_SETTINGS` and the fields of
                `StreamConfig`.
            store: which tells widths and levels.
        """
        stream = StreamConfig.from_dict(
            {name: given[name] for name in StreamConfig.__dataclass_fields__ if name in given}
        )
        for name, needed in NEEDED.items():
            if name in given and not getattr(stream, needed):
                raise ValueError(
                    f"{name} has no effect, since {needed} is off; give --{needed} too, or leave {name} out"
                )
        if (width := given.get("out_dim", 2)) < 2 or width % 2:
            raise ValueError(f"out_dim must be even and at least 2, since two attention heads share it, not {width}")
        modalities = tuple(given.get("modalities", store.modalities))
        if unknown := [name for name in modalities if name not in store.modalities]:
            raise ValueError(f"modality {unknown[0]!r} is not in the store, which has {', '.join(store.modalities)}")
        items = XSMoE.from_config(
            {
                "modalities": modalities,
                "dim": {name: store.dims[name] for name in modalities},
                "num_levels": store.num_levels - 1,
                **MODEL_DEFAULTS[stream.protocol],
                **{name: given[name] for name in MODEL_SETTINGS if name in given},
            }
        )
        users = UserEncoder(items.out_dim, inner_dim=4 * items.out_dim, max_length=stream.max_inputs)
        return cls(
            dataset=Path(given["dataset"]).resolve(),
            store=Path(given["store"]).resolve(),
            windows=given.get("windows", DEFAULT_WINDOWS),
            modalities=modalities,
            missing=given.get("missing", "drop"),
            model=Recommender(items, users).config(),
            stream=stream,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The settings of the run in `folder`.

        Raises:
            ValueError: there is no run, or its config.json cannot be understood.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise ValueError(f"{folder} holds no run: there is no {CONFIG}; start one with `xsmoe train`")
        try:
            saved = json.loads(path.read_text())
            return cls(
                dataset=_absolute(saved["dataset"], folder),
                store=_absolute(saved["store"], folder),
                windows=saved["windows"],
                modalities=tuple(saved["modalities"]),
                missing=saved["missing"],
                model=saved_model(saved["model"]),
                stream=StreamConfig.from_saved(saved["stream"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be understood: {type(error).__name__}: {error}; restore it") from error

    def write(self, folder: Path) -> None:
        """Writes config.json in one step."""
        content = {
            "xsmoe": __version__,
            "dataset": portable(self.dataset, folder),
            "store": portable(self.store, folder),
            "windows": self.windows,
            "modalities": list(self.modalities),
            "missing": self.missing,
            "model": self.model,
            "stream": self.stream.to_dict(),
        }
        write_atomically(folder / CONFIG, (json.dumps(content, indent=2) + "\n").encode())

    def settings(self) -> dict[str, Any]:
        """The settings by the names that `new` takes."""
        items = self.model["items"]
        return {
            "dataset": str(self.dataset),
            "store": str(self.store),
            "windows": self.windows,
            "modalities": list(self.modalities),
            "missing": self.missing,
            **{name: items[name] for name in MODEL_SETTINGS},
            **self.stream.to_dict(),
        }

    def require(self, given: Mapping[str, Any], folder: Path) -> None:
        """Raises ValueError if a setting that is given differs from the run's, and may not."""
        mine = self.settings()
        wanted = dict(given)
        for name in ("dataset", "store"):
            if name in wanted:
                wanted[name] = str(Path(wanted[name]).resolve())
        wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
        kept, asked = decisive(mine), decisive(wanted)
        differences = [
            f"{name} is {_shown(mine[name])}, not {_shown(wanted[name])}" for name in asked if kept[name] != asked[name]
        ]
        if differences:
            raise ValueError(
                f"{folder} holds a run of other settings: {'; '.join(differences)}. Leave these options out to go on "
                "with the run, or give another folder"
            )

    def build_model(self) -> Recommender:
        """The model with the initial weights that the seed gives."""
        with seeded(derive(self.stream.seed, 0, 0, "weights"), torch.device("cpu")):
            return Recommender.from_config(self.model)


def check_device(name: str) -> torch.device:
    """The device, if torch has it here. Raises ValueError otherwise."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f"device is {name!r}, but torch finds no GPU here; use --device cpu")
        if device.index is not None and device.index >= count:
            raise ValueError(f"device is {name!r}, but there are {count} GPUs, numbered from 0")
    return device


def read_users(folder: Path, windows: Iterable[Window]) -> np.ndarray:
    """The users of a run, (N,) object array of str, in the order of their numbers.

    Args:
        folder: of the run.
        windows: those it has taken, all of whose users must be there.

    Raises:
        ValueError: the file is missing or has been shortened.
    """
    path = folder / USERS
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it, since it says which user is which")
    users = np.array(path.read_bytes().decode().split("\n")[:-1], dtype=object)
    most = max((int(window.users.max()) for window in windows if len(window)), default=-1)
    if most >= len(users):
        raise ValueError(f"{path} has {len(users)} users, but the run's windows know at least {most + 1}; restore it")
    return users


def write_users(folder: Path, users: np.ndarray) -> None:
    """Writes users.txt in one step, a user a line.

    Raises:
        ValueError: an id with a line break in it.
    """
    for user in users:
        if "\n" in user:
            raise ValueError(f"user id {user!r} holds a line break; rename that user")
    write_atomically(folder / USERS, "".join(f"{user}\n" for user in users).encode())


def portable(path: Path, folder: Path) -> str:
    """A path as it is saved in `folder`: relative where both lie in one folder, so that they can be moved together."""
    here = folder.resolve().parent
    return os.path.relpath(path, folder.resolve()) if path.is_relative_to(here) else str(path)


def _absolute(saved: str, folder: Path) -> Path:
    return (folder.resolve() / saved).resolve()


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
