"""Variants that run as CUDA graphs, with a recorder that runs on a CPU, and what only a GPU counts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import case, graph, measure, peak
from bench.case import timed
from bench.examine import Truth, examine, outcome
from bench.kernels.grouped_mm import GroupedMM
from bench.kernels.rank_of_target import RankOfTarget
from bench.kernels.route_topk import RouteTopk, _offsets_by_count, _offsets_by_search
from bench.kernels.side_moe import SideMoE
from bench.results import table
from bench.rows import Rows
from bench.workload import Absent, Tensors, Variant, Workload
from xsmoe_kernels import BackendUnavailable
from xsmoe_kernels.runtime import dispatch

CUDA = torch.device("cuda")


def recorder(step: graph.Step) -> tuple[Callable[[], None], tuple[Tensors, Tensors]]:
    """Replays by running again, and leaves the results where they were the first time, as a graph does."""
    found = step()

    def replay() -> None:
        for mine, new in zip(found, step(), strict=True):
            for name, tensor in mine.items():
                tensor.detach().copy_(new[name])

    return replay, found


def workloads() -> list[Workload]:
    cpu = torch.device("cpu")
    return [
        SideMoE({"N": 67, "E": 3, "D": 24, "R": 6, "M": 2}, torch.float32, cpu),
        GroupedMM({"M": 67, "E": 3, "K": 24, "P": 8}, torch.float32, cpu),
        RouteTopk({"N": 67, "E": 5, "k": 2}, torch.float32, cpu),
    ]


def with_graph(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    build = workload.build

    def build_graph(name: str) -> Variant:
        return graph.replayed(build("ours"), CUDA, recorder) if name == "ours-graph" else build(name)

    monkeypatch.setattr(workload, "build", build_graph)


@pytest.mark.parametrize("workload", workloads(), ids=lambda one: one.operator)
def test_a_replayed_step_passes_the_gate_on_every_set_of_rows(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.rows.ROTATED_BYTES", 1)
    with_graph(workload, monkeypatch)
    rows = Rows(workload)
    checked = examine(workload, "ours-graph", rows, Truth(workload, rows.get(0, None)))
    assert checked.row.status == "measured", checked.row
    assert checked.row.saved_bytes is None
    assert checked.variant is not None
    for turn in (1, 0):
        taken = rows.get(turn, None)
        again, expected = outcome(checked.variant, taken), outcome(workload.build("ours"), taken)
        assert set(again) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(again[name], tensor, msg=name)


def test_a_replayed_step_has_one_time_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workloads()[0]
    with_graph(workload, monkeypatch)
    found = case.measure(workload, ["naive", "ours", "ours-graph"], ["naive", "ours-graph"], seconds=0.01)
    naive, ours, graphed = found.rows
    assert set(naive.passes) == set(ours.passes) == {"forward", "backward", "both"}
    assert set(graphed.passes) == {"both"}
    assert set(graphed.passes["both"].against) == {"naive", "ours-graph"}
    assert set(ours.passes["forward"].against) == {"naive"}
    assert graphed.passes["both"].flop == ours.passes["both"].flop
    lines = [line for line in table(found).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_rows_are_copied_ahead_of_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workloads()[0]
    happened: list[str] = []

    def prepare(rows: Tensors) -> Tensors:
        happened.append("prepare")
        return rows

    def step(rows: Tensors) -> tuple[Tensors, Tensors]:
        happened.append("step")
        return {}, {}

    class Watch(measure.Stopwatch):
        def mark(self) -> None:
            happened.append("mark")
            super().mark()

    monkeypatch.setattr(case, "Stopwatch", Watch)
    monkeypatch.setattr(case, "flusher", lambda device: lambda: happened.append("flush"))
    variant = replace(workload.build("ours"), prepare=prepare, step=step)
    assert len(timed(workload, variant, Rows(workload))(0)) == 1
    assert happened == ["prepare", "flush", "mark", "step", "mark"]


def test_what_cannot_be_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workloads()[0]
    build = workload.build

    def fails(step: graph.Step) -> tuple[Callable[[], None], tuple[Tensors, Tensors]]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(workload, "build", lambda name: graph.replayed(build("ours"), CUDA, fails))
    rows = Rows(workload)
    truth = Truth(workload, rows.get(0, None))
    reason = "it cannot be recorded: operation not permitted when stream is capturing"
    for name, status in (("ours-graph", "refused"), ("eager-graph", "absent")):
        row = examine(workload, name, rows, truth).row
        assert (row.status, row.reason) == (status, reason)


def does_nothing(step: graph.Step) -> tuple[Callable[[], None], tuple[Tensors, Tensors]]:
    return lambda: None, step()


def says_the_same(step: graph.Step) -> tuple[Callable[[], None], tuple[Tensors, Tensors]]:
    found = step()
    before = [{name: tensor.detach().clone() for name, tensor in mine.items()} for mine in found]

    def replay() -> None:
        for mine, kept in zip(found, before, strict=True):
            for name, tensor in mine.items():
                tensor.detach().copy_(kept[name])

    return replay, found


@pytest.mark.parametrize("wrong", [does_nothing, says_the_same])
@pytest.mark.parametrize("workload", workloads(), ids=lambda one: one.operator)
def test_a_graph_that_does_not_read_its_rows_is_refused(
    workload: Workload, wrong: graph.Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = workload.build
    monkeypatch.setattr(workload, "build", lambda name: graph.replayed(build("ours"), CUDA, wrong))
    rows = Rows(workload)
    row = examine(workload, "ours-graph", rows, Truth(workload, rows.get(0, None))).row
    assert row.status == "refused", row
    assert "integers are wrong" in (row.reason or "") or "error" in (row.reason or "")


# NumPy's, of infinity less infinity and of 0 by 0, which Triton's interpreter divides outside of masks.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("workload", workloads(), ids=lambda one: one.operator)
def test_rivals_replay_too(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = graph.replayed
    monkeypatch.setattr(graph, "replayed", lambda variant, device: whole(variant, CUDA, recorder))
    rows = Rows(workload)
    truth = Truth(workload, rows.get(0, None))
    with monkeypatch.context() as patch:
        patch.setattr(workload, "device", CUDA)
        # By name either kind of kernels is slow here, or absent, as tests that ran before this one left it.
        others = ("compiled", "ours-triton", "ours-cuda")
        names = [name for name in workload.variants() if name.endswith("-graph") and not name.startswith(others)]
        assert set(workload.baselines()) <= set(workload.variants())
    assert len(names) >= 2
    for name in names:
        checked = examine(workload, name, rows, truth)
        assert checked.row.status in ("measured", "absent"), checked.row
        if checked.variant is not None:
            assert (checked.variant.name, checked.variant.like) == (name, name.removesuffix("-graph"))


@pytest.mark.parametrize("experts", [1, 5, 64])
def test_offsets_by_search_are_offsets_by_count(experts: int) -> None:
    chosen = torch.randint(experts, (67,), generator=torch.Generator().manual_seed(0)).sort().values
    found = _offsets_by_search(chosen, experts)
    assert found.dtype == torch.int64
    assert found.tolist() == _offsets_by_count(chosen, experts).tolist()


@pytest.mark.parametrize("workload", workloads(), ids=lambda one: one.operator)
def test_graphs_are_for_gpus(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(name.endswith("-graph") for name in (*workload.variants(), *workload.optional()))
    with pytest.raises(Absent, match="CUDA"):
        workload.build("ours-graph")
    monkeypatch.setattr(workload, "device", CUDA)
    assert "ours-graph" in workload.variants()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("workload", [one for one in workloads() if one.operator in ("side_moe", "route_topk")])
def test_kernels_are_measured_by_name_where_they_can_run(
    backend: str, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"ours-{backend}"
    assert name not in (*workload.variants(), *workload.optional())

    def select(operator: str, requested: str, *_: object) -> str:
        raise BackendUnavailable(f"{requested} has no GPU")

    monkeypatch.setattr(dispatch, "select", select)
    monkeypatch.setattr(workload, "device", CUDA)
    assert {name, f"{name}-graph"} <= set(workload.variants())
    for variant in (name, f"{name}-graph"):
        with pytest.raises(Absent, match=f"{backend} has no GPU"):
            workload.build(variant)


def test_ranks_are_measured_on_each_backend_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"M": 7, "C": 45, "d": 4}
    workload = RankOfTarget(sizes, torch.float32, torch.device("cpu"))
    names = {f"ours-{backend}{suffix}" for backend in ("triton", "cuda") for suffix in ("", "-graph")}
    assert names.isdisjoint((*workload.variants(), *workload.optional()))
    monkeypatch.setattr(workload, "device", CUDA)
    assert names <= set(workload.variants())
    narrow = RankOfTarget(sizes, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(narrow, "device", CUDA)
    for name in ("ours-cuda", "ours-cuda-graph"):
        with pytest.raises(Absent, match=r"'cuda' cannot serve rank_of_target on cuda torch\.bfloat16: "):
            narrow.build(name)


def test_static_rows_stay_where_they_are() -> None:
    static = graph.StaticRows()
    first = {"x": torch.ones(3, requires_grad=True), "n": torch.arange(3)}
    taken = static.take(first)
    place = taken["x"].data_ptr()
    again = static.take({"x": torch.full((3,), 2.0), "n": torch.arange(3) + 1})
    assert again["x"].data_ptr() == place
    assert again["x"].requires_grad
    assert again["x"].is_leaf
    assert again["x"].tolist() == [2, 2, 2]
    assert again["n"].tolist() == [1, 2, 3]
    assert first["x"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_a_variant_of_reduce_overhead_is_right_and_compiles_once() -> None:
    """On a CPU, where it has no graphs."""
    (row,) = case.measure(workloads()[0], ["compiled-graph"], (), seconds=0.01).rows
    assert row.status == "measured", row
    assert row.compile_seconds
    assert set(row.passes) == {"forward", "backward", "both"}


def test_the_peak_leaves_out_what_was_there_and_names_what_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    result = torch.zeros(10, 10)

    def step() -> list[Tensor]:
        return [result, result[:2]]

    for name, value in (("memory_allocated", 1000), ("max_memory_allocated", 2500)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    assert peak.measure_peak(step, CUDA) == (2500 - 1000, result.nbytes)


def test_the_peak_on_a_cpu_is_what_was_held_at_once(cpu: torch.device) -> None:
    size = 1 << 20

    def step() -> list[Tensor]:
        for _ in range(3):
            first = torch.zeros(size, dtype=torch.uint8)
            second = first.clone()
            del first, second
        return [torch.zeros(size // 2, dtype=torch.uint8)]

    assert peak.measure_peak(step, cpu) == (2 * size, size // 2)


def test_a_cpu_has_no_cache_to_flush() -> None:
    measure.flusher(torch.device("cpu"))()
