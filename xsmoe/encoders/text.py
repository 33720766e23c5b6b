"""Frozen text encoders."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from xsmoe.encoders.encoder import FrozenEncoder, Pooling, batches
from xsmoe.encoders.loading import load_tokenizer


class TextEncoder(FrozenEncoder):
    """A frozen text encoder. "mean" pools over the tokens of the text, including special tokens but not padding.

    Args:
        max_tokens: maximum number of tokens, including special tokens. Longer texts are cut.
        name_or_path, pooling, levels, normalise_last, device, compute_dtype: see `FrozenEncoder`, which also lists the
            attributes and the errors.
    """

    kind: ClassVar[Literal["text", "image"]] = "text"

    def __init__(
        self,
        name_or_path: str | PathLike[str],
        *,
        pooling: Pooling = "mean",
        levels: Sequence[int] | None = None,
        max_tokens: int = 40,
        normalise_last: bool = True,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_tokens < 3:
            raise ValueError(f"max_tokens must be at least 3 (special tokens and one of the text), not {max_tokens}")
        self.max_tokens = max_tokens
        super().__init__(
            name_or_path,
            pooling=pooling,
            levels=levels,
            normalise_last=normalise_last,
            device=device,
            compute_dtype=compute_dtype,
        )

    def encode(
        self,
        values: Sequence[str],
        *,
        batch_size: int = 64,
        failures: dict[int, str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return the hidden states of N texts, (N, levels, D) float32 on the CPU.

        The arguments are those of `FrozenEncoder.encode`.

        Raises:
            TypeError: a value is not a string.
        """
        for place, text in enumerate(values):
            if not isinstance(text, str):
                raise TypeError(f"values must be strings, but values[{place}] is of type {type(text).__name__}")
        rows = torch.zeros(len(values), len(self.levels), self.dim)
        if not len(values):
            return rows
        encoded = self._tokens(values)
        lengths = np.array([len(tokens) for tokens in encoded["input_ids"]])
        # Sort texts by length, so that batches contain little padding.
        order = np.argsort(lengths, kind="stable")
        for batch in batches(len(values), batch_size):
            chosen = order[batch]
            rows[torch.from_numpy(chosen)] = self._rows(self._padded(encoded, chosen.tolist()))
            if progress is not None:
                progress(len(chosen))
        return rows

    def _tower(self, model: Any) -> Any:
        if getattr(model.config, "is_encoder_decoder", False):
            return model.get_encoder()
        return getattr(model, "text_model", model)

    def _prepare(self) -> None:
        self._tokenizer = load_tokenizer(self._source)
        self._padding = self._tokenizer.pad_token_id or 0

    def _tokens(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        limit = min(self.max_tokens, self._tokenizer.model_max_length)
        encoded = self._tokenizer(list(texts), truncation=True, max_length=limit, padding=False)
        kept: dict[str, list[list[int]]] = {"input_ids": encoded["input_ids"]}
        if "token_type_ids" in encoded:
            kept["token_type_ids"] = encoded["token_type_ids"]
        if not all(kept["input_ids"]):
            place = [bool(tokens) for tokens in kept["input_ids"]].index(False)
            raise ValueError(
                f"values[{place}] is {texts[place]!r}, in which the tokenizer finds no token; leave it out"
            )
        return kept

    def _padded(self, encoded: Mapping[str, list[list[int]]], chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return model inputs for the chosen texts, padded on the right to the longest of them."""
        lengths = np.array([len(encoded["input_ids"][place]) for place in chosen])
        mask = np.arange(lengths.max()) < lengths[:, None]
        inputs = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        for name, tokens in encoded.items():
            padded = np.full(mask.shape, self._padding if name == "input_ids" else 0, dtype=np.int64)
            padded[mask] = np.concatenate([tokens[place] for place in chosen])
            inputs[name] = torch.from_numpy(padded)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _example(self) -> dict[str, Tensor]:
        return self._padded(self._tokens(["a"]), [0])

    def _check_tokens(self, inputs: Mapping[str, Tensor], tokens: int) -> None:
        class_token = self._tokenizer.cls_token_id
        if self.pooling == "cls" and (class_token is None or int(inputs["input_ids"][0, 0]) != class_token):
            raise ValueError(
                f"pooling 'cls' needs a class token at the start, which encoder {self.name!r} does not have; use 'mean'"
            )

    def _pool(self, hidden: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.pooling == "cls":
            return hidden[:, 0].float()
        mask = inputs["attention_mask"][:, :, None].float()
        return (hidden.float() * mask).sum(1) / mask.sum(1)

    def _options(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}
