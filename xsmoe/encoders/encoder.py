"""What text and image encoders have in common: a frozen model, the levels taken from it, the pooling over tokens."""

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
        levels: layers to take, ascending; 0 is the embedding's output, L the last layer's. None takes 0, L // 2 and L.
        normalise_last: level L is the model's `last_hidden_state`, after its final normalisation if it has one. False
            takes the last layer's own output where the model gives it. Models such as BERT normalise within the layers
            and make no difference.
        device: where the model runs.
        compute_dtype: what it runs in.

    Attributes:
        name: what it was called, or the folder's name.
        dim: the width D.
        num_layers: L.
        levels: the layers taken.
        last_level_normalised: whether level L is taken and comes out of a normalisation layer.

    Raises:
        ValueError: no such model, weights that are not complete, levels that it does not have, "cls" where it has no
            class token, or an architecture whose hidden states are not (batch, tokens, D).
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
        """Hidden states of the values: (N, levels, D) float32 on the CPU.

        Rows do not depend on what else is in a batch, except by rounding.

        Args:
            values: N of them.
            batch_size: how many go through the model at once.
            failures: where given, a value that cannot be read leaves zeros, and here its place and the reason,
                instead of an error.
            progress: called after each batch with the number of values in it.

        Raises:
            ValueError: a value that cannot be read.
        """

    @abstractmethod
    def _tower(self, model: Any) -> Any:
        """The part of the loaded model that encodes this kind of value."""

    @abstractmethod
    def _prepare(self) -> None:
        """Loads and works out what is needed besides the model."""

    @abstractmethod
    def _example(self) -> dict[str, Tensor]:
        """Model inputs for one value, on the device."""

    @abstractmethod
    def _check_tokens(self, inputs: Mapping[str, Tensor], tokens: int) -> None:
        """Raises ValueError unless a model that gave `tokens` tokens for `_example` can be pooled as is wanted."""

    @abstractmethod
    def _pool(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, tokens, D) -> (B, D) float32."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Settings that change the numbers, as JSON values."""

    def spec(self, dtype: torch.dtype = torch.float16) -> ModalitySpec:
        """What a store that holds these hidden states in `dtype` says of them."""
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
        """All hidden states, 0 to L, each (B, tokens, D)."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            outputs = self.model(**inputs, output_hidden_states=True)
        states = list(getattr(outputs, "hidden_states", None) or ())
        if len(states) < 2 or any(state.dim() != 3 or state.shape != states[0].shape for state in states):
            raise ValueError(
                f"encoder {self.name!r}, a {type(self.model).__name__}, does not give hidden states of one shape "
                "(batch, tokens, D) at every layer; use a plain transformer encoder such as BERT or ViT"
            )
        if self._normalise_last:
            states[-1] = outputs.last_hidden_state
        return states

    def _rows(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, levels, D) float32 on the CPU."""
        states = self._states(inputs)
        return torch.stack([self._pool(states[level], inputs) for level in self.levels], dim=1).cpu()

    def _probe(self, levels: Sequence[int] | None) -> None:
        """Learns from one example what the model's hidden states are, and fixes the levels."""
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
    """The slices that cut `count` values into batches. Raises ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
