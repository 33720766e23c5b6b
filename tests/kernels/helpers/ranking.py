"""Cases of rank_of_target and topk_items where scores are exact, and their comparison with the reference.

Scores of small integers do not depend on the order of summation, so results must be equal. Many scores tie.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.helpers.gpu_waits import assert_waits_for_nothing
from xsmoe_kernels import rank_of_target, topk_items, use_backend
from xsmoe_kernels.runtime import dispatch

Result = TypeVar("Result")

LAYOUTS = ("plain", "apart", "transposed", "wide", "one item")


class Case(NamedTuple):
    queries: Tensor
    items: Tensor
    targets: Tensor
    seen: tuple[Tensor, Tensor] | None


class Served(NamedTuple):
    """A backend and its device in tests."""

    backend: str
    device: torch.device

    def rank(self, case: Case) -> Tensor:
        """Return the ranks; fail if another backend ran."""
        return _on(self.backend, "rank_of_target", lambda: rank_of_target(*case))

    def topk(self, case: Case, k: int) -> tuple[Tensor, Tensor]:
        """Return scores and ids; fail if another backend ran."""
        return _on(self.backend, "topk_items", lambda: topk_items(case.queries, case.items, k, case.seen))

    def check_rank(self, case: Case) -> Tensor:
        """Fail unless the ranks are the reference's; return them."""
        case = on(self.device, case)
        ranks = self.rank(case)
        assert torch.equal(ranks, Served("reference", self.device).rank(case))
        return ranks

    def check_topk(self, case: Case, k: int) -> tuple[Tensor, Tensor]:
        """Fail unless scores and ids are the reference's; return them."""
        case = on(self.device, case)
        scores, ids = self.topk(case, k)
        expected = Served("reference", self.device).topk(case, k)
        assert scores.dtype == torch.float32
        assert torch.equal(ids, expected[1])
        assert torch.equal(scores, expected[0])
        return scores, ids

    def check_copies_tie(self, num_queries: int, num_items: int, dim: int, dtype: torch.dtype) -> None:
        """Copies of one item have bitwise equal scores at every position, the target too."""
        generator = torch.Generator().manual_seed(dim)
        item = torch.randn(1, dim, generator=generator).to(dtype)
        queries = torch.randn(num_queries, dim, generator=generator).to(dtype)
        middle = 1 + num_items // 2
        for first, apart in ((num_items - num_queries, 1), (0, 7), (num_items - 1, 7)):
            targets = (first + apart * torch.arange(num_queries)) % num_items
            case = on(self.device, Case(queries, item.repeat(num_items, 1), targets, None))
            assert self.rank(case).tolist() == [middle] * num_queries

    def random_case(
        self, num_queries: int, num_items: int, dim: int, dtype: torch.dtype, most_seen: int | None = 20
    ) -> Case:
        """Return normal numbers, whose sums are rounded; every item is in the catalogue twice."""
        case = make_case(num_queries, num_items, 1, dtype, most_seen=most_seen)
        generator = torch.Generator().manual_seed(dim)
        items = torch.randn((num_items + 1) // 2, dim, generator=generator).repeat(2, 1)[:num_items]
        queries = torch.randn(num_queries, dim, generator=generator)
        return on(self.device, case._replace(queries=queries.to(dtype), items=items.to(dtype)))


def _on(backend: str, operator: str, run: Callable[[], Result]) -> Result:
    before = dispatch.calls.copy()
    with use_backend(backend):
        result = run()
    assert dispatch.calls - before == {(operator, backend): 1}
    return result


def on(device: torch.device, case: Case) -> Case:
    """Return a case's tensors on a device."""
    seen = None if case.seen is None else (case.seen[0].to(device), case.seen[1].to(device))
    return Case(*(tensor.to(device) for tensor in case[:3]), seen)


def make_case(
    num_queries: int, num_items: int, dim: int, dtype: torch.dtype, *, seed: int = 0, most_seen: int | None = None
) -> Case:
    """Return integer-valued queries and items. With `most_seen`, also lists of up to that many items each, unordered,
    with repetitions; every other list contains its target."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    queries, items = integers(-2, 3, num_queries, dim).to(dtype), integers(-2, 3, num_items, dim).to(dtype)
    targets = integers(0, num_items, num_queries)
    if most_seen is None:
        return Case(queries, items, targets, None)
    lists = [integers(0, num_items, int(integers(0, most_seen + 1, 1))) for _ in range(num_queries)]
    lists = [torch.cat((one, targets[m : m + 1])) if m % 2 else one for m, one in enumerate(lists)]
    return Case(queries, items, targets, ragged(lists))


def ragged(lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return lists as values and offsets."""
    lengths = torch.tensor([0, *map(len, lists)])
    return torch.cat([torch.empty(0, dtype=torch.int64), *lists]), lengths.cumsum(0)


@st.composite
def cases(
    draw: st.DrawFn,
    num_queries: Sequence[int],
    num_items: Sequence[int],
    dim: Sequence[int],
    most_seen: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> Case:
    """Return cases of these sizes in every layout, some with values outside all lists at both ends."""
    sizes = (draw(st.sampled_from(some)) for some in (num_queries, num_items, dim))
    (queries, items, width), seen_of_each = sizes, draw(st.sampled_from(most_seen))
    case = make_case(queries, items, width, draw(st.sampled_from(dtypes)), most_seen=seen_of_each, seed=width)
    layout, offsets_dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([torch.int32, torch.int64]))
    outside = draw(st.sampled_from([0, 0, 1, 140]))
    seen = case.seen
    if seen is not None:
        nobodys = torch.full((outside,), items - 1)
        values, offsets = torch.cat((nobodys, seen[0], nobodys)), (seen[1] + outside).to(offsets_dtype)
        seen = laid_out(values, layout, device), laid_out(offsets, layout, device)
    return Case(*(laid_out(tensor, layout, device) for tensor in case[:3]), seen)


def laid_out(tensor: Tensor, layout: str, device: torch.device) -> Tensor:
    """Return the same numbers with other strides, on a device; "one item" repeats the first row."""
    tensor = tensor.to(device)
    if layout == "apart":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if tensor.dim() < 2:
        return tensor
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "wide":
        return torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, : tensor.shape[1]]
    if layout == "one item" and len(tensor):
        return tensor[:1].expand(tensor.shape)
    return tensor


def captured(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return a CUDA graph of a call and its result; fail if the call waits for the device."""
    assert_waits_for_nothing(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
