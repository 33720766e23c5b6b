"""Training steps: ours and the paper's train alike, and a wrong step is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.core.benchmark import Implementation, InputSets, Tensors, load_benchmark
from bench.core.correctness import Checked, Truth, check
from bench.core.measure import measure
from bench.e2e import non_differentiable
from bench.e2e.step import STEPS, training_step
from bench.e2e.step.training_step import TrainingStep
from tests.fakes import FailingCapture, FakeCapture
from xsmoe.nn import Recommender
from xsmoe.stream.cuda import graph_steps
from xsmoe_kernels import Utilization


def tiny(name: str, dtype: torch.dtype = torch.float32, **changed: int) -> TrainingStep:
    kind = load_benchmark(STEPS, name)
    sizes = {letter: values[0] for letter, values in {**kind.default_sizes, **kind.tiny_sizes}.items()} | changed
    benchmark = kind(sizes, dtype, torch.device("cpu"))
    assert isinstance(benchmark, TrainingStep)
    return benchmark


def checked(benchmark: TrainingStep, name: str, build: Callable[[], Implementation] | None = None) -> Checked:
    """Return a variant after its correctness check; `build` replaces its implementation."""
    variant = benchmark.variant(name)
    inputs = InputSets(benchmark)
    return check(benchmark, replace(variant, build=build or variant.build), inputs, Truth(benchmark, inputs.get(0)))


def train(implementation: Implementation, inputs: Tensors) -> None:
    assert implementation.whole_step is not None
    implementation.whole_step(inputs)


@pytest.mark.parametrize("name", STEPS)
def test_ours_and_the_papers_step_train_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingStep, "dropout", 0.0)
    benchmark = tiny(name)
    inputs = [benchmark.make_inputs() for _ in range(3)]
    losses = {}
    for kind in ("published", "plain", "ours"):
        built = benchmark.variant(kind).build()
        losses[kind] = []
        for _ in range(4):
            for one in inputs:
                train(built, one)
            losses[kind].append([float(built.forward(one)["y"].detach()) for one in inputs])
    assert min(losses["ours"][-1]) < max(losses["ours"][0])
    for kind in ("plain", "ours"):
        torch.testing.assert_close(torch.tensor(losses[kind]), torch.tensor(losses["published"]), rtol=1e-3, atol=1e-3)


def test_plain_has_our_optimizer_and_the_papers_step_has_torchs_default() -> None:
    made: dict[str, torch.optim.Optimizer] = {}
    benchmark = tiny("mean")
    for kind in ("published", "plain", "ours"):
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_, kind=kind: made.update({kind: optimizer}))
        try:
            train(benchmark.variant(kind).build(), benchmark.make_inputs())
        finally:
            hook.remove()
    usual = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=benchmark.config.lr).defaults
    assert made["published"].defaults == usual
    assert made["plain"].defaults == made["ours"].defaults == usual | {"fused": True}


def test_a_captured_step_passes_the_check_and_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", FakeCapture)
    monkeypatch.setattr(TrainingStep, "dropout", 0.0)
    benchmark = tiny("mean")
    row = checked(benchmark, "ours", benchmark._ours_captured).row
    assert row.status == "measured", row
    both = benchmark._ours_captured(), benchmark._ours()
    inputs = [benchmark.make_inputs() for _ in range(3)]
    for built in both:
        for one in inputs * 3:
            train(built, one)
    losses = [[float(built.forward(one)["y"].detach()) for one in inputs] for built in both]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-3)


def test_a_step_that_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", FailingCapture)
    benchmark = tiny("mean")
    row = checked(benchmark, "ours", benchmark._ours_captured).row
    assert row.status == "refused"
    assert "operation not permitted" in (row.reason or "")


def test_variants_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*, baselines: bool = False) -> set[str]:
        return {variant.name for variant in benchmark.variants() if variant.baseline or not baselines}

    benchmark, gpu_only = tiny("mean", torch.bfloat16), {"published-autocast", "ours-eager"}
    assert not gpu_only & names()
    assert not any(variant.cuda_graph for variant in benchmark.variants())
    monkeypatch.setattr(benchmark, "device", torch.device("cuda"))
    assert gpu_only <= names(baselines=True)
    assert benchmark.variant("ours").cuda_graph
    assert not benchmark.variant("ours-eager").cuda_graph
    monkeypatch.setattr(benchmark, "dtype", torch.float32)
    assert "published-autocast" not in names(), "it would be compared in float32"


def test_the_papers_step_in_float16_passes_the_check_and_trains() -> None:
    benchmark = tiny("mean", torch.bfloat16)
    found = checked(benchmark, "published", lambda: benchmark._paper(autocast_dtype=torch.float16))
    assert found.row.status == "measured", found.row
    built, inputs = found.implementation, benchmark.make_inputs()
    assert built is not None
    before = float(built.forward(inputs)["y"].detach())
    for _ in range(30):
        train(built, inputs)
    assert float(built.forward(inputs)["y"].detach()) < before


def test_with_cls_pooling_the_store_holds_one_row_for_the_first_level() -> None:
    for name, rows in (("cls", 1), ("mean", 7)):
        hidden = tiny(name).store.hidden(torch.arange(7))
        assert {levels[0].shape[0] for levels in hidden.values()} == {rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_step_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = tiny("mean", dtype)
    inputs = InputSets(benchmark)
    truth = Truth(benchmark, inputs.get(0))

    def status() -> str:
        return check(benchmark, benchmark.variant("ours"), inputs, truth).row.status

    assert status() == "measured"
    with monkeypatch.context() as patch:
        patch.setattr(training_step.np, "log", lambda share: 0 * share)
        assert status() == "refused", "no logQ"
    with monkeypatch.context() as patch:
        weights = {k: 0 * v if "frozen_up" in k else v for k, v in benchmark.weights.items()}
        patch.setattr(benchmark, "weights", weights)
        assert status() == "refused", "frozen experts without weights"
    with monkeypatch.context() as patch:
        enlarge_loss(patch)
        assert status() == "refused", "gradients a tenth too large"


def enlarge_loss(patch: pytest.MonkeyPatch) -> None:
    whole = Recommender.forward
    patch.setattr(Recommender, "forward", lambda *arguments: 1.1 * whole(*arguments))


def test_a_step_without_counters_is_compared_in_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = tiny("cls")
    row = checked(benchmark, "ours-uncounted").row
    assert row.status == "measured", row.reason
    assert (row.problem or "").endswith("not counted")
    counted, inputs = [], benchmark.make_inputs()
    monkeypatch.setattr(Utilization, "add_", lambda *_: counted.append(True))
    for name in ("ours-uncounted", "ours"):
        built = benchmark.variant(name).build()
        assert not counted
        train(built, inputs)
    assert counted
    enlarge_loss(monkeypatch)
    assert checked(benchmark, "ours-uncounted").row.status == "refused"


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_with_ids_is_compared_in_everything_else_and_trains_them(
    graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", FakeCapture)
    monkeypatch.setattr(TrainingStep, "id_rows", 60)
    if graphs:
        monkeypatch.setattr(TrainingStep, "_ours_default", TrainingStep._ours_captured)
    benchmark = tiny("mean")
    made: list[Recommender] = []
    our_step = TrainingStep._our_step

    def recorded(benchmark: TrainingStep, **options: bool) -> Any:
        ours = our_step(benchmark, **options)
        made.append(ours.model)
        return ours

    monkeypatch.setattr(TrainingStep, "_our_step", recorded)
    found = checked(benchmark, "ours-ids")
    assert found.row.status == "measured", found.row.reason
    assert found.implementation is not None
    inputs = benchmark.make_inputs()
    train(found.implementation, inputs)
    (model,) = made
    assert model.items.ids is not None
    trained = model.items.ids.weight.any(1)
    assert trained.any()
    assert trained.sum() < len(inputs["items"].unique()), "ID dropout omits some IDs"
    enlarge_loss(monkeypatch)
    assert checked(benchmark, "ours-ids").row.status == "refused"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_on_conditioned_hidden_states_is_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingStep, "dropout", 0.0)
    benchmark = tiny(name)
    row = checked(benchmark, "ours-conditioned").row
    assert (row.status, row.problem, row.remark) == ("measured", None, None), row.reason
    placed: list[Any] = []
    whole = training_step.ConditionedFeatures
    monkeypatch.setattr(
        training_step, "ConditionedFeatures", lambda *given: (placed.append(whole(*given)), placed[-1])[1]
    )
    both = [benchmark.variant(kind).build() for kind in ("ours", "ours-conditioned")]
    assert len(placed) == 1
    monkeypatch.setattr(whole, "hidden", None)
    inputs = benchmark.make_inputs()
    for built in both:
        train(built, inputs)
    first, second = (built.forward(inputs)["y"] for built in both)
    assert torch.equal(first, second)


def test_the_whole_step_is_timed() -> None:
    case = measure(tiny("mean"), ["published", "ours"], ["published"], seconds=0.01)
    assert [list(row.passes) for row in case.rows] == [["both"], ["both"]]


def test_no_compared_user_is_near_a_non_differentiable_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a ReLU's input is zero up to rounding, its slope is arbitrary, and a right step would be refused."""
    monkeypatch.setattr(non_differentiable, "NEAR", 1e-4)
    benchmark = tiny("mean")
    assert benchmark._near_non_differentiable(benchmark._draw_items(20)).any()
    for _ in range(5):
        assert not benchmark._near_non_differentiable(benchmark.make_inputs()["items"]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_weights_of_frozen_experts_are_not_saved_activations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They exist between steps. More experts save only columns and gates of every item, level and modality."""
    monkeypatch.setattr(
        TrainingStep, "_near_non_differentiable", lambda step, items: torch.zeros(len(items), dtype=torch.bool)
    )
    saved = {}
    for experts in (3, 9):
        benchmark = tiny("mean", dtype, E=experts)
        inputs = InputSets(benchmark)
        truth = Truth(benchmark, inputs.get(0))
        saved[experts] = check(benchmark, benchmark.variant("ours"), inputs, truth).row.saved_bytes
        items = len(inputs.get(0)["items"].unique())
    columns = benchmark.sizes["R"] * dtype.itemsize
    # Under autocast the gate rows are cast in every step.
    cast = 0 if dtype == torch.float32 else benchmark.sizes["D"] * dtype.itemsize
    assert saved[9] - saved[3] == 2 * 2 * 6 * (items * (columns + 4) + cast)
