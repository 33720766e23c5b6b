"""Floors: their arithmetic against design figures, and rates from samples."""

import pytest
import torch

from bench import floor
from bench.kernels.side_moe import SideMoE, floor_backward, floor_forward
from bench.workload import Product, Work

N, E, R, D = 2816, 10, 64, 768


def test_forward_is_two_products_and_three_tensors_of_rows() -> None:
    assert floor_forward(N, E, D, R, 4) == Work(4 * N * E * R * D, 3 * N * D * 4)


def test_backward_counts_rows_only_where_they_need_a_gradient() -> None:
    first = floor_backward(N, E, D, R, 4, trainable=1, need_x=False)
    second = floor_backward(N, E, D, R, 4, trainable=1, need_x=True)
    assert first.flop == 2 * N * E * R * D + 4 * N * R * D
    assert second.flop - first.flop == 2 * N * E * R * D
    assert second.bytes - first.bytes == N * D * 4


def test_two_levels_take_sixty_milliseconds_at_the_usual_size(cpu: torch.device) -> None:
    """The architecture's figure: about 60 ms in float32 at 350 GFLOP/s."""
    work = floor.total(SideMoE({"N": N, "E": E, "D": D, "R": R}, torch.float32, cpu).work())
    assert floor.seconds(work, floor.Rates(350e9, 20e9)) == pytest.approx(0.060, abs=0.002)


def test_the_slower_of_arithmetic_and_memory_counts() -> None:
    work = Work(flop=100.0, bytes=30.0)
    assert floor.seconds(work, floor.Rates(10.0, 10.0)) == 10.0
    assert floor.seconds(work, floor.Rates(1000.0, 10.0)) == 3.0
    assert floor.seconds(Work(bytes=30.0), floor.Rates(0.0, 10.0)) == 3.0


def test_rates_take_the_best_product(cpu: torch.device) -> None:
    products = [Product(2, 3, 4), Product(2, 4, 3)]
    tasks = floor.probes(products, torch.float32, cpu)
    samples = {name: [(1.0,), (1.0,), (1.0,)] for name in tasks}
    samples[next(name for name in tasks if "2x4x3" in name)] = [(0.5,), (0.5,), (9.0,)]
    assert floor.rates(samples, products, torch.float32) == floor.Rates(2 * 48.0, 2.0 * floor.COPIED_BYTES)


def test_a_narrow_dtype_is_measured_in_float32_too(cpu: torch.device) -> None:
    tasks = floor.probes([Product(2, 3, 4)], torch.bfloat16, cpu)
    assert {"float32", "bfloat16"} <= {word.removeprefix("torch.") for name in tasks for word in name.split()}
    assert all(task(0)[0] > 0 for task in tasks.values())


def test_a_gpu_is_measured_in_the_dtype_at_hand_and_copies_more() -> None:
    gpu = torch.device("cuda")
    assert floor._dtypes(torch.bfloat16, gpu) == (torch.bfloat16,)
    assert floor._copied(gpu) > floor._copied(torch.device("cpu"))
