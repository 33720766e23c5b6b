"""What the tests of the Triton kernels of rank_of_target and topk_items share."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from native_ranking import Case, make_case
from torch import Tensor
from triton_gpu import DEVICE, DTYPES, ON_GPU

from xsmoe_kernels import dispatch, rank_of_target, topk_items, use_backend

Result = TypeVar("Result")

LAYOUTS = ("plain", "apart", "transposed", "wide", "one item")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small integers, many of whose scores are equal; around blocks of queries, tiles of items and steps of width."""
    num_queries = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 33, *((64, 65, 129, 300) if ON_GPU else ())]))
    num_items = draw(st.sampled_from([1, 2, 31, 32, 33, 64, 90, 140, *((127, 129, 1000, 9000) if ON_GPU else ())]))
    dim = draw(st.sampled_from([1, 2, 15, 16, 17, 32, 33, 48, *((64, 100, 128, 256, 300, 768) if ON_GPU else ())]))
    most_seen = draw(st.sampled_from([None, 0, 3, 40, *((2000,) if ON_GPU else ())]))
    case = make_case(num_queries, num_items, dim, draw(st.sampled_from(DTYPES)), most_seen=most_seen, seed=dim)
    layout, offsets_dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([torch.int32, torch.int64]))
    outside = draw(st.sampled_from([0, 0, 1, 140]))
    queries, items, targets, seen = case
    if seen is not None:
        # Some values before and behind those of all queries, which belong to nobody.
        nobodys = torch.full((outside,), num_items - 1)
        values, offsets = torch.cat((nobodys, seen[0], nobodys)), (seen[1] + outside).to(offsets_dtype)
        seen = laid_out(values, layout), laid_out(offsets, layout)
    return Case(laid_out(queries, layout), laid_out(items, layout), laid_out(targets, layout), seen)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides, on the device; for "one item" they are all the first row's."""
    tensor = tensor.to(DEVICE)
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


def on_device(case: Case) -> Case:
    """A case for the device that the kernels run on."""
    seen = None if case.seen is None else (case.seen[0].to(DEVICE), case.seen[1].to(DEVICE))
    return Case(*(tensor.to(DEVICE) for tensor in case[:3]), seen)


def triton_rank(case: Case, backend: str = "triton") -> Tensor:
    """The ranks; fails if another backend served."""
    return _on(backend, "rank_of_target", lambda: rank_of_target(*case))


def triton_topk(case: Case, k: int, backend: str = "triton") -> tuple[Tensor, Tensor]:
    """Scores and ids; fails if another backend served."""
    return _on(backend, "topk_items", lambda: topk_items(case.queries, case.items, k, case.seen))


def _on(backend: str, operator: str, run: Callable[[], Result]) -> Result:
    before = dispatch.calls.copy()
    with use_backend(backend):
        result = run()
    assert dispatch.calls - before == {(operator, backend): 1}
    return result


def check_rank(case: Case) -> Tensor:
    """Fails unless the ranks are the reference's; returns them."""
    case = on_device(case)
    ranks = triton_rank(case)
    assert torch.equal(ranks, triton_rank(case, "reference"))
    return ranks


def check_topk(case: Case, k: int) -> tuple[Tensor, Tensor]:
    """Fails unless scores and ids are the reference's; returns them."""
    case = on_device(case)
    scores, ids = triton_topk(case, k)
    expected = triton_topk(case, k, "reference")
    assert scores.dtype == torch.float32
    assert torch.equal(ids, expected[1])
    assert torch.equal(scores, expected[0])
    return scores, ids


def random_case(num_queries: int, num_items: int, dim: int, dtype: torch.dtype, most_seen: int | None = 20) -> Case:
    """Normal numbers, which are rounded when they are summed; every item stands there twice."""
    case = make_case(num_queries, num_items, 1, dtype, most_seen=most_seen)
    generator = torch.Generator().manual_seed(dim)
    items = torch.randn((num_items + 1) // 2, dim, generator=generator).repeat(2, 1)[:num_items]
    queries = torch.randn(num_queries, dim, generator=generator)
    return on_device(case._replace(queries=queries.to(dtype), items=items.to(dtype)))


def captured(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of a call, and its result; fails if the call waits for the device."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
