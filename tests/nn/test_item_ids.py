"""Tests of the ID table: its output, its sparse gradient, growth, and state dicts of other sizes."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bench.core.memory import allocations
from xsmoe import LazyAdam
from xsmoe.nn import Batch, ItemIds, Recommender, UserEncoder, XSMoE

IDS = torch.tensor([3, -1, 0, 5, -1])


def model(rows: int = 7, **options: object) -> XSMoE:
    torch.manual_seed(0)
    items = XSMoE(("text",), dim=6, rank=2, out_dim=4, ids=True, **options)  # type: ignore[arg-type]
    items.grow_ids(rows)
    assert items.ids is not None
    torch.nn.init.normal_(items.ids.weight)
    return items


def states(rows: int = 5) -> dict[str, Tensor]:
    return {"text": torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(rows))}


def table(items: XSMoE) -> torch.nn.Parameter:
    assert items.ids is not None
    return items.ids.weight


def test_ids_are_added_to_the_content() -> None:
    items = model()
    content = items(states())
    expected = content + torch.where(IDS[:, None] < 0, 0.0, table(items)[IDS.clamp(min=0)])
    torch.testing.assert_close(items(states(), ids=IDS), expected)
    assert torch.equal(items(states(), ids=torch.full((5,), -1)), content)


def test_new_items_are_their_content() -> None:
    items = XSMoE(("text",), dim=6, rank=2, out_dim=4, ids=True)
    assert torch.equal(items(states(), ids=torch.full((5,), -1)), items(states()))
    items.grow_ids(5)
    assert torch.equal(items(states(), ids=torch.arange(5)), items(states()))


def test_the_gradient_has_an_entry_for_each_id_and_zeros_where_there_is_none() -> None:
    ids = ItemIds(2, 9)
    upstream = torch.arange(10.0).view(5, 2) + 1
    upstream[1] = torch.nan
    ids(IDS).backward(upstream)
    gradient = ids.weight.grad
    assert gradient is not None
    assert gradient.layout == torch.sparse_coo
    assert gradient._indices().tolist() == [[3, 0, 0, 5, 0]]
    expected = upstream.clone()
    expected[[1, 4]] = 0
    assert torch.equal(gradient._values(), expected)


def test_a_step_allocates_nothing_of_the_tables_size() -> None:
    rows = 50_000
    ids = ItemIds(16, rows)
    optimizer = LazyAdam(ids.parameters())

    def step() -> None:
        optimizer.zero_grad()
        ids(IDS).square().sum().backward()
        optimizer.step()

    assert max(allocations(step)) >= ids.weight.nbytes, "the first step makes the optimizer's state"
    assert 0 < max(allocations(step)) < rows


def test_under_autocast_the_sum_has_the_contents_dtype_and_is_rounded_once() -> None:
    items = model()
    with torch.autocast("cpu", torch.bfloat16):
        content, both = items(states()), items(states(), ids=IDS)
    assert both.dtype == content.dtype == torch.bfloat16
    rows = torch.where(IDS[:, None] < 0, 0.0, table(items)[IDS.clamp(min=0)])
    assert torch.equal(both, (content.float() + rows).bfloat16())
    both.sum().backward()
    assert table(items).grad.dtype == torch.float32  # type: ignore[union-attr]


def test_a_recommender_passes_the_ids_of_its_batch() -> None:
    torch.manual_seed(0)
    recommender = Recommender(model(), UserEncoder(4, num_blocks=1, inner_dim=8, dropout=0.0))
    batch = Batch.from_sequences(np.array([4, 1, 0, 1, 2]), np.array([0, 2, 5]), np.zeros(7))
    assert batch.ids is None
    ids = torch.tensor([0, -1, 2, 4])
    known = replace(batch, ids=ids)
    assert recommender(states(4), batch) != recommender(states(4), known)
    recommender(states(4), known).backward()
    assert table(recommender.items).grad._indices().tolist() == [[0, 0, 2, 4]]  # type: ignore[union-attr]
    for moved in (known.packed(), known.packed().clone(), known.to("cpu")):
        assert moved.ids is not None
        assert torch.equal(moved.ids, ids)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 7]), ValueError, r"ids must lie in \[-1, 7\), but holds values from 0 to 7"),
        (torch.tensor([0, 1, 2, 3, -2]), ValueError, r"ids must lie in \[-1, 7\)"),
        (torch.tensor([0, 1]), ValueError, r"ids must have shape \(5,\), not \(2,\)"),
        (torch.zeros(5), TypeError, "ids must be int64, not torch.float32"),
        ([0, 1, 2, 3, 4], TypeError, "ids must be a Tensor"),
    ],
)
def test_wrong_ids_are_named(ids: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model()(states(), ids=ids)


def test_a_model_without_ids_refuses_ids() -> None:
    items = XSMoE(("text",), dim=6, rank=2, out_dim=4)
    with pytest.raises(ValueError, match="ids must be None, since this model has no IDs; build it with ids=True"):
        items(states(), ids=IDS)
    with pytest.raises(ValueError, match="this model has no IDs to grow; build it with ids=True"):
        items.grow_ids(3)
    assert not [name for name, _ in items.named_parameters() if name.startswith("ids")]


def step(items: XSMoE, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    optimizer.zero_grad()
    items(states(len(ids)), ids=ids).square().sum().backward()
    optimizer.step()


def test_growth_carries_the_optimizers_state() -> None:
    items = model()
    optimizer = LazyAdam(items.parameters(), lr=0.1)
    long = copy.deepcopy(items)
    long.grow_ids(20)
    other = LazyAdam(long.parameters(), lr=0.1)
    for ids in (IDS, torch.tensor([0, 0, 6, 1, -1])):
        step(items, optimizer, ids)
        step(long, other, ids)
    before = table(items)
    items.grow_ids(7, optimizer)
    assert table(items) is before
    items.grow_ids(20, optimizer)
    assert torch.equal(table(items), table(long))
    assert not table(items)[7:].any()
    for ids in (torch.tensor([0, 19, 6, 7, -1]), IDS):
        step(items, optimizer, ids)
        step(long, other, ids)
    assert table(items)[19].any()
    for name, value in long.state_dict().items():
        assert torch.equal(items.state_dict()[name], value), name
    mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    for place, state in theirs.items():
        for name, value in state.items():
            assert torch.equal(mine[place][name], value), (place, name)


def test_growth_supports_sparse_adam_for_the_table() -> None:
    items = model()
    others = [parameter for name, parameter in items.named_parameters() if name != "ids.weight"]
    optimizers = [torch.optim.Adam(others), torch.optim.SparseAdam([table(items)])]
    for rows in (9, 12):
        for optimizer in optimizers:
            step(items, optimizer, IDS)
        items.grow_ids(rows, optimizers)
        items.expand(optimizers)
    assert optimizers[1].state[table(items)]["exp_avg"].shape == (12, 4)


def test_experts_grow_and_shrink_with_a_lazy_optimizer() -> None:
    items = model()
    optimizer = LazyAdam(items.parameters())
    step(items, optimizer, IDS)
    counted = optimizer.state[table(items)]["step"].clone()
    items.expand(optimizer)
    step(items, optimizer, torch.full((5,), -1))
    assert items.prune(1.0, optimizer)["text"]
    step(items, optimizer, torch.full((5,), -1))
    assert torch.equal(optimizer.state[table(items)]["step"], counted)
    assert counted.tolist() == [1, 0, 0, 1, 0, 1, 0]


def test_growth_that_would_lose_something_is_refused() -> None:
    items = model()
    with pytest.raises(ValueError, match="num_items must be at least 7, the current row count, not 6"):
        items.grow_ids(6)
    with pytest.raises(ValueError, match=r"optimizer does not hold ids\.weight"):
        items.grow_ids(8, LazyAdam(items.sides.parameters()))
    with pytest.raises(TypeError, match="num_items must be an int, not float"):
        items.grow_ids(8.0)  # type: ignore[arg-type]
    assert table(items).shape == (7, 4)


@pytest.mark.parametrize("rows", [0, 3, 30])
def test_a_state_dict_of_any_size_loads_in_place(rows: int) -> None:
    items, other = model(rows), model(7)
    before = table(other)
    optimizer = LazyAdam(other.parameters())
    step(other, optimizer, IDS)
    other.load_state_dict(items.state_dict())
    assert table(other) is before
    assert torch.equal(table(other), table(items))
    with pytest.raises(RuntimeError, match="load the optimizer's state too"):
        step(other, optimizer, torch.full((5,), -1))
    mine = LazyAdam(items.parameters())
    step(items, mine, torch.full((5,), -1) if rows == 0 else torch.tensor([0, 0, rows - 1, -1, 1]))
    other.load_state_dict(items.state_dict())
    optimizer.load_state_dict(copy.deepcopy(mine.state_dict()))
    for one, its in ((items, mine), (other, optimizer)):
        step(one, its, torch.full((5,), min(1, rows) - 1))
    for name, value in items.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_table_of_another_width_is_refused_whole() -> None:
    items = model()
    before = table(items).detach().clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for ids\.weight"):
        items.load_state_dict({**items.state_dict(), "ids.weight": torch.zeros(9, 5)})
    assert torch.equal(table(items), before)


def test_saved_and_loaded_with_its_rows(tmp_path) -> None:
    for name, items in (("some", model()), ("none", XSMoE(("text",), dim=6, rank=2, out_dim=4, ids=True))):
        recommender = Recommender(items, UserEncoder(4, num_blocks=1, inner_dim=8))
        recommender.save_pretrained(tmp_path / name)
        loaded = Recommender.from_pretrained(tmp_path / name).items
        assert torch.equal(table(loaded), table(items))
        ids = IDS if len(table(items)) else torch.full((5,), -1)
        assert torch.equal(loaded(states(), ids=ids), items.eval()(states(), ids=ids))


def test_two_graphs_serve_every_number_of_ids() -> None:
    torch.compiler.reset()
    items, counter = model(60), CompileCounterWithBackend("aot_eager")
    compiled: Callable[..., Tensor] = torch.compile(items, fullgraph=True, backend=counter)
    for rows in (20, 31, 57, 8):
        ids = torch.arange(rows) - 1
        gradients = []
        for encode in (compiled, items):
            table(items).grad = None
            encode(states(rows), ids=ids).sum().backward()
            gradients.append(table(items).grad)
        mine, expected = gradients
        assert mine.layout == torch.sparse_coo  # type: ignore[union-attr]
        torch.testing.assert_close(mine.to_dense(), expected.to_dense())  # type: ignore[union-attr]
        torch.testing.assert_close(compiled(states(rows), ids=ids), items(states(rows), ids=ids))
    assert counter.frame_count == 2


def test_exports_with_ids() -> None:
    items, rows = model(60).eval(), torch.export.Dim("rows", min=2)
    shapes = {"hidden": {"text": {0: rows}}, "ids": {0: rows}}
    given = states(16), {"ids": torch.arange(16)}
    exported = torch.export.export(items, given[:1], given[1], dynamic_shapes=shapes).module()
    ids = torch.arange(31) - 1
    torch.testing.assert_close(exported(states(31), ids=ids), items(states(31), ids=ids))


def test_adam_of_torch_refuses_the_sparse_gradient() -> None:
    items = model()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        step(items, torch.optim.Adam(items.parameters()), IDS)


@pytest.mark.slow
def test_time_of_a_step_with_a_million_items() -> None:
    """Measure a step of the table alone: 2,640 ids, a quarter of them left out. `pytest -s` prints the times."""
    rows, width = 1_000_000, 128
    ids = torch.randperm(rows)[:2640].sort().values
    ids[torch.rand(2640) < 0.25] = -1
    upstream = torch.randn(2640, width)
    seconds = {}
    for name, build in {
        "LazyAdam": LazyAdam,
        "SparseAdam": torch.optim.SparseAdam,
        "Adam(fused=True)": lambda parameters: torch.optim.Adam(parameters, fused=True),
    }.items():
        items = ItemIds(width, rows)
        optimizer = build([items.weight])
        times = []
        for _ in range(9):
            start = time.perf_counter()
            optimizer.zero_grad()
            items(ids).backward(upstream)
            if name.startswith("Adam"):
                assert items.weight.grad is not None
                items.weight.grad = items.weight.grad.to_dense()
            optimizer.step()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times)
        if name == "LazyAdam":
            state = [value for values in optimizer.state.values() for value in values.values()]
            assert sum(value.nbytes for value in state) == 2 * items.weight.nbytes + 4 * rows
    for name, taken in seconds.items():
        print(f"{name}: {1000 * taken:.1f} ms a step")
    assert seconds["LazyAdam"] < 0.1 * seconds["Adam(fused=True)"]
    assert seconds["LazyAdam"] < 3 * seconds["SparseAdam"]
