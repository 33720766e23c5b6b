"""Every room: all its variants are right, in every dtype, and its published formulation equals ours."""

import argparse
import sys
from dataclasses import replace

import pytest
import torch

from bench import kernels, steps
from bench.case import measure
from bench.examine import FAILS, Truth, examine, outcome
from bench.kernels import ROOMS, rivals, softmax_loss_rivals
from bench.kernels.in_batch_softmax_loss import InBatchSoftmaxLoss
from bench.kernels.side_moe import SideMoE
from bench.kernels_command import combinations, plan
from bench.rows import Rows
from bench.workload import Variant, Workload
from xsmoe_kernels.runtime import dispatch

DTYPES = (torch.float32, torch.bfloat16)


def tiny(operator: str, dtype: torch.dtype) -> list[Workload]:
    kind = (steps if operator in steps.ROOMS else kernels).room(operator)
    letters = {**kind.letters, **kind.tiny_sizes}
    return [kind(sizes, dtype, torch.device("cpu")) for sizes in filter(kind.sensible, combinations(letters))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", [*ROOMS, *steps.ROOMS])
def test_every_variant_is_right(operator: str, dtype: torch.dtype) -> None:
    for workload in tiny(operator, dtype):
        rows = Rows(workload)
        truth = Truth(workload, rows.get(0, None))
        for name in (*workload.variants(), *workload.optional()):
            if not name.startswith("compiled"):
                row = examine(workload, name, rows, truth).row
                assert row.status in ("measured", "absent"), f"{workload.sizes} {name}: {row.reason}"
                assert not (row.reason or "").startswith(FAILS), f"{workload.sizes} {name}: {row.reason}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", [*ROOMS, *steps.ROOMS])
def test_every_compiled_variant_is_right_and_does_not_compile_again(operator: str, dtype: torch.dtype) -> None:
    workload = tiny(operator, dtype)[-1]
    names = [name for name in (*workload.variants(), *workload.optional()) if name.startswith("compiled")]
    case = measure(workload, names, (), seconds=0.01)
    assert [row.status for row in case.rows] == ["measured"] * len(names), case.rows


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_published_formulation_is_ours_to_rounding(cpu: torch.device, experts: int) -> None:
    workload = SideMoE({"N": 67, "E": experts, "D": 24, "R": 6}, torch.float32, cpu)
    rows = workload.draw()
    naive, ours = (outcome(workload.build(name), rows) for name in ("naive", "ours"))
    assert set(naive) == set(ours) == set(workload.exact(rows))
    assert {name.split()[-1] for name in ours} == {"y", "router", "down", "up", "norm", "gate"}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, naive[name], rtol=1e-4, atol=1e-4, check_dtype=False, msg=name)


def test_the_exact_result_does_not_depend_on_its_chunks(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)
    rows = workload.draw()
    whole = workload.exact(rows)
    monkeypatch.setattr("bench.kernels.side_moe.EXACT_ROWS", 10)
    for name, tensor in workload.exact(rows).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


def test_published_formulation_saves_every_output_and_ours_does_not(cpu: torch.device) -> None:
    rows, experts, dim, rank = 256, 10, 96, 8
    workload = SideMoE({"N": rows, "E": experts, "D": dim, "R": rank}, torch.float32, cpu)
    case = measure(workload, ["naive", "ours", "ours-recompute"], ["naive"], seconds=0.01)
    naive, ours, lean = (row.saved_bytes or 0 for row in case.rows)
    assert naive > 2 * rows * (experts + 1) * dim * 4
    # The first level's output, the gates, and what is E*R wide.
    assert ours >= lean + 2 * rows * experts * rank * 4
    assert lean < rows * (dim + 4 * experts) * 4


@pytest.mark.slow
def test_the_loss_takes_under_a_twentieth_of_the_memory_of_its_rivals(cpu: torch.device) -> None:
    """On as many threads as the numbers in bench/results are from; results and gradients are half of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        workload = InBatchSoftmaxLoss({"B": 256, "C": 2640, "d": 128}, torch.float32, cpu)
        rows = Rows(workload)
        truth = Truth(workload, rows.get(0, None))
        peaks = {name: examine(workload, name, rows, truth).row.peak_bytes for name in ("published", "eager", "ours")}
    finally:
        torch.set_num_threads(before)
    assert peaks["ours"] > 2 * (2560 + 2640) * 128
    assert 20 * peaks["ours"] < peaks["eager"] < peaks["published"]


class FakeModule:
    """What both libraries look like, in plain PyTorch."""

    @staticmethod
    def linear_cross_entropy(queries: torch.Tensor, items: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(queries @ items.T, targets)

    class LigerFusedLinearCrossEntropyLoss:
        def __call__(self, items: torch.Tensor, queries: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return FakeModule.linear_cross_entropy(queries, items, targets)


def tiny_loss(cpu: torch.device) -> tuple[InBatchSoftmaxLoss, Rows, Truth]:
    workload = InBatchSoftmaxLoss({"B": 3, "C": 29, "d": 16}, torch.float32, cpu)
    rows = Rows(workload)
    return workload, rows, Truth(workload, rows.get(0, None))


@pytest.mark.parametrize("name", softmax_loss_rivals.MODULES)
def test_a_rival_of_the_plain_loss_is_held_to_that(
    cpu: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    workload, *drawn = tiny_loss(cpu)
    assert examine(workload, name, *drawn).row.reason == f"{name} needs a CUDA device, not cpu"
    monkeypatch.setattr(rivals, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, softmax_loss_rivals.MODULES[name], None)
    missing = examine(workload, name, *drawn).row
    assert missing.status == "absent"
    assert missing.reason.startswith(f"{name} is not installed")
    monkeypatch.setitem(sys.modules, softmax_loss_rivals.MODULES[name], FakeModule)
    ours, theirs = (examine(workload, one, *drawn).row for one in ("ours-plain", name))
    for row in (ours, theirs):
        assert row.status == "measured", row.reason
        assert row.remark.startswith("solves another problem: 30 queries")
        assert row.remark.endswith("without rejected items, counts and logQ")
    assert (ours.backend, theirs.backend) == (dispatch.select(workload.operator, "auto", cpu, torch.float32), None)


def test_a_rival_that_fails_is_absent_and_one_that_is_wrong_is_refused(
    cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, *drawn = tiny_loss(cpu)
    monkeypatch.setattr(rivals, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", FakeModule)
    right = FakeModule.linear_cross_entropy

    def fails(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("only bfloat16")

    monkeypatch.setattr(FakeModule, "linear_cross_entropy", staticmethod(fails))
    assert examine(workload, "cut-cross-entropy", *drawn).row.reason == "cut-cross-entropy fails here: only bfloat16"
    wrong = staticmethod(lambda queries, items, targets: right(queries * 1.001, items, targets))
    monkeypatch.setattr(FakeModule, "linear_cross_entropy", wrong)
    assert examine(workload, "cut-cross-entropy", *drawn).row.status == "refused"


@pytest.mark.parametrize("place", ["build", "forward"])
def test_what_a_rival_raises_makes_it_absent_and_what_ours_raises_is_raised(
    place: str, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = SideMoE({"N": 5, "E": 2, "D": 8, "R": 2}, torch.float32, cpu)
    build, broken = workload.build, ["eager"]

    def fails(*_: object) -> dict[str, torch.Tensor]:
        raise IndexError("no such row\nat all")

    def broken_build(name: str) -> Variant:
        if name not in broken:
            return build(name)
        return replace(build(name), forward=fails) if place == "forward" else fails()  # type: ignore[return-value]

    monkeypatch.setattr(workload, "build", broken_build)
    eager, ours = measure(workload, ["eager", "ours"], ["eager"], seconds=0.01).rows
    assert (eager.status, eager.reason) == ("absent", f"{FAILS} IndexError: no such row")
    assert ours.status == "measured"
    broken[:] = ["ours"]
    with pytest.raises(IndexError, match="no such row"):
        measure(workload, ["eager", "ours"], ["eager"], seconds=0.01)


def wrong_y(variant: Variant) -> Variant:
    def forward(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        y = variant.forward(rows)["y"]
        return {"y": torch.cat((y[:-1], y[-1:] * 1.01))}

    return replace(variant, forward=forward)


def wrong_gradient(variant: Variant) -> Variant:
    def tidy(name: str, gradient: torch.Tensor) -> torch.Tensor:
        return variant.tidy(name, gradient) * (1.001 if name.endswith("down") else 1)

    return replace(variant, tidy=tidy)


def wrong_counter(variant: Variant) -> Variant:
    def counters() -> dict[str, torch.Tensor]:
        return {name: counter * 1.0001 for name, counter in variant.counters().items()}

    return replace(variant, counters=counters)


def unwritten(variant: Variant) -> Variant:
    def forward(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        y = variant.forward(rows)["y"]
        return {"y": torch.cat((y[:-1], y[-1:] * 0 + torch.empty_like(y[-1:])))}

    return replace(variant, forward=forward)


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
    cpu: torch.device, monkeypatch: pytest.MonkeyPatch, wrong: object, found: str
) -> None:
    assert callable(wrong)
    workload = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)
    build = workload.build
    monkeypatch.setattr(workload, "build", lambda name: wrong(build(name)) if name == "ours" else build(name))
    case = measure(workload, ["naive", "ours"], ["naive"], seconds=0.01)
    naive, ours = case.rows
    assert (naive.status, ours.status) == ("measured", "refused")
    assert found in (ours.reason or "")
    assert not ours.passes
    assert naive.passes["both"].median > 0


def test_what_does_not_fit_is_skipped(cpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6}, torch.float32, cpu)
    monkeypatch.setattr("bench.machine.available", lambda device: 1000)
    (row,) = measure(workload, ["naive"], ["naive"], seconds=0.01).rows
    assert row.status == "skipped"
    assert "are free" in (row.reason or "")


@pytest.mark.parametrize("name", ["reference", "ours"])
def test_two_modalities_are_two_ladders(cpu: torch.device, name: str) -> None:
    sizes = {"N": 67, "E": 3, "D": 24, "R": 6}
    both, one = SideMoE({**sizes, "M": 2}, torch.float32, cpu), SideMoE({**sizes, "M": 1}, torch.float32, cpu)
    rows = both.draw()
    assert set(rows) == {f"modality {m} {name}" for m in (1, 2) for name in ("x", "backbone 1", "backbone 2", "grad")}
    found = outcome(both.build(name), rows)
    for place in (0, 1):
        prefix = f"modality {place + 1} "
        one.weights = both.weights[place : place + 1]
        expected = one.exact({key.removeprefix(prefix): t for key, t in rows.items() if key.startswith(prefix)})
        mine = {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}
        assert set(mine) == set(expected)
        for result, tensor in expected.items():
            torch.testing.assert_close(mine[result].double(), tensor, rtol=1e-4, atol=1e-4, msg=result)


def test_every_variant_of_two_modalities_is_right(cpu: torch.device) -> None:
    workload = SideMoE({"N": 67, "E": 3, "D": 24, "R": 6, "M": 2}, torch.bfloat16, cpu)
    rows = Rows(workload)
    truth = Truth(workload, rows.get(0, None))
    for name in ("naive", "naive-autocast", "naive-narrow", "eager", "ours", "ours-recompute", "reference"):
        row = examine(workload, name, rows, truth).row
        assert row.status == "measured", f"{name}: {row.reason}"


def test_work_counts_every_modality(cpu: torch.device) -> None:
    sizes = {"N": 67, "E": 3, "D": 24, "R": 6}
    one, three = (SideMoE({**sizes, "M": count}, torch.float32, cpu) for count in (1, 3))
    for name, work in one.work().items():
        assert three.work()[name].flop == 3 * work.flop
        assert three.work()[name].bytes == 3 * work.bytes
    assert three.memory("naive") == 3 * one.memory("naive")
    products = one.build("ours").products, three.build("ours").products
    assert products[0]
    assert products[1]
    assert products[1] == {name: 3 * flop for name, flop in products[0].items()}


@pytest.mark.parametrize("operator", ROOMS)
def test_our_float16_is_right(operator: str) -> None:
    """Rivals need not be: their sums may leave float16's range."""
    workload = tiny(operator, torch.float16)[-1]
    rows = Rows(workload)
    row = examine(workload, "ours", rows, Truth(workload, rows.get(0, None))).row
    assert row.status == "measured", row


def test_a_gpu_has_sizes_of_its_own() -> None:
    options = argparse.Namespace(
        rooms=kernels, sizes=["D=48"], names=["side_moe"], quick=False, dtype="bfloat16", variants="ours", against=None
    )
    sizes = [sizes for _, sizes, _, _ in plan(options, torch.device("cpu"))]
    assert {one["N"] for one in sizes} == {256, 2816, 20000}
    assert {(one["D"], one["M"]) for one in sizes} == {(48, 1)}
    assert dict(SideMoE.letters | SideMoE.cuda_sizes)["N"] == (256, 2816, 65536)
    assert dict(SideMoE.letters | SideMoE.cuda_sizes)["M"] == (2,)
