"""Settings of a run (config.json) and its users (users.txt)."""

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
from xsmoe.stream.config import result_settings, upgrade_model_config
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
"""Settings of growth, and the switch that each one needs."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
        dataset, store: folders.
        windows: number of windows of the dataset's interactions.
        modalities: modalities of the model.
        missing: handling of items that lack a modality, "drop" or "zero".
        model: argument of `Recommender.from_config`.
        stream: settings of the trainer.
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
        """Return settings from the given ones, by name, and defaults for the others.

        Args:
            given: "dataset", "store", and any of "windows", "modalities", "missing", `MODEL_SETTINGS` and the fields of
                `StreamConfig`.
            store: determines the widths and the number of levels.
        """
        stream = StreamConfig.from_dict(
            {name: given[name] for name in StreamConfig.__dataclass_fields__ if name in given}
        )
        for name, needed in NEEDED.items():
            if name in given and not getattr(stream, needed):
                raise ValueError(f"{name} has no effect, because {needed} is off; add --{needed}, or leave {name} out")
        if (width := given.get("out_dim", 2)) < 2 or width % 2:
            raise ValueError(f"out_dim must be even and at least 2, for two attention heads, not {width}")
        modalities = tuple(given.get("modalities", store.modalities))
        if unknown := [name for name in modalities if name not in store.modalities]:
            raise ValueError(
                f"modality {unknown[0]!r} is not in the store; it has {', '.join(store.modalities)}, choose among these"
            )
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
        """Read the settings of the run in `folder`.

        Raises:
            ValueError: there is no run, or its config.json is invalid.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise ValueError(f"{folder} is not a run: it has no {CONFIG}; start a run with `xsmoe train`")
        try:
            saved = json.loads(path.read_text())
            return cls(
                dataset=_absolute(saved["dataset"], folder),
                store=_absolute(saved["store"], folder),
                windows=saved["windows"],
                modalities=tuple(saved["modalities"]),
                missing=saved["missing"],
                model=upgrade_model_config(saved["model"]),
                stream=StreamConfig.from_saved(saved["stream"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is invalid: {type(error).__name__}: {error}; restore it from a backup") from error

    def write(self, folder: Path) -> None:
        """Write config.json atomically."""
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
        """Return the settings by the names of the arguments of `new`."""
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
        """Raise ValueError if a given setting differs from the run's setting and must not change."""
        current = self.settings()
        wanted = dict(given)
        for name in ("dataset", "store"):
            if name in wanted:
                wanted[name] = str(Path(wanted[name]).resolve())
        wanted = {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
        kept, asked = result_settings(current), result_settings(wanted)
        differences = [
            f"{name} is {_shown(current[name])}, not {_shown(wanted[name])}"
            for name in asked
            if kept[name] != asked[name]
        ]
        if differences:
            raise ValueError(
                f"the run in {folder} has other settings: {'; '.join(differences)}. Leave these options out to resume "
                "the run, or use another folder"
            )

    def build_model(self) -> Recommender:
        """Return the model with initial weights from the seed."""
        with seeded(derive(self.stream.seed, 0, 0, "weights"), torch.device("cpu")):
            return Recommender.from_config(self.model)


def check_device(name: str) -> torch.device:
    """Return the device. Raise ValueError if torch does not have it on this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f"device is {name!r}, but torch finds no GPU; use --device cpu")
        if device.index is not None and device.index >= count:
            raise ValueError(f"device is {name!r}, but the last of {count} GPUs is cuda:{count - 1}; use another one")
    return device


def read_users(folder: Path, windows: Iterable[Window]) -> np.ndarray:
    """Read the users of a run, (N,) object array of str, in the order of their numbers.

    Args:
        folder: folder of the run.
        windows: windows of the run. All their users must be in the file.

    Raises:
        ValueError: the file is missing or too short.
    """
    path = folder / USERS
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it from a backup, because it maps user numbers to users")
    users = np.array(path.read_bytes().decode().split("\n")[:-1], dtype=object)
    most = max((int(window.users.max()) for window in windows if len(window)), default=-1)
    if most >= len(users):
        raise ValueError(
            f"{path} has {len(users)} users, but the run's windows have at least {most + 1}; restore it from a backup"
        )
    return users


def write_users(folder: Path, users: np.ndarray) -> None:
    """Write users.txt atomically, one user per line.

    Raises:
        ValueError: a user id contains a line break.
    """
    for user in users:
        if "\n" in user:
            raise ValueError(f"user id {user!r} contains a line break; rename this user")
    write_atomically(folder / USERS, "".join(f"{user}\n" for user in users).encode())


def portable(path: Path, folder: Path) -> str:
    """Return a path in the form saved in `folder`: relative if both have the same parent, so both can be moved."""
    here = folder.resolve().parent
    return os.path.relpath(path, folder.resolve()) if path.is_relative_to(here) else str(path)


def _absolute(saved: str, folder: Path) -> Path:
    return (folder.resolve() / saved).resolve()


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
