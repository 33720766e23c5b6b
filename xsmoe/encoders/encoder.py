"""The base class of text and image encoders: a frozen model, a choice of its levels, and pooling over tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from xsmoe.encoders.loading import load_model, resolve, revision
from xsmoe.encoders.manifest import ModalitySpec
from xsmoe.extras import extra

Pooling = Literal["cls", "mean"]


class FrozenEncoder(ABC):
    """A pretrained transformer that turns each value into one row per chosen level.

    Args:
        name_or_path: a folder written by `save_pretrained`, a name on the Hugging Face hub, or "minilm".
        pooling: "mean" over the tokens, or "cls", the class token.
        levels: indices of the layers to use, ascending; 0 is the embedding's output, L the last layer's. None selects
            0, L // 2 and L.
        normalise_last: if True, level L is the model's `last_hidden_state`, after its final normalisation if it has
            one. If False, level L is the last layer's own output, where the model provides it. Models such as BERT
            normalise within the layers, so both are the same.
        device: the model's device.
        compute_dtype: the model's dtype.

    Attributes:
        name: the given name, or the folder's name.
        dim: the width D.
        num_layers: L.
        levels: the selected layers.
        last_level_normalised: whether level L is selected and is the output of a normalisation layer.

    Raises:
        ValueError: the model does not exist, its weights are incomplete, it lacks one of the levels, pooling is "cls"
            but it has no class token, or its hidden states are not (batch, tokens, D).
    """

    kind: ClassVar[Literal["text", "image"]]

    def __init__(
        self,
        name_or_path: str | PathLike[str],
        *,
        pooling: Pooling,
        levels: Sequence[int] | None,
        normalise_last: bool,
        device: torch.device | str,
        compute_dtype: torch.dtype,
    ) -> None:
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be 'cls' or 'mean', not {pooling!r}")
        given, source = str(name_or_path), resolve(name_or_path)
        self.name = Path(given).name if Path(given).is_dir() else given
        self.pooling: Pooling = pooling
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype
        self._source = source
        self._normalise_last = normalise_last
        whole = load_model(source)
        self.revision = revision(source, whole)
        self.model = self._tower(whole).to(self.device, compute_dtype)
        self._prepare()
        self._probe(levels)

    @abstractmethod
    def encode(
        self,
        values: Sequence[Any],
        *,
        batch_size: int = 64,
        failures: dict[int, str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the hidden states of the values: (N, levels, D) float32 on the CPU.

        A row does not depend on the other values of its batch, except for rounding.

        Args:
            values: N values.
            batch_size: number of values that the model processes at once.
            failures: a mapping, or None. With a mapping, a value that cannot be read does not raise: its rows are
                zeros, and the mapping gets its index and the reason.
            progress: called after each batch with the number of values in it.

        Raises:
            ValueError: a value cannot be read, and `failures` is None.
        """

    @abstractmethod
    def _tower(self, model: Any) -> Any:
        """Return the part of the loaded model that encodes this kind of value."""

    @abstractmethod
    def _prepare(self) -> None:
        """Load and compute everything that is needed in addition to the model."""

    @abstractmethod
    def _example(self) -> dict[str, Tensor]:
        """Return model inputs for one example value, on the device."""

    @abstractmethod
    def _check_tokens(self, inputs: Mapping[str, Tensor], tokens: int) -> None:
        """Raise ValueError unless the chosen pooling supports a model that returns `tokens` tokens for `_example`."""

    @abstractmethod
    def _pool(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pool (B, tokens, D) to (B, D) float32."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Return the settings that change the hidden states, as JSON values."""

    def spec(self, dtype: torch.dtype = torch.float16) -> ModalitySpec:
        """Return the spec of these hidden states in a store with this `dtype`."""
        with extra("train"):
            import transformers

        return ModalitySpec(
            dim=self.dim,
            levels=self.levels,
            dtype=dtype,
            encoder=self.name,
            revision=self.revision,
            pooling=self.pooling,
            last_level_normalised=self.last_level_normalised,
            transformers_version=transformers.__version__,
            options={"compute_dtype": str(self.compute_dtype).removeprefix("torch."), **self._options()},
        )

    def _states(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return all hidden states, 0 to L, each (B, tokens, D)."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            outputs = self.model(**inputs, output_hidden_states=True)
        states = list(getattr(outputs, "hidden_states", None) or ())
        if len(states) < 2 or any(state.dim() != 3 or state.shape != states[0].shape for state in states):
            raise ValueError(
                f"encoder {self.name!r}, a {type(self.model).__name__}, does not return hidden states of one shape "
                "(batch, tokens, D) at every layer; use a plain transformer encoder such as BERT or ViT"
            )
        if self._normalise_last:
            states[-1] = outputs.last_hidden_state
        return states

    def _rows(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the pooled hidden states of the chosen levels, (B, levels, D) float32 on the CPU."""
        states = self._states(inputs)
        return torch.stack([self._pool(states[level], inputs) for level in self.levels], dim=1).cpu()

    def _probe(self, levels: Sequence[int] | None) -> None:
        """Run the model on one example to find its number of layers and its width, and choose the levels."""
        normalised: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: normalised.append(output))
            for module in self.model.modules()
            if isinstance(module, nn.Module) and "norm" in type(module).__name__.lower()
        ]
        inputs = self._example()
        try:
            states = self._states(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        self.dim = states[0].shape[2]
        self.num_layers = len(states) - 1
        default = sorted({0, self.num_layers // 2, self.num_layers})
        chosen = default if levels is None else list(levels)
        if len(chosen) < 2 or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] <= self.num_layers:
            raise ValueError(
                f"levels must be two or more ascending layers between 0 and {self.num_layers}, the last of encoder "
                f"{self.name!r}, not {levels}"
            )
        self.levels = tuple(chosen)
        last = states[-1]
        self.last_level_normalised = chosen[-1] == self.num_layers and any(
            isinstance(output, Tensor) and output.shape == last.shape and torch.equal(output, last)
            for output in normalised
        )
        self._check_tokens(inputs, states[0].shape[1])


def batches(count: int, batch_size: int) -> list[slice]:
    """Return the slices that cut `count` values into batches. Raise ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
