"""The training step's room: ours and the published one train alike, and a step that is wrong is refused."""

from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.case import measure
from bench.examine import Truth, examine
from bench.rows import Rows
from bench.steps import ROOMS, room, training_step
from bench.steps.training_step import TrainingStep
from bench.workload import Absent
from tests.stand_ins import Cannot, StandIn
from xsmoe.nn import Recommender
from xsmoe.stream.cuda import graph_steps
from xsmoe_kernels import Utilization


def tiny(name: str, dtype: torch.dtype = torch.float32, **changed: int) -> TrainingStep:
    kind = room(name)
    sizes = {letter: values[0] for letter, values in {**kind.letters, **kind.tiny_sizes}.items()} | changed
    workload = kind(sizes, dtype, torch.device("cpu"))
    assert isinstance(workload, TrainingStep)
    return workload


@pytest.mark.parametrize("name", ROOMS)
def test_ours_and_the_published_step_train_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingStep, "dropout", 0.0)
    workload = tiny(name)
    rows = [workload.draw() for _ in range(3)]
    losses = {}
    for kind in ("published", "plain", "ours"):
        variant = workload.build(kind)
        assert variant.whole is not None
        losses[kind] = []
        for _ in range(4):
            for drawn in rows:
                variant.whole(drawn)
            losses[kind].append([float(variant.forward(drawn)["y"].detach()) for drawn in rows])
    assert min(losses["ours"][-1]) < max(losses["ours"][0])
    for kind in ("plain", "ours"):
        torch.testing.assert_close(torch.tensor(losses[kind]), torch.tensor(losses["published"]), rtol=1e-3, atol=1e-3)


def test_plain_trains_with_the_optimizer_of_ours_and_the_published_step_with_torchs_default() -> None:
    made: dict[str, torch.optim.Optimizer] = {}
    workload = tiny("mean")
    for kind in ("published", "plain", "ours"):
        variant = workload.build(kind)
        assert variant.whole is not None
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_, kind=kind: made.update({kind: optimizer}))
        try:
            variant.whole(workload.draw())
        finally:
            hook.remove()
    usual = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=workload.config.lr).defaults
    assert made["published"].defaults == usual
    assert made["plain"].defaults == made["ours"].defaults == usual | {"fused": True}


def test_a_captured_step_passes_the_gate_and_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", StandIn)
    monkeypatch.setattr(TrainingStep, "dropout", 0.0)
    workload = tiny("mean")
    rows = Rows(workload)
    build = workload.build
    monkeypatch.setattr(
        workload, "build", lambda name: workload._ours_captured(name) if name == "ours" else build(name)
    )
    checked = examine(workload, "ours", rows, Truth(workload, rows.get(0, None)))
    assert checked.row.status == "measured", checked.row
    mine, expected = workload.build("ours"), build("ours")
    drawn = [workload.draw() for _ in range(3)]
    for variant in (mine, expected):
        assert variant.whole is not None
        for one in drawn * 3:
            variant.whole(one)
    losses = [[float(variant.forward(one)["y"].detach()) for one in drawn] for variant in (mine, expected)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-3)


def test_a_step_that_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", Cannot)
    workload = tiny("mean")
    monkeypatch.setattr(workload, "build", workload._ours_captured)
    rows = Rows(workload)
    row = examine(workload, "ours", rows, Truth(workload, rows.get(0, None))).row
    assert row.status == "refused"
    assert "operation not permitted" in (row.reason or "")


def test_what_only_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = tiny("mean", torch.bfloat16)
    for name, reason in {"published-autocast": "float16 autocast", "ours-eager": "no step is captured"}.items():
        assert name not in workload.variants()
        with pytest.raises(Absent, match=reason):
            workload.build(name)
    monkeypatch.setattr(workload, "device", torch.device("cuda"))
    assert {"published-autocast", "ours-eager"} <= set(workload.baselines())
    monkeypatch.setattr(workload, "dtype", torch.float32)
    assert "published-autocast" not in workload.variants(), "it would be judged in float32"


def test_the_published_step_in_float16_passes_the_gate_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = tiny("mean", torch.bfloat16)
    rows = Rows(workload)
    monkeypatch.setattr(workload, "build", lambda name: workload._published(name, scaled=True))
    checked = examine(workload, "published-autocast", rows, Truth(workload, rows.get(0, None)))
    assert checked.row.status == "measured", checked.row
    variant, drawn = checked.variant, workload.draw()
    assert variant is not None
    assert variant.whole is not None
    before = float(variant.forward(drawn)["y"].detach())
    for _ in range(30):
        variant.whole(drawn)
    assert float(variant.forward(drawn)["y"].detach()) < before


def test_with_cls_pooling_the_store_holds_one_row_for_the_first_level() -> None:
    given = tiny("cls").store.hidden(torch.arange(7))
    assert {levels[0].shape[0] for levels in given.values()} == {1}
    assert {levels[0].shape[0] for levels in tiny("mean").store.hidden(torch.arange(7)).values()} == {7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_step_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = tiny("mean", dtype)
    rows = Rows(workload)
    truth = Truth(workload, rows.get(0, None))

    def status() -> str:
        return examine(workload, "ours", rows, truth).row.status

    assert status() == "measured"
    with monkeypatch.context() as patch:
        patch.setattr(training_step.np, "log", lambda share: 0 * share)
        assert status() == "refused", "no logQ"
    with monkeypatch.context() as patch:
        weights = {k: 0 * v if "frozen_up" in k else v for k, v in workload.weights.items()}
        patch.setattr(workload, "weights", weights)
        assert status() == "refused", "frozen experts without weights"
    whole = Recommender.forward
    with monkeypatch.context() as patch:
        patch.setattr(Recommender, "forward", lambda *arguments: 1.1 * whole(*arguments))
        assert status() == "refused", "gradients a tenth too large"


def test_a_step_that_counts_nothing_is_held_to_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = tiny("cls")
    rows = Rows(workload)
    truth = Truth(workload, rows.get(0, None))
    row = examine(workload, "ours-uncounted", rows, truth).row
    assert row.status == "measured", row.reason
    assert (row.remark or "").endswith("not counted")
    grown = []
    monkeypatch.setattr(Utilization, "add_", lambda *_: grown.append(True))
    for name in ("ours-uncounted", "ours"):
        variant = workload.build(name)
        assert variant.whole is not None
        assert not grown
        variant.whole(rows.get(0, None))
    assert grown
    whole = Recommender.forward
    monkeypatch.setattr(Recommender, "forward", lambda *arguments: 1.1 * whole(*arguments))
    assert examine(workload, "ours-uncounted", rows, truth).row.status == "refused"


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_with_ids_is_held_to_all_else_and_trains_them(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_steps, "CudaCapture", StandIn)
    monkeypatch.setattr(TrainingStep, "id_rows", 60)
    if graphs:
        monkeypatch.setattr(TrainingStep, "_ours", lambda step, name, backend: step._ours_captured(name))
    workload = tiny("mean")
    rows = Rows(workload)
    truth = Truth(workload, rows.get(0, None))
    made: list[Recommender] = []
    step = TrainingStep._step

    def noted(workload: TrainingStep, **options: bool) -> Any:
        ours = step(workload, **options)
        made.append(ours.model)
        return ours

    monkeypatch.setattr(TrainingStep, "_step", noted)
    checked = examine(workload, "ours-ids", rows, truth)
    assert checked.row.status == "measured", checked.row.reason
    assert checked.variant is not None
    assert checked.variant.whole is not None
    drawn = rows.get(0, None)
    checked.variant.whole(drawn)
    (model,) = made
    assert model.items.ids is not None
    trained = model.items.ids.weight.any(1)
    assert trained.any()
    assert trained.sum() < len(drawn["items"].unique()), "some IDs are left out"
    whole = Recommender.forward
    monkeypatch.setattr(Recommender, "forward", lambda *arguments: 1.1 * whole(*arguments))
    assert examine(workload, "ours-ids", rows, truth).row.status == "refused"


@pytest.mark.parametrize("name", ROOMS)
def test_a_step_on_conditioned_hidden_states_is_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingStep, "dropout", 0.0)
    workload = tiny(name)
    rows = Rows(workload)
    row = examine(workload, "ours-conditioned", rows, Truth(workload, rows.get(0, None))).row
    assert (row.status, row.remark) == ("measured", None), row.reason
    placed: list[Any] = []
    whole = training_step.ConditionedFeatures
    monkeypatch.setattr(
        training_step, "ConditionedFeatures", lambda *given: (placed.append(whole(*given)), placed[-1])[1]
    )
    variants = [workload.build(kind) for kind in ("ours", "ours-conditioned")]
    assert len(placed) == 1
    monkeypatch.setattr(whole, "hidden", None)
    drawn = rows.get(0, None)
    for variant in variants:
        assert variant.whole is not None
        variant.whole(drawn)
    first, second = (variant.forward(drawn)["y"] for variant in variants)
    assert torch.equal(first, second)


def test_what_is_timed_is_the_whole_step() -> None:
    case = measure(tiny("mean"), ["published", "ours"], ["published"], seconds=0.01)
    assert [list(row.passes) for row in case.rows] == [["both"], ["both"]]


def test_no_user_that_is_judged_is_near_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is zero to rounding, a ReLU's slope is anyone's guess, and a right step would be refused."""
    monkeypatch.setattr("bench.kinks.NEAR", 1e-4)
    workload = tiny("mean")
    assert workload._near_jumps(workload._drawn(20)).any()
    for _ in range(5):
        assert not workload._near_jumps(workload.draw()["items"]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_of_frozen_experts_are_not_saved_for_backward(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held between steps: what more experts save is columns and gates of every item, level and modality."""
    monkeypatch.setattr(TrainingStep, "_near_jumps", lambda step, items: torch.zeros(len(items), dtype=torch.bool))
    saved = {}
    for experts in (3, 9):
        workload = tiny("mean", dtype, E=experts)
        rows = Rows(workload)
        saved[experts] = examine(workload, "ours", rows, Truth(workload, rows.get(0, None))).row.saved_bytes
        items = len(rows.get(0, None)["items"].unique())
    columns = workload.sizes["R"] * dtype.itemsize
    # Under autocast the gate's rows are cast in every step.
    cast = 0 if dtype == torch.float32 else workload.sizes["D"] * dtype.itemsize
    assert saved[9] - saved[3] == 2 * 2 * 6 * (items * (columns + 4) + cast)
