"""Tests of the item encoder under torch.compile and torch.export: one graph for the first size, one for all others."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from xsmoe.nn import Recommender, UserEncoder, XSMoE
from xsmoe.nn.batch import Batch
from xsmoe.nn.side_network import Hidden

SIZES = (20, 31, 57, 8)
Draw = Callable[[int], dict[str, Hidden]]


def states(rows: int, dim: int = 6) -> Tensor:
    return torch.randn(rows, 3, dim)


def one_first_row(rows: int) -> list[Tensor]:
    """Return hidden states as cls pooling produces them: level 0 is the same row for every item."""
    return [torch.randn(1, 6), torch.randn(rows, 6), torch.randn(rows, 6)]


def encoder(modalities: tuple[str, ...] = ("text",), top_k: int | None = None) -> XSMoE:
    torch.manual_seed(0)
    return XSMoE(
        modalities, dim={name: 6 + place for place, name in enumerate(modalities)}, rank=2, out_dim=4, top_k=top_k
    )


@pytest.mark.parametrize(
    ("modalities", "draw", "top_k"),
    [
        (("text",), lambda rows: {"text": states(rows)}, None),
        (("text", "image"), lambda rows: {"text": states(rows), "image": states(rows, 7)}, None),
        (("text", "image"), lambda rows: {"text": one_first_row(rows), "image": states(rows, 7)}, None),
        (("text", "image"), lambda rows: {"text": one_first_row(rows), "image": states(rows, 7)}, 1),
    ],
    ids=["one modality", "two modalities", "cls pooling", "routed"],
)
def test_two_graphs_serve_every_number_of_items(modalities: tuple[str, ...], draw: Draw, top_k: int | None) -> None:
    torch.compiler.reset()
    model, counter = encoder(modalities, top_k), CompileCounterWithBackend("eager")
    model.expand()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in SIZES:
        hidden = draw(rows)
        torch.testing.assert_close(compiled(hidden), model(hidden))
    assert counter.frame_count == 2


def test_two_graphs_serve_a_recommender_for_every_batch() -> None:
    torch.compiler.reset()
    model, counter = (
        Recommender(encoder(), UserEncoder(4, num_blocks=1, inner_dim=8)),
        CompileCounterWithBackend("eager"),
    )
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for users in (4, 9, 17, 30):
        draw = np.random.default_rng(users)
        offsets = np.concatenate([[0], draw.integers(2, 9, users).cumsum()])
        batch = Batch.from_sequences(draw.integers(0, 50, offsets[-1]), offsets, np.zeros(50))
        # Numbers on the host would become constants of the graph.
        hidden, batch = {"text": states(len(batch.items))}, replace(batch, lengths=None)
        torch.testing.assert_close(compiled(hidden, batch), model(hidden, batch))
    assert counter.frame_count == 2


@pytest.mark.parametrize(("top_k", "one_row"), [(None, False), (None, True), (1, True)])
def test_exports_with_a_number_of_items_that_varies(top_k: int | None, one_row: bool) -> None:
    model, items = encoder(top_k=top_k).eval(), torch.export.Dim("items", min=2)
    draw = one_first_row if one_row else states
    shapes = [None, {0: items}, {0: items}] if one_row else {0: items}
    exported = torch.export.export(model, ({"text": draw(16)},), dynamic_shapes=({"text": shapes},)).module()
    for rows in (2, 5, 40):
        hidden = {"text": draw(rows)}
        torch.testing.assert_close(exported(hidden), model(hidden))
