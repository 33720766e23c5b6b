"""Tests of text encoders against transformers, and of their errors."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model, PreTrainedTokenizerFast
from transformers.utils import logging

from xsmoe.encoders import TextEncoder

TEXTS = ["red wool shirt", "hat", "a green rain coat with a hood and a leather shoe", "zebra-crossing 7"]


def reference(folder: Path, text: str, **tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return transformers' hidden states of one text and the model's last hidden state; (tokens, D)."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**tokenizer(text, return_tensors="pt", truncation=True, **tokens), output_hidden_states=True)
    return [state[0] for state in outputs.hidden_states], outputs.last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooled_levels_are_those_of_the_model(text_folder: Path, pooling: str) -> None:
    encoder = TextEncoder(text_folder, pooling=pooling)
    assert (encoder.levels, encoder.num_layers, encoder.dim) == ((0, 1, 2), 2, 32)
    got = encoder.encode(TEXTS)
    assert got.shape == (4, 3, 32)
    assert not got.requires_grad
    for text, rows in zip(TEXTS, got, strict=True):
        states, last = reference(text_folder, text)
        for level, state in enumerate([*states[:2], last]):
            expected = state[0] if pooling == "cls" else state.mean(0)
            torch.testing.assert_close(rows[level], expected, rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_the_batch(text_encoder: TextEncoder, texts: list[str]) -> None:
    many = [*TEXTS, *texts]
    alone = text_encoder.encode(many, batch_size=1)
    torch.testing.assert_close(text_encoder.encode(many, batch_size=64), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text_encoder.encode(many[::-1], batch_size=7).flip(0), alone, rtol=1e-5, atol=1e-5)
    distances = torch.cdist(alone[:, 2], alone[:, 2]) + torch.eye(len(many)) * 9
    assert distances.min() > 0.01


def test_level_0_of_the_class_token_is_the_same_to_the_bit(text_folder: Path, texts: list[str]) -> None:
    rows = TextEncoder(text_folder, pooling="cls").encode([*TEXTS, *texts], batch_size=7)
    assert torch.equal(rows[:, 0], rows[:1, 0].expand(len(rows), -1))
    assert (rows[1:, 1] != rows[:1, 1]).any(1).all()


def test_text_is_cut(text_folder: Path) -> None:
    long = " ".join(["shirt"] * 38)
    encoder = TextEncoder(text_folder)
    same = encoder.encode([long, long + " hat", long + " red lamp" * 20])
    torch.testing.assert_close(same[1:], same[:1].expand(2, -1, -1))
    assert not torch.allclose(encoder.encode(["shirt " * 37 + "hat"])[0], same[0], atol=1e-4)
    states, last = reference(text_folder, "red wool shirt number", max_length=4)
    assert len(last) == 4
    cut = TextEncoder(text_folder, max_tokens=4).encode(["red wool shirt number"])
    torch.testing.assert_close(cut[0, 0], states[0].mean(0))


def test_levels_can_be_chosen(text_folder: Path, text_encoder: TextEncoder) -> None:
    chosen = TextEncoder(text_folder, levels=(1, 2))
    assert torch.equal(chosen.encode(TEXTS), text_encoder.encode(TEXTS)[:, 1:])
    assert chosen.last_level_normalised
    assert not TextEncoder(text_folder, levels=(0, 1)).last_level_normalised
    for levels in ((0,), (0, 3), (1, 0), (0, 0, 2), (-1, 2)):
        with pytest.raises(ValueError, match=r"levels must be two or more ascending layers between 0 and 2"):
            TextEncoder(text_folder, levels=levels)


def test_spec_describes_the_hidden_states(text_folder: Path, tmp_path: Path) -> None:
    spec = TextEncoder(text_folder, pooling="cls", max_tokens=9).spec(torch.bfloat16)
    assert (spec.dim, spec.levels, spec.dtype, spec.pooling) == (32, (0, 1, 2), torch.bfloat16, "cls")
    assert (spec.encoder, spec.last_level_normalised) == ("tiny-bert", True)
    assert spec.options == {"compute_dtype": "float32", "max_tokens": 9}
    assert spec.transformers_version
    moved = tmp_path / "another name"
    shutil.copytree(text_folder, moved)
    again = TextEncoder(moved, pooling="cls", max_tokens=9).spec(torch.bfloat16)
    assert again.compatibility_key() == spec.compatibility_key()
    weights = load_file(moved / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 7] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert TextEncoder(moved).revision != spec.revision


def test_an_encoder_is_frozen_and_leaves_the_random_state_alone(text_folder: Path, text_encoder: TextEncoder) -> None:
    state = torch.get_rng_state()
    TextEncoder(text_folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert not text_encoder.model.training
    assert not any(parameter.requires_grad for parameter in text_encoder.model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = text_encoder.encode(TEXTS)
    assert torch.equal(under_autocast, text_encoder.encode(TEXTS))


def test_a_local_folder_needs_no_network_and_prints_nothing(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    TextEncoder(text_folder).encode(TEXTS)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, xsmoe.encoders; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_progress_counts_the_texts(text_encoder: TextEncoder) -> None:
    seen: list[int] = []
    text_encoder.encode(TEXTS, batch_size=3, progress=seen.append)
    assert seen == [3, 1]
    assert text_encoder.encode([]).shape == (0, 3, 32)


def test_weights_that_are_not_complete_are_refused(text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(text_folder, folder)
    weights = load_file(folder / "model.safetensors")
    lost = "encoder.layer.1.output.dense.weight"
    save_file({name: t for name, t in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 of its weights are missing .* {lost}"):
        TextEncoder(folder)
    content = (text_folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"damaged' cannot be loaded \("):
        TextEncoder(folder)


def test_sources_without_a_text_encoder_are_refused(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"tiny-vit' cannot be loaded \("):
        TextEncoder(image_folder)
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*a name on the Hugging Face hub, or 'minilm'"):
        TextEncoder(tmp_path)


def test_cls_is_refused_without_a_class_token(text_folder: Path, tmp_path: Path) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_file=str(text_folder / "tokenizer.json"), unk_token="[UNK]")
    plain.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=len(plain), n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2Model(config).save_pretrained(tmp_path)
    assert TextEncoder(tmp_path).encode(TEXTS).shape == (4, 3, 32)
    with pytest.raises(ValueError, match=r"pooling 'cls' needs a class token at the start.*use 'mean'"):
        TextEncoder(tmp_path, pooling="cls")


def test_arguments_are_checked(text_folder: Path, text_encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="pooling must be 'cls' or 'mean', not 'max'"):
        TextEncoder(text_folder, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens must be at least 3"):
        TextEncoder(text_folder, max_tokens=2)
    with pytest.raises(TypeError, match=r"values\[1\] is of type NoneType"):
        text_encoder.encode(["hat", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        text_encoder.encode(["hat"], batch_size=0)
