"""The speed-of-light bound: its arithmetic compared with design figures, and rates from samples."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.core import bound
from bench.core.benchmark import Product, Work
from bench.ops.side_moe import SideMoE, level_backward, level_forward

N, E, R, D = 2816, 10, 64, 768


def test_forward_is_two_products_and_three_tensors_of_rows() -> None:
    assert level_forward(N, E, D, R, 4) == Work(4 * N * E * R * D, 3 * N * D * 4)


def test_backward_counts_rows_only_where_they_need_a_gradient() -> None:
    first = level_backward(N, E, D, R, 4, trainable=1, need_x=False)
    second = level_backward(N, E, D, R, 4, trainable=1, need_x=True)
    assert first.flop == 2 * N * E * R * D + 4 * N * R * D
    assert second.flop - first.flop == 2 * N * E * R * D
    assert second.bytes - first.bytes == N * D * 4


def test_two_levels_need_sixty_milliseconds_at_the_usual_size(cpu: torch.device) -> None:
    """About 60 ms in float32 at 350 GFLOP/s."""
    work = bound.total(SideMoE({"N": N, "E": E, "D": D, "R": R}, torch.float32, cpu).work())
    assert bound.seconds(work, bound.Rates(350e9, 20e9)) == pytest.approx(0.060, abs=0.002)


def test_the_slower_of_arithmetic_and_memory_counts() -> None:
    work = Work(flop=100.0, bytes=30.0)
    assert bound.seconds(work, bound.Rates(10.0, 10.0)) == 10.0
    assert bound.seconds(work, bound.Rates(1000.0, 10.0)) == 3.0
    assert bound.seconds(Work(bytes=30.0), bound.Rates(0.0, 10.0)) == 3.0


def test_rates_are_those_of_the_best_product(cpu: torch.device) -> None:
    products = [Product(2, 3, 4), Product(2, 4, 3)]
    tasks = bound.probes(products, torch.float32, cpu)
    samples = {name: [(1.0,), (1.0,), (1.0,)] for name in tasks}
    samples[next(name for name in tasks if "2x4x3" in name)] = [(0.5,), (0.5,), (9.0,)]
    assert bound.rates(samples, products, torch.float32) == bound.Rates(2 * 48.0, 2.0 * bound.COPIED_BYTES)


def test_a_narrow_dtype_is_measured_in_float32_too(cpu: torch.device) -> None:
    tasks = bound.probes([Product(2, 3, 4)], torch.bfloat16, cpu)
    assert {"float32", "bfloat16"} <= {word.removeprefix("torch.") for name in tasks for word in name.split()}
    assert all(task(0)[0] > 0 for task in tasks.values())


def test_a_gpu_is_measured_in_the_dtype_at_hand_and_copies_more() -> None:
    gpu = torch.device("cuda")
    assert bound._probe_dtypes(torch.bfloat16, gpu) == (torch.bfloat16,)
    assert bound._copied_bytes(gpu) > bound._copied_bytes(torch.device("cpu"))


def test_a_probe_on_a_gpu_runs_often_in_one_graph_and_rotates_its_rows() -> None:
    ran: list[int] = []

    def recorder(step: Callable[[], None]) -> tuple[Callable[[], None], None]:
        return step, None

    replay = bound.repeated([partial(ran.append, place) for place in range(3)], 20, recorder)
    assert ran == []
    replay()
    assert ran == [place % 3 for place in range(20)]
    assert bound.REPEATS >= 20
    assert bound.operand_sets(Product(131072, 768, 640), torch.bfloat16) == 3
    assert bound.operand_sets(Product(512, 768, 640), torch.bfloat16) == bound.REPEATS


def test_a_probe_on_a_gpu_counts_each_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def mark(self) -> None: ...

        def laps(self) -> tuple[float, ...]:
            return (10.0,)

    monkeypatch.setattr(bound, "Stopwatch", Watch)
    monkeypatch.setattr(bound, "repeated", lambda runs, count: lambda: None)
    assert bound._timed(torch.device("cuda"), [lambda: None])(0) == (10.0 / bound.REPEATS,)


def test_a_probe_that_does_not_fit_is_left_out(cpu: torch.device) -> None:
    products = [Product(2, 3, 4)]
    tasks = bound.probes(products, torch.float32, cpu)
    samples = {name: [(0.5,)] for name in tasks}
    assert bound.rates({name: laps for name, laps in samples.items() if "copy" in name}, products, torch.float32) == (
        0.0,
        4.0 * bound.COPIED_BYTES,
    )
    assert bound.rates({}, products, torch.float32) == (0.0, 0.0)
    assert bound.seconds(Work(100.0, 30.0), bound.Rates(0.0, 0.0)) == 0.0


def test_products_are_those_of_all_modalities(cpu: torch.device) -> None:
    workload = SideMoE({"N": N, "E": E, "D": D, "R": R, "M": 2}, torch.float32, cpu)
    assert list(workload.products()) == [Product(2 * N, D, E * R), Product(2 * N, E * R, D)]
