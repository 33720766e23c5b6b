"""Top-k routing in Triton.

Rows are divided into parts, one for each program. `route_kernel` chooses the experts and counts each part's choices by
expert. `order_kernel` sums these counts to the position where a part's choices of an expert begin, and writes them
there in the order of rows. No program waits for another, and results do not depend on their order.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from xsmoe_kernels.triton_utils import kernel_helpers, tuning
from xsmoe_kernels.triton_utils.kernel_helpers import sortable, sorted_value
from xsmoe_kernels.triton_utils.tuning import Config, Table, everywhere

FEWEST_COLUMNS = 32
"""One binary for up to this number of experts."""
MOST_PARTS = 512
"""With FEWEST_COLUMNS. Each part reads the counts of all parts, so their number is limited to what fills a GPU."""

TAKEN = tl.constexpr(-(2**31))
"""The key of a column that does not exist or was chosen already; no logit has this key."""


@triton.jit(do_not_specialize=["logits_stride", "num_rows", "num_experts", "k", "part_rows"])
def route_kernel(
    logits,
    gates,
    experts,
    counts,
    logits_stride,
    num_rows,
    num_experts,
    k,
    part_rows,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute gates and experts (rows, k) of a part's rows, and counts (parts, E) of its choices of each expert."""
    part = tl.program_id(0).to(tl.int64)
    column, place = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    count = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(part * part_rows, min(part * part_rows + part_rows, num_rows), BLOCK_N):
        row = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = row < num_rows
        mask = inside[:, None] & (column < num_experts)[None, :]
        values = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        keys = tl.where(mask, sortable(values), TAKEN)
        largest = sorted_value(tl.max(keys, axis=1))[:, None]
        if not RENORMALIZE:
            total = tl.sum(tl.where(mask, tl.exp(values - largest), 0.0), axis=1)
        chosen = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
        chosen_keys = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
        for choice in range(k):
            key, expert = tl.max(keys, axis=1, return_indices=True)
            chosen = tl.where((place == choice)[None, :], expert[:, None], chosen)
            chosen_keys = tl.where((place == choice)[None, :], key[:, None], chosen_keys)
            keys = tl.where(column[None, :] == expert[:, None], TAKEN, keys)
        count += tl.sum((mask & (keys == TAKEN)).to(tl.int32), axis=0)
        wanted = inside[:, None] & (place < k)[None, :]
        weights = tl.where(wanted, tl.exp(sorted_value(chosen_keys) - largest), 0.0)
        if RENORMALIZE:
            total = tl.sum(weights, axis=1)
        target = row[:, None] * k + place[None, :]
        tl.store(gates + target, (weights / total[:, None]).to(gates.dtype.element_ty), mask=wanted)
        tl.store(experts + target, chosen.to(tl.int64), mask=wanted)
    tl.store(counts + part * num_experts + column, count, mask=column < num_experts)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_parts", "k", "part_rows"])
def order_kernel(
    experts,
    counts,
    order,
    offsets,
    num_rows,
    num_experts,
    num_parts,
    k,
    part_rows,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute the entries of order (rows*k,) for a part's rows; the first part computes offsets (E+1,)."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, num_parts, 4 * BLOCK_N):
        other = first + tl.arange(0, 4 * BLOCK_N)
        mask = (other < num_parts)[:, None] & (column < num_experts)[None, :]
        count = tl.load(counts + other.to(tl.int64)[:, None] * num_experts + column[None, :], mask=mask, other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((other < part)[:, None], count, 0), axis=0)
    start = tl.cumsum(total.to(tl.int64), axis=0) - total
    if part == 0:
        tl.store(offsets + column, start, mask=column < num_experts)
        tl.store(offsets + num_experts, tl.sum(total.to(tl.int64), axis=0))
    start += before
    for first in range(part * part_rows, min(part * part_rows + part_rows, num_rows), BLOCK_N):
        row = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = row < num_rows
        # A row chooses an expert at most once: a table of rows and experts contains the rank of each choice.
        place = tl.full((BLOCK_N, BLOCK_E), -1, tl.int32)
        for choice in range(k):
            expert = tl.load(experts + row * k + choice, mask=inside, other=-1)
            place = tl.where(column[None, :] == expert[:, None], choice, place)
        chosen = (place >= 0).to(tl.int32)
        target = start[None, :] + (tl.cumsum(chosen, axis=0) - chosen)
        tl.store(order + target, row[:, None] * k + place, mask=place >= 0)
        start += tl.sum(chosen, axis=0)


@triton.jit(do_not_specialize=["grad_stride", "logits_stride", "experts_stride", "num_rows", "num_experts", "k"])
def gradient_kernel(
    grad,
    logits,
    experts,
    grad_logits,
    grad_stride,
    logits_stride,
    experts_stride,
    num_rows,
    num_experts,
    k,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Compute grad_logits (rows, E) of a block of rows from the gradient of their gates."""
    column = tl.arange(0, BLOCK_E)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < num_rows
    mask = inside[:, None] & (column < num_experts)[None, :]
    values = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    chosen = tl.zeros((BLOCK_N, BLOCK_E), tl.int32)
    spread = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for choice in range(k):
        expert = tl.load(experts + row * experts_stride + choice, mask=inside, other=-1)
        grad_gate = tl.load(grad + row * grad_stride + choice, mask=inside, other=0.0).to(tl.float32)
        here = column[None, :] == expert[:, None]
        chosen = tl.where(here, 1, chosen)
        spread = tl.where(here, grad_gate[:, None], spread)
    softmaxed = mask
    if RENORMALIZE:
        softmaxed = mask & (chosen != 0)
    values = tl.where(softmaxed, values, float("-inf"))
    weights = tl.where(softmaxed, tl.exp(values - tl.max(values, axis=1)[:, None]), 0.0)
    gates = weights / tl.sum(weights, axis=1)[:, None]
    mean = tl.sum(tl.where(softmaxed, gates * spread, 0.0), axis=1)
    grads = tl.where(softmaxed, gates * (spread - mean[:, None]), 0.0)
    target = grad_logits + row[:, None] * num_experts + column[None, :]
    tl.store(target, grads.to(grad_logits.dtype.element_ty), mask=mask)


# BLOCK_N is for FEWEST_COLUMNS; more columns reduce the rows.
ROUTE = Table(
    "route_topk",
    everywhere(Config({"BLOCK_N": 32}, num_warps=8)),
    interpreted=Config({"BLOCK_N": 8}),
    candidates=(Config({"BLOCK_N": 64}, num_warps=8), Config({"BLOCK_N": 16}, num_warps=4)),
)
GRADIENT = Table(
    "route_topk.gradient",
    everywhere(Config({"BLOCK_N": 32}, num_warps=4)),
    interpreted=Config({"BLOCK_N": 8}),
    candidates=(Config({"BLOCK_N": 64}, num_warps=8), Config({"BLOCK_N": 16}, num_warps=4)),
)


def forward(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gates (N, k), experts (N, k), order (N*k,) and offsets (E+1,), as `route_topk` describes them."""
    num_rows, num_experts = logits.shape
    logits = kernel_helpers.rows_in_place(logits)
    columns = _columns(num_experts)
    gates = logits.new_empty(num_rows, k)
    experts = torch.empty(num_rows, k, dtype=torch.int64, device=logits.device)
    order, offsets = experts.new_empty(num_rows * k), experts.new_empty(num_experts + 1)

    def launch(config: Config) -> None:
        config = _fitted(config, columns)
        block = config.blocks["BLOCK_N"]
        most = max(MOST_PARTS // 4, MOST_PARTS * FEWEST_COLUMNS // columns)
        blocks = max(1, triton.cdiv(num_rows, block))  # offsets are computed for zero rows too
        part_blocks = triton.cdiv(blocks, most)
        num_parts = triton.cdiv(blocks, part_blocks)
        counts = torch.empty(num_parts, num_experts, dtype=torch.int32, device=logits.device)
        sizes = {"num_rows": num_rows, "num_experts": num_experts, "k": k, "part_rows": part_blocks * block}
        kernel_helpers.launch(
            route_kernel,
            (num_parts,),
            logits.device,
            {"logits": logits, "gates": gates, "experts": experts, "counts": counts, **sizes}
            | {"logits_stride": logits.stride(0)},
            {"RENORMALIZE": renormalize, "BLOCK_K": triton.next_power_of_2(k)},
            config,
        )
        kernel_helpers.launch(
            order_kernel,
            (num_parts,),
            logits.device,
            {"experts": experts, "counts": counts, "order": order, "offsets": offsets, **sizes}
            | {"num_parts": num_parts},
            {},
            config,
        )

    tuning.run(ROUTE, logits, "ieee", {"k": k}, launch)
    return gates, experts, order, offsets


def backward(grad: Tensor, logits: Tensor, experts: Tensor, renormalize: bool) -> Tensor:
    """Return the gradient of the logits (N, E); `grad` is that of the gates."""
    num_rows, num_experts = logits.shape
    grad, logits, experts = (kernel_helpers.rows_in_place(tensor) for tensor in (grad, logits, experts))
    columns = _columns(num_experts)
    grad_logits = logits.new_empty(num_rows, num_experts)
    k = experts.shape[1]

    def launch(config: Config) -> None:
        config = _fitted(config, columns)
        tensors = {"grad": grad, "logits": logits, "experts": experts}
        kernel_helpers.launch(
            gradient_kernel,
            (triton.cdiv(num_rows, config.blocks["BLOCK_N"]),),
            logits.device,
            {**tensors, "grad_logits": grad_logits, "num_rows": num_rows, "num_experts": num_experts, "k": k}
            | {f"{name}_stride": tensor.stride(0) for name, tensor in tensors.items()},
            {"RENORMALIZE": renormalize},
            config,
        )

    tuning.run(GRADIENT, logits, "ieee", {"k": k}, launch)
    return grad_logits


def _columns(num_experts: int) -> int:
    return max(FEWEST_COLUMNS, triton.next_power_of_2(num_experts))


def _fitted(config: Config, columns: int) -> Config:
    """Return the configuration with blocks of about as many logits for this number of columns."""
    rows = max(1, config.blocks["BLOCK_N"] * FEWEST_COLUMNS // columns)
    return dataclasses.replace(config, blocks={"BLOCK_N": rows, "BLOCK_E": columns})
