"""Variants that replay CUDA graphs, with a recorder for CPUs, and peak memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.core import cuda_graphs, measure, memory, timing
from bench.core.benchmark import Absent, Benchmark, InputSets, Tensors, Variant
from bench.core.correctness import Checked, check, outcome
from bench.core.measure import inputs_and_truth
from bench.core.results import Role
from bench.ops.grouped_mm import GroupedMM
from bench.ops.ranking import RankOfTarget
from bench.ops.route_topk import RouteTopk, _offsets_by_count, _offsets_by_search
from bench.ops.side_moe import SideMoE
from bench.report.tables import case_table
from xsmoe_kernels import BackendUnavailable
from xsmoe_kernels.runtime import dispatch

CUDA = torch.device("cuda")


Recorded = tuple[Callable[[], None], tuple[Tensors, Tensors]]


def recorder(step: cuda_graphs.Step) -> Recorded:
    """Replay by running again, and overwrite the first results, as a graph does."""
    found = step()

    def replay() -> None:
        for mine, new in zip(found, step(), strict=True):
            for name, tensor in mine.items():
                tensor.detach().copy_(new[name])

    return replay, found


def benchmarks() -> list[Benchmark]:
    cpu = torch.device("cpu")
    return [
        SideMoE({"N": 67, "E": 3, "D": 24, "R": 6, "M": 2}, torch.float32, cpu),
        GroupedMM({"M": 67, "E": 3, "K": 24, "P": 8}, torch.float32, cpu),
        RouteTopk({"N": 67, "E": 5, "k": 2}, torch.float32, cpu),
    ]


def graph_of_ours(
    benchmark: Benchmark, recorder: cuda_graphs.Recorder = recorder, name: str = "ours-graph", role: Role = Role.OURS
) -> Variant:
    """Return a variant that replays ours by a recorder."""
    ours = benchmark.variant("ours")
    build = lambda: cuda_graphs.replayed(ours.build(), CUDA, recorder)  # noqa: E731
    return replace(ours, name=name, role=role, build=build, cuda_graph=True, flop_like="ours")


def add_graph(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the graph of ours to a benchmark on a CPU."""
    found = [*benchmark.variants(), graph_of_ours(benchmark)]
    monkeypatch.setattr(benchmark, "variants", lambda: found)


def checked(benchmark: Benchmark, variant: Variant) -> Checked:
    return check(benchmark, variant, *inputs_and_truth(benchmark))


@pytest.mark.parametrize("benchmark_", benchmarks(), ids=lambda one: one.operator)
def test_a_replayed_step_is_right_on_every_set_of_inputs(benchmark_: Benchmark) -> None:
    inputs, truth = inputs_and_truth(benchmark_)
    graph = check(benchmark_, graph_of_ours(benchmark_), inputs, truth)
    assert graph.row.status == "measured", graph.row
    assert graph.row.cuda_graph
    assert graph.row.saved_bytes is None
    assert graph.implementation is not None
    for turn in (1, 0):
        mine = inputs.get(turn)
        again, expected = outcome(graph.implementation, mine), outcome(benchmark_.variant("ours").build(), mine)
        assert set(again) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(again[name], tensor, msg=name)


def test_a_replayed_step_has_one_time_for_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    side_moe = benchmarks()[0]
    add_graph(side_moe, monkeypatch)
    found = measure.measure(side_moe, ["naive", "ours", "ours-graph"], ["naive", "ours-graph"], seconds=0.01)
    naive, ours, graph = found.rows
    assert set(naive.passes) == set(ours.passes) == {"forward", "backward", "both"}
    assert set(graph.passes) == {"both"}
    assert set(graph.passes["both"].against) == {"naive", "ours-graph"}
    assert set(ours.passes["forward"].against) == {"naive"}
    assert graph.passes["both"].flop == ours.passes["both"].flop
    lines = [line for line in case_table(found).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_inputs_are_copied_before_the_timed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    side_moe = benchmarks()[0]
    happened: list[str] = []

    def prepare(inputs: Tensors) -> Tensors:
        happened.append("prepare")
        return inputs

    def step(_: Tensors) -> tuple[Tensors, Tensors]:
        happened.append("step")
        return {}, {}

    class Watch(timing.Stopwatch):
        def mark(self) -> None:
            happened.append("mark")
            super().mark()

    monkeypatch.setattr(measure, "Stopwatch", Watch)
    monkeypatch.setattr(measure, "flusher", lambda device: lambda: happened.append("flush"))
    ours = side_moe.variant("ours")
    built = replace(ours.build(), prepare=prepare, step=step)
    assert len(measure._timed(side_moe, ours, built, InputSets(side_moe))(0)) == 1
    assert happened == ["prepare", "flush", "mark", "step", "mark"]


def test_a_step_that_cannot_be_captured_is_refused() -> None:
    def fails(step: cuda_graphs.Step) -> Recorded:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    side_moe = benchmarks()[0]
    reason = "it cannot be recorded: operation not permitted when stream is capturing"
    for role, status in ((Role.OURS, "refused"), (Role.EAGER, "absent")):
        row = checked(side_moe, graph_of_ours(side_moe, fails, role=role)).row
        assert (row.status, row.reason) == (status, reason)


def does_nothing(step: cuda_graphs.Step) -> Recorded:
    return lambda: None, step()


def repeats_the_first_results(step: cuda_graphs.Step) -> Recorded:
    found = step()
    before = [{name: tensor.detach().clone() for name, tensor in mine.items()} for mine in found]

    def replay() -> None:
        for mine, kept in zip(found, before, strict=True):
            for name, tensor in mine.items():
                tensor.detach().copy_(kept[name])

    return replay, found


@pytest.mark.parametrize("wrong", [does_nothing, repeats_the_first_results])
@pytest.mark.parametrize("benchmark_", benchmarks(), ids=lambda one: one.operator)
def test_a_graph_that_does_not_read_its_inputs_is_refused(benchmark_: Benchmark, wrong: cuda_graphs.Recorder) -> None:
    row = checked(benchmark_, graph_of_ours(benchmark_, wrong)).row
    assert row.status == "refused", row
    assert "integers are wrong" in (row.reason or "") or "error" in (row.reason or "")


# NumPy's, of infinity less infinity and of 0 by 0, which Triton's interpreter divides outside of masks.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("benchmark_", benchmarks(), ids=lambda one: one.operator)
def test_baselines_are_replayed_too(benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cuda_graphs.replayed
    monkeypatch.setattr(cuda_graphs, "replayed", lambda built, device: whole(built, CUDA, recorder))
    inputs, truth = inputs_and_truth(benchmark_)
    with monkeypatch.context() as patch:
        patch.setattr(benchmark_, "device", CUDA)
        found = [one for one in benchmark_.variants() if one.cuda_graph and not one.compiled]
    # Kernels by name are slow here, or absent, depending on tests that ran before.
    graphs = [one for one in found if not one.name.startswith(("ours-triton", "ours-cuda"))]
    assert len(graphs) >= 2
    for variant in graphs:
        row = check(benchmark_, variant, inputs, truth).row
        assert row.status in ("measured", "absent"), row
        assert row.cuda_graph
        assert variant.flop_like == variant.name.removesuffix("-graph")


@pytest.mark.parametrize("experts", [1, 5, 64])
def test_offsets_by_search_are_offsets_by_count(experts: int) -> None:
    chosen = torch.randint(experts, (67,), generator=torch.Generator().manual_seed(0)).sort().values
    found = _offsets_by_search(chosen, experts)
    assert found.dtype == torch.int64
    assert found.tolist() == _offsets_by_count(chosen, experts).tolist()


@pytest.mark.parametrize("benchmark_", benchmarks(), ids=lambda one: one.operator)
def test_graphs_are_for_gpus(benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(one.cuda_graph for one in benchmark_.variants())
    with pytest.raises(Absent, match="CUDA"):
        cuda_graphs.replayed(benchmark_.variant("ours").build(), benchmark_.device)
    monkeypatch.setattr(benchmark_, "device", CUDA)
    assert benchmark_.variant("ours-graph").cuda_graph


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("place", [0, 2], ids=["side_moe", "route_topk"])
def test_backends_have_variants_on_a_gpu(backend: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = benchmarks()[place]
    name = f"ours-{backend}"
    assert name not in [one.name for one in benchmark.variants()]

    def select(operator: str, requested: str, *_: object) -> str:
        raise BackendUnavailable(f"{requested} has no GPU")

    monkeypatch.setattr(dispatch, "select", select)
    monkeypatch.setattr(benchmark, "device", CUDA)
    for variant in benchmark.select([name, f"{name}-graph"]):
        assert variant.default
        with pytest.raises(Absent, match=f"{backend} has no GPU"):
            variant.build()


def test_ranks_are_measured_on_each_backend_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"M": 7, "C": 45, "d": 4}
    benchmark = RankOfTarget(sizes, torch.float32, torch.device("cpu"))
    names = {f"ours-{backend}{suffix}" for backend in ("triton", "cuda") for suffix in ("", "-graph")}
    assert names.isdisjoint(one.name for one in benchmark.variants())
    monkeypatch.setattr(benchmark, "device", CUDA)
    assert names <= {one.name for one in benchmark.variants()}
    narrow = RankOfTarget(sizes, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(narrow, "device", CUDA)
    for variant in narrow.select(["ours-cuda", "ours-cuda-graph"]):
        with pytest.raises(Absent, match=r"'cuda' cannot run rank_of_target on cuda torch\.bfloat16: "):
            variant.build()


def test_static_inputs_have_fixed_addresses() -> None:
    static = cuda_graphs.StaticInputs()
    first = {"x": torch.ones(3, requires_grad=True), "n": torch.arange(3)}
    taken = static.copy(first)
    place = taken["x"].data_ptr()
    again = static.copy({"x": torch.full((3,), 2.0), "n": torch.arange(3) + 1})
    assert again["x"].data_ptr() == place
    assert again["x"].requires_grad
    assert again["x"].is_leaf
    assert again["x"].tolist() == [2, 2, 2]
    assert again["n"].tolist() == [1, 2, 3]
    assert first["x"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_a_variant_of_reduce_overhead_is_right_and_compiles_once() -> None:
    """Run on a CPU, where it has no graphs."""
    (row,) = measure.measure(benchmarks()[0], ["compiled-graph"], (), seconds=0.01).rows
    assert row.status == "measured", row
    assert row.compile_seconds
    assert set(row.passes) == {"forward", "backward", "both"}


def test_the_peak_excludes_existing_memory_and_counts_results_once(monkeypatch: pytest.MonkeyPatch) -> None:
    result = torch.zeros(10, 10)

    def step() -> list[Tensor]:
        return [result, result[:2]]

    for name, value in (("memory_allocated", 1000), ("max_memory_allocated", 2500)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    assert memory.measure_peak(step, CUDA) == (2500 - 1000, result.nbytes)


def test_the_peak_on_a_cpu_is_the_most_at_once(cpu: torch.device) -> None:
    size = 1 << 20

    def step() -> list[Tensor]:
        for _ in range(3):
            first = torch.zeros(size, dtype=torch.uint8)
            second = first.clone()
            del first, second
        return [torch.zeros(size // 2, dtype=torch.uint8)]

    assert memory.measure_peak(step, cpu) == (2 * size, size // 2)


def test_a_cpu_has_no_cache_to_flush() -> None:
    timing.flusher(torch.device("cpu"))()
