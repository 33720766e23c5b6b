"""Every benchmark: all its variants are right, in every dtype, and the published formulation equals ours."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.cli.kernels import plan, realistic_sizes
from bench.core import baselines
from bench.core.benchmark import Benchmark, Implementation, Tensors, Variant, load_benchmark
from bench.core.correctness import UNEXPECTED, check, outcome
from bench.core.measure import inputs_and_truth, measure
from bench.core.results import Row
from bench.e2e.step import STEPS
from bench.ops import OPERATORS
from bench.ops.in_batch_softmax_loss import LIBRARIES, InBatchSoftmaxLoss
from bench.ops.side_moe import SideMoE
from tests.bench.helpers import change_build
from xsmoe_kernels.runtime import dispatch

DTYPES = (torch.float32, torch.bfloat16)
ALL = {**OPERATORS, **STEPS}


def tiny(name: str, dtype: torch.dtype) -> list[Benchmark]:
    kind = load_benchmark(ALL, name)
    letters = {**kind.default_sizes, **kind.tiny_sizes}
    return [kind(sizes, dtype, torch.device("cpu")) for sizes in realistic_sizes(kind, letters)]


def checked(benchmark: Benchmark, *names: str) -> list[Row]:
    inputs, truth = inputs_and_truth(benchmark)
    return [check(benchmark, variant, inputs, truth).row for variant in benchmark.select(names)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_variant_is_right(name: str, dtype: torch.dtype) -> None:
    for benchmark in tiny(name, dtype):
        for row in checked(benchmark, *(one.name for one in benchmark.variants() if not one.compiled)):
            assert row.status in ("measured", "absent"), f"{benchmark.sizes} {row.variant}: {row.reason}"
            assert not (row.reason or "").startswith(UNEXPECTED), f"{benchmark.sizes} {row.variant}: {row.reason}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_compiled_variant_is_right_and_compiles_once(name: str, dtype: torch.dtype) -> None:
    benchmark = tiny(name, dtype)[-1]
    names = [one.name for one in benchmark.variants() if one.compiled]
    case = measure(benchmark, names, (), seconds=0.01)
    assert [row.status for row in case.rows] == ["measured"] * len(names), case.rows


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_published_formulation_is_ours_to_rounding(cpu: torch.device, experts: int) -> None:
    benchmark = SideMoE({"N": 67, "E": experts, "D": 24, "R": 6}, torch.float32, cpu)
    inputs = benchmark.make_inputs()
    naive, ours = (outcome(one.build(), inputs) for one in benchmark.select(["naive", "ours"]))
    assert set(naive) == set(ours) == set(benchmark.exact(inputs))
    assert {name.split()[-1] for name in ours} == {"y", "router", "down", "up", "norm", "gate"}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, naive[name], rtol=1e-4, atol=1e-4, check_dtype=False, msg=name)


def test_the_exact_result_does_not_depend_on_its_chunks(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)
    inputs = benchmark.make_inputs()
    whole = benchmark.exact(inputs)
    monkeypatch.setattr("bench.ops.side_moe.EXACT_ROWS", 10)
    for name, tensor in benchmark.exact(inputs).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


def test_published_formulation_saves_every_output_and_ours_does_not(cpu: torch.device) -> None:
    rows, experts, dim, rank = 256, 10, 96, 8
    benchmark = SideMoE({"N": rows, "E": experts, "D": dim, "R": rank}, torch.float32, cpu)
    case = measure(benchmark, ["naive", "ours", "ours-recompute"], ["naive"], seconds=0.01)
    naive, ours, lean = (row.saved_bytes or 0 for row in case.rows)
    assert naive > 2 * rows * (experts + 1) * dim * 4
    # The first level's output, the gates, and what is E*R wide.
    assert ours >= lean + 2 * rows * experts * rank * 4
    assert lean < rows * (dim + 4 * experts) * 4


@pytest.mark.slow
def test_the_loss_needs_less_than_a_twentieth_of_the_memory_of_its_baselines(cpu: torch.device) -> None:
    """Use the threads of bench/results. Results and gradients are half of our peak."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        benchmark = InBatchSoftmaxLoss({"B": 256, "C": 2640, "d": 128}, torch.float32, cpu)
        peaks = {row.variant: row.peak_bytes or 0 for row in checked(benchmark, "published", "eager", "ours")}
    finally:
        torch.set_num_threads(before)
    assert peaks["ours"] > 2 * (2560 + 2640) * 128
    assert 20 * peaks["ours"] < peaks["eager"] < peaks["published"]


class FakeModule:
    """Both libraries in plain PyTorch."""

    @staticmethod
    def linear_cross_entropy(queries: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(queries @ items.T, targets)

    class LigerFusedLinearCrossEntropyLoss:
        def __call__(self, items: torch.Tensor, queries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return FakeModule.linear_cross_entropy(queries, items, targets)


def tiny_loss(cpu: torch.device) -> InBatchSoftmaxLoss:
    return InBatchSoftmaxLoss({"B": 3, "C": 29, "d": 16}, torch.float32, cpu)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_is_checked_against_the_plain_loss(
    cpu: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    benchmark = tiny_loss(cpu)
    assert checked(benchmark, name)[0].reason == f"{name} needs a CUDA device, not cpu"
    monkeypatch.setattr(baselines, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    (missing,) = checked(benchmark, name)
    assert missing.status == "absent"
    assert missing.reason.startswith(f"{name} is not installed")
    monkeypatch.setitem(sys.modules, LIBRARIES[name], FakeModule)
    ours, theirs = checked(benchmark, "ours-plain", name)
    for row in (ours, theirs):
        assert row.status == "measured", row.reason
        assert row.problem == "30 queries of 3 users against 29 items without rejected items, counts and logQ"
    assert (ours.backend, theirs.backend) == (dispatch.select(benchmark.operator, "auto", cpu, torch.float32), None)


def test_a_library_that_fails_is_absent_and_one_that_is_wrong_is_refused(
    cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = tiny_loss(cpu)
    monkeypatch.setattr(baselines, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", FakeModule)
    right = FakeModule.linear_cross_entropy

    def fails(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("only bfloat16")

    monkeypatch.setattr(FakeModule, "linear_cross_entropy", staticmethod(fails))
    assert checked(benchmark, "cut-cross-entropy")[0].reason == "cut-cross-entropy fails here: only bfloat16"
    wrong = staticmethod(lambda queries, items, targets: right(queries * 1.001, items, targets))
    monkeypatch.setattr(FakeModule, "linear_cross_entropy", wrong)
    assert checked(benchmark, "cut-cross-entropy")[0].status == "refused"


@pytest.mark.parametrize("place", ["build", "forward"])
def test_a_baseline_that_raises_is_absent_and_errors_of_ours_are_raised(
    place: str, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = SideMoE({"N": 5, "E": 2, "D": 8, "R": 2}, torch.float32, cpu)

    def fails(*_: object) -> Tensors:
        raise IndexError("no such row\nat all")

    def broken(variant: Variant) -> Implementation:
        return replace(variant.build(), forward=fails) if place == "forward" else fails()  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        change_build(patch, benchmark, "eager", broken)
        eager, ours = measure(benchmark, ["eager", "ours"], ["eager"], seconds=0.01).rows
    assert (eager.status, eager.reason) == ("absent", f"{UNEXPECTED} IndexError: no such row")
    assert ours.status == "measured"
    change_build(monkeypatch, benchmark, "ours", broken)
    with pytest.raises(IndexError, match="no such row"):
        measure(benchmark, ["eager", "ours"], ["eager"], seconds=0.01)


def wrong_y(built: Implementation) -> Implementation:
    def forward(inputs: Tensors) -> Tensors:
        y = built.forward(inputs)["y"]
        return {"y": torch.cat((y[:-1], y[-1:] * 1.01))}

    return replace(built, forward=forward)


def wrong_gradient(built: Implementation) -> Implementation:
    def normalize(name: str, gradient: Tensor) -> Tensor:
        return built.normalize(name, gradient) * (1.001 if name.endswith("down") else 1)

    return replace(built, normalize=normalize)


def wrong_counter(built: Implementation) -> Implementation:
    return replace(built, counters=lambda: {name: count * 1.0001 for name, count in built.counters().items()})


def unwritten(built: Implementation) -> Implementation:
    def forward(inputs: Tensors) -> Tensors:
        y = built.forward(inputs)["y"]
        return {"y": torch.cat((y[:-1], y[-1:] * 0 + torch.empty_like(y[-1:])))}

    return replace(built, forward=forward)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (wrong_y, "y: error"),
        (wrong_gradient, "level 1 down: error"),
        (wrong_counter, "level 1 norm: error"),
        (unwritten, "y: error nan"),
    ],
)
def test_a_wrong_kernel_gets_no_time(
    cpu: torch.device, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Implementation], Implementation], found: str
) -> None:
    benchmark = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)
    change_build(monkeypatch, benchmark, "ours", lambda ours: wrong(ours.build()))
    case = measure(benchmark, ["naive", "ours"], ["naive"], seconds=0.01)
    naive, ours = case.rows
    assert (naive.status, ours.status) == ("measured", "refused")
    assert found in (ours.reason or "")
    assert not ours.passes
    assert naive.passes["both"].median > 0


def test_a_variant_that_does_not_fit_is_skipped(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)
    monkeypatch.setattr("bench.core.machine.available_memory", lambda device: 1000)
    (row,) = measure(benchmark, ["naive"], ["naive"], seconds=0.01).rows
    assert row.status == "skipped"
    assert "are free" in (row.reason or "")


@pytest.mark.parametrize("name", ["reference", "ours"])
def test_two_modalities_are_two_side_networks(cpu: torch.device, name: str) -> None:
    sizes = {"N": 67, "E": 3, "D": 24, "R": 6}
    both, one = SideMoE({**sizes, "M": 2}, torch.float32, cpu), SideMoE({**sizes, "M": 1}, torch.float32, cpu)
    inputs = both.make_inputs()
    assert set(inputs) == {f"modality {m} {name}" for m in (1, 2) for name in ("x", "backbone 1", "backbone 2", "grad")}
    found = outcome(both.variant(name).build(), inputs)
    for place in (0, 1):
        prefix = f"modality {place + 1} "
        one.weights = both.weights[place : place + 1]
        expected = one.exact({key.removeprefix(prefix): t for key, t in inputs.items() if key.startswith(prefix)})
        mine = {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}
        assert set(mine) == set(expected)
        for result, tensor in expected.items():
            torch.testing.assert_close(mine[result].double(), tensor, rtol=1e-4, atol=1e-4, msg=result)


def test_every_variant_of_two_modalities_is_right(cpu: torch.device) -> None:
    benchmark = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6, "M": 2}, torch.bfloat16, cpu)
    names = "naive", "naive-autocast", "naive-narrow", "eager", "ours", "ours-recompute", "reference"
    for row in checked(benchmark, *names):
        assert row.status == "measured", f"{row.variant}: {row.reason}"


def test_work_counts_every_modality(cpu: torch.device) -> None:
    sizes = {"N": 67, "E": 3, "D": 24, "R": 6}
    one, three = (SideMoE({**sizes, "M": count}, torch.float32, cpu) for count in (1, 3))
    for name, work in one.work().items():
        assert three.work()[name].flop == 3 * work.flop
        assert three.work()[name].bytes == 3 * work.bytes
    assert three.variant("naive").peak_estimate == 3 * one.variant("naive").peak_estimate
    products = one.variant("ours").build().flop, three.variant("ours").build().flop
    assert products[0]
    assert products[1]
    assert products[1] == {name: 3 * flop for name, flop in products[0].items()}


@pytest.mark.parametrize("operator", OPERATORS)
def test_our_float16_is_right(operator: str) -> None:
    """Baselines need not be right: their sums may leave the range of float16."""
    (row,) = checked(tiny(operator, torch.float16)[-1], "ours")
    assert row.status == "measured", row


def test_a_gpu_has_other_sizes() -> None:
    options = argparse.Namespace(
        registry=OPERATORS,
        sizes=["D=48"],
        names=["side_moe"],
        quick=False,
        dtype="bfloat16",
        variants="ours",
        against=None,
    )
    sizes = [sizes for _, sizes, _, _ in plan(options, torch.device("cpu"))]
    assert {one["N"] for one in sizes} == {256, 2816, 20000}
    assert {(one["D"], one["M"]) for one in sizes} == {(48, 1)}
    assert dict(SideMoE.default_sizes | SideMoE.cuda_sizes)["N"] == (256, 2816, 65536)
    assert dict(SideMoE.default_sizes | SideMoE.cuda_sizes)["M"] == (2,)
