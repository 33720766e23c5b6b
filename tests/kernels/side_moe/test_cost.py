"""Cost of side_moe: products, tensors saved for backward, allocations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.helpers.allocations import largest_allocation
from tests.kernels.helpers.side_level import Level, make_level
from xsmoe_kernels import FrozenExperts, Utilization, side_moe, use_backend
from xsmoe_kernels.ops.side_moe import reference
from xsmoe_kernels.runtime import dispatch

ROWS, DIM, RANK = 40, 24, 8


def saved_bytes(level: Level, **options: Any) -> int:
    """Return the bytes that a forward saves for backward beyond its inputs."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = side_moe(*level, **options)
    inputs = [t.untyped_storage().data_ptr() for t in level]
    assert y.requires_grad
    assert set(inputs) <= set(kept), "the inputs are kept, so the hooks see what the operator saves"
    return sum(size for pointer, size in kept.items() if pointer not in inputs)


@pytest.mark.parametrize("experts", [1, 10])
@pytest.mark.parametrize("one_row", [False, True])
def test_saves_the_gates_and_without_recomputation_the_hidden_states(experts: int, one_row: bool) -> None:
    rows = 1 if one_row else ROWS
    gates, hidden = rows * (experts + 1) * 4, rows * experts * RANK * 4
    level = make_level(ROWS, DIM, experts, RANK, one_row=one_row, dtype=torch.float32)
    counting = {"utilization": Utilization(experts), "row_weight": torch.ones(ROWS)}
    assert saved_bytes(level, recompute=True, **counting) == gates
    assert saved_bytes(level, recompute=False, **counting) == gates + hidden


def test_recomputes_by_itself_where_the_hidden_states_are_more_than_twice_as_wide_as_x() -> None:
    for experts, kept in ((6, True), (7, False)):
        level = make_level(ROWS, DIM, experts, RANK, dtype=torch.float32)
        expected = ROWS * (experts + 1) * 4 + kept * ROWS * experts * RANK * 4
        assert saved_bytes(level) == expected


def test_makes_no_hidden_states_for_a_backward_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        results = reference.forward(*arguments)
        sizes.append(results[2].numel())
        return results

    monkeypatch.setitem(dispatch._kernels["side_moe"], "reference", forward)
    level = make_level(ROWS, DIM, 1, RANK)
    with use_backend("reference"):
        side_moe(*level)
        with torch.no_grad():
            side_moe(*level)
    assert sizes == [ROWS * RANK, 0]


def test_frozen_experts_are_kept_without_a_copy() -> None:
    level = make_level(ROWS, DIM, 3, RANK, dtype=torch.float32)
    frozen = FrozenExperts(level.down[:2], level.up[:2])
    trainable = level._replace(down=level.down[2:], up=level.up[2:])
    kept = saved_bytes(trainable, frozen=frozen, recompute=True)
    pack = frozen.pack()
    shared = 0 if pack is None else pack.untyped_storage().nbytes()
    assert kept == ROWS * 4 * 4 + shared, "the frozen experts lie in the memory of the trainable ones here"


def forward_flops(x: Level, **options: Any) -> int:
    arguments = dict.fromkeys(("frozen_down", "frozen_up", "frozen_pack", "row_weight"))
    arguments |= {"num_frozen": 0, "count": False}
    with FlopCounterMode(display=False) as counter:
        reference.forward(*x, **(arguments | {"recompute": True, "activation": "gelu"} | options))
    return counter.get_total_flops()


def backward_flops(level: Level, *needed: bool, num_frozen: int = 0, recompute: bool = False) -> int:
    _, gates, hidden, _, _ = reference.forward(*level, *(None,) * 4, num_frozen, recompute, False, "gelu")
    with FlopCounterMode(display=False) as counter:
        reference.backward(
            torch.ones_like(level.backbone), *level, *(None,) * 3, gates, hidden, num_frozen, recompute, "gelu", *needed
        )
    return counter.get_total_flops()


def test_computes_the_wide_products_only() -> None:
    experts = 5
    level = make_level(ROWS, DIM, experts, RANK, requires_grad=False)
    product, router = 2 * ROWS * experts * RANK * DIM, 2 * ROWS * (experts + 1) * DIM
    assert forward_flops(level) == 2 * product + router
    assert forward_flops(level, count=True) == 3 * product + router, "one product more for the norms"

    everything = (True,) * 5
    assert backward_flops(level, *everything) == 4 * product + 2 * router
    assert backward_flops(level, *everything, recompute=True) == 5 * product + 2 * router
    one_trainable = 2 * product + 2 * router + 2 * product // experts
    assert backward_flops(level, *everything, num_frozen=4) == one_trainable
    assert backward_flops(level, *everything, num_frozen=5) == 2 * product + 2 * router
    first_level = product + router + 2 * product // experts
    assert backward_flops(level, False, False, True, True, True, num_frozen=4) == first_level
    assert backward_flops(level, False, True, False, False, False) == 0


def test_one_row_of_x_is_one_row_of_expert_work() -> None:
    experts = 5
    level = make_level(ROWS, DIM, experts, RANK, one_row=True, requires_grad=False)
    product, router = 2 * experts * RANK * DIM, 2 * (experts + 1) * DIM
    assert forward_flops(level, count=True) == 3 * product + router
    assert backward_flops(level, *(True,) * 5) == 4 * product + 2 * router


def test_no_tensor_has_the_outputs_of_all_experts() -> None:
    experts, rows, dim, rank = 16, 64, 96, 4
    level = make_level(rows, dim, experts, rank, dtype=torch.float32)
    counters = Utilization(experts)

    def step() -> None:
        # test_native_memory.py has more rows, for the tiles of native kernels are of this size.
        with use_backend("reference"):
            side_moe(*level, utilization=counters).sum().backward()

    # The weights' gradients and the rows are of this size, the outputs of all experts of 16 times that.
    assert largest_allocation(step) <= rows * dim * 4


@pytest.mark.parametrize("one_row", [False, True])
def test_the_reference_reads_no_values(one_row: bool) -> None:
    # On the meta device there are none to read, as on a GPU there are none without a synchronisation.
    level = Level(*(t.to("meta") for t in make_level(ROWS, DIM, 3, RANK, one_row=one_row, requires_grad=False)))
    frozen = (*(torch.empty(2, RANK, DIM, dtype=torch.float64, device="meta"),) * 2, None)
    level = level._replace(router=torch.empty(6, DIM, dtype=torch.float64, device="meta"))
    row_weight = torch.empty(ROWS, device="meta")
    y, gates, hidden, norm, gate = reference.forward(*level, *frozen, row_weight, 0, False, True, "gelu")
    assert y.shape == (ROWS, DIM)
    assert norm.shape == gate.shape == (6,)
    gradients = reference.backward(y, *level, *frozen, gates, hidden, 0, False, "gelu", *(True,) * 5)
    assert [g.shape for g in gradients] == [t.shape for t in level]
