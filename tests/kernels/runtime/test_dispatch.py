"""Backend selection, and messages where no backend can run a call."""

import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels.helpers.compilation import compiled
from tests.kernels.helpers.side_level import make_level
from xsmoe_kernels import BackendUnavailable, Utilization, grouped_mm, side_moe, side_moe_group, use_backend
from xsmoe_kernels.ops.side_moe import reference
from xsmoe_kernels.runtime import dispatch

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    counter: Counter[tuple[str, str]] = Counter()
    monkeypatch.setattr(dispatch, "calls", counter)
    return counter


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the reference's functions for side_moe as a second backend; CUDA has none."""
    kernels = {operator: dict(backends) for operator, backends in dispatch._kernels.items()}
    monkeypatch.setattr(dispatch, "_kernels", kernels)
    monkeypatch.setattr(dispatch, "_limits", dict(dispatch._limits))
    for own in dispatch._kernels.values():
        own.pop("triton", None)
        own.pop("cuda", None)
    dispatch.register("side_moe", "triton", reference.forward)
    dispatch.register("side_moe_backward", "triton", reference.backward)


def test_the_reference_runs_forward_and_backward(calls: Counter[tuple[str, str]]) -> None:
    with use_backend("reference"):
        y = side_moe(*make_level(3, 4, 2, 2, dtype=torch.float32))
    y.sum().backward()
    assert calls == {("side_moe", "reference"): 1, ("side_moe_backward", "reference"): 1}


def test_every_operator_has_a_reference() -> None:
    assert "side_moe" in dispatch.operators()
    for operator in dispatch.operators():
        assert dispatch.unavailable_reason(operator, "reference", CPU, torch.float32) is None


def test_float64_runs_on_the_reference(calls: Counter[tuple[str, str]]) -> None:
    side_moe(*make_level(3, 4, 2, 2, dtype=torch.float64))
    assert calls == {("side_moe", "reference"): 1}


def test_a_backend_without_kernels_says_so_and_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    level, counters = make_level(3, 4, 2, 2), Utilization(2)
    without = {name: kernel for name, kernel in dispatch._kernels["side_moe"].items() if name != "cuda"}
    monkeypatch.setitem(dispatch._kernels, "side_moe", without)
    # What is said depends on what else is not there.
    message = "backend 'cuda'.*(has no cuda kernel|are not built|xformers|without CUDA|finds no CUDA)"
    with pytest.raises(BackendUnavailable, match=message), use_backend("cuda"):
        side_moe(*level, utilization=counters)
    assert not counters.gate.any()
    assert dispatch.requested() == "auto"


@pytest.mark.usefixtures("triton")
def test_a_named_backend_is_binding_for_each_operator() -> None:
    x, offsets = torch.zeros(2, 3), torch.tensor([0, 2])
    with (
        use_backend("triton"),
        pytest.raises(BackendUnavailable, match="backend 'triton' cannot run grouped_mm on cpu torch.float32: this"),
    ):
        grouped_mm(x, torch.zeros(1, 3, 2), offsets)


@pytest.mark.usefixtures("triton")
def test_backward_follows_its_forward(calls: Counter[tuple[str, str]]) -> None:
    level = make_level(3, 4, 2, 2, dtype=torch.float32)
    with use_backend("triton"):
        first = side_moe(*level)
    with use_backend("reference"):
        second = side_moe(*level)
        first.sum().backward()
    second.sum().backward()
    assert calls == {
        (operator, backend): 1 for operator in ("side_moe", "side_moe_backward") for backend in ("triton", "reference")
    }


@pytest.mark.usefixtures("triton")
def test_backward_follows_its_forward_through_a_compiler(calls: Counter[tuple[str, str]]) -> None:
    torch.compiler.reset()
    level = make_level(3, 4, 2, 2, dtype=torch.float32)
    function = torch.compile(side_moe, fullgraph=True, backend="aot_eager")
    with use_backend("triton"):
        y = function(*level)
    y.sum().backward()
    assert calls == {("side_moe", "triton"): 1, ("side_moe_backward", "triton"): 1}
    with use_backend("reference"):
        function(*level)
    assert calls["side_moe", "reference"] == 1, "another request compiles the code again"


@pytest.mark.usefixtures("triton")
def test_auto_prefers_kernels_to_the_reference_on_cuda_only() -> None:
    assert dispatch.select("side_moe", "auto", torch.device("cuda"), torch.float32) == "triton"
    assert dispatch.select("side_moe", "auto", torch.device("cuda"), torch.float64) == "reference"
    assert dispatch.select("side_moe", "auto", CPU, torch.float32) in ("native", "reference")
    assert dispatch.select("side_moe", "auto", torch.device("meta"), torch.float32) == "reference"


@pytest.mark.usefixtures("triton")
def test_a_kernel_may_be_for_some_devices_and_dtypes_only(calls: Counter[tuple[str, str]]) -> None:
    dispatch.register("side_moe", "native", reference.forward, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16))
    cuda = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.select("side_moe", "auto", CPU, dtype) == "native"
        assert dispatch.select("side_moe", "native", CPU, dtype) == "native"
    assert dispatch.select("side_moe", "auto", CPU, torch.float16) == "reference"
    with pytest.raises(BackendUnavailable, match=r"side_moe on cuda .* kernels run on cpu only, not on cuda"):
        dispatch.select("side_moe", "native", cuda, torch.float32)
    message = r"the native kernels support torch.float32 and torch.bfloat16, not torch.float64"
    with pytest.raises(BackendUnavailable, match=message), use_backend("native"):
        side_moe(*make_level(3, 4, 2, 2, dtype=torch.float64))
    assert not calls


@pytest.mark.usefixtures("triton")
def test_a_backend_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_reasons", {})
    dispatch.set_unavailable("cuda", "its library is not built: build it")
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run: its library is not built"), use_backend("cuda"):
        pass
    assert dispatch.unavailable_reason("side_moe", "cuda", CPU, torch.float32) == "its library is not built: build it"
    assert dispatch.unavailable_reason("side_moe", "triton", CPU, torch.float32) is None


def test_reasons_of_several_operators_are_said_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels = {operator: {"reference": reference.forward} for operator in dispatch._kernels}
    monkeypatch.setattr(dispatch, "_kernels", kernels)
    monkeypatch.setattr(dispatch, "_reasons", {})
    with pytest.raises(BackendUnavailable, match="has no cuda kernel for any operator"), use_backend("cuda"):
        pass
    for operator, reason in (("side_moe", "too old"), ("side_moe_backward", "too old"), ("grouped_mm", "not built")):
        dispatch.set_unavailable("cuda", reason, operator)
    dispatch.set_unavailable("triton", "not installed")
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run: too old; not built$"), use_backend("cuda"):
        pass
    assert dispatch.unavailable_reason("grouped_mm", "cuda", CPU, torch.float32) == "not built"
    assert "no cuda kernel for topk_items" in (
        dispatch.unavailable_reason("topk_items", "cuda", CPU, torch.float32) or ""
    )


def test_a_missing_gpu_is_reported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {operator: {"reference": reference.forward} for operator in dispatch._kernels}
    monkeypatch.setattr(dispatch, "_kernels", kernels)
    monkeypatch.setattr(dispatch, "_reasons", {("cuda", "grouped_mm"): "not built", ("native", None): "no compiler"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fix = r'use_backend\("auto"\) selects one that can run here$'
    message = f"'cuda' cannot run: torch finds no CUDA device; not built; {fix}"
    with pytest.raises(BackendUnavailable, match=message), use_backend("cuda"):
        pass
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    dispatch.set_unavailable("cuda", "torch was built without CUDA", "grouped_mm")
    with pytest.raises(BackendUnavailable, match=f"run: torch was built without CUDA; {fix}"), use_backend("cuda"):
        pass
    with pytest.raises(BackendUnavailable, match="'native' cannot run: no compiler$"), use_backend("native"):
        pass


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("call", [side_moe, lambda **level: side_moe_group([level])], ids=["side_moe", "group"])
def test_the_error_of_another_device_has_advice(call: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in ("side_moe", "side_moe_group"):
        dispatch.register(operator, "triton", reference.forward, devices=("cuda",))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for there, advice in (
        (False, ", and torch finds no CUDA device; use_"),
        (True, "; move the tensors to cuda, or use_"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        message = (
            rf'the triton kernels run on cuda only, not on cpu{advice}backend\("auto"\) selects one that can run here$'
        )
        with pytest.raises(BackendUnavailable, match=message), use_backend("triton"):
            call(**make_level(3, 4, 2, 2, dtype=torch.float32)._asdict())


def test_the_group_asks_for_the_same_backend(calls: Counter[tuple[str, str]]) -> None:
    with use_backend("reference"):
        side_moe_group([make_level(3, 4, 2, 2)._asdict()] * 2)
    assert calls == {("side_moe", "reference"): 2}


def test_nests_and_is_undone_after_an_error() -> None:
    with use_backend("reference"):
        with use_backend("auto"):
            assert dispatch.requested() == "auto"
        assert dispatch.requested() == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == "auto"


def test_blocks_that_overlap_leave_nothing_behind() -> None:
    """Two threads may leave blocks in the order in which they entered them."""
    first, second, third = (use_backend(name) for name in ("reference", "auto", "reference"))
    for block in (first, second, third):
        block.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.requested() == "reference", "the third block holds"
    third.__exit__(None, None, None)
    assert dispatch.requested() == "auto", "the second block holds"
    with use_backend("reference"):
        second.__exit__(None, None, None)
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == "auto"


def test_many_threads_at_once_leave_nothing_behind() -> None:
    seen: list[str] = []

    def work() -> None:
        for _ in range(200):
            with use_backend("reference"):
                seen.append(dispatch.requested())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["reference"] * 1600
    assert dispatch.requested() == "auto"


@pytest.mark.usefixtures("triton")
def test_a_block_inside_a_compiled_function_and_around_it(calls: Counter[tuple[str, str]]) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    level = make_level(3, 4, 2, 2, dtype=torch.float32)

    def inside() -> Tensor:
        with use_backend("triton"):
            return side_moe(*level)

    function = compiled(inside, backend=counter)
    for _ in range(3):
        function()
        assert dispatch.requested() == "auto"
    with use_backend("reference"):
        function()
        assert dispatch.requested() == "reference"
    assert calls == {("side_moe", "triton"): 4}

    calls.clear()
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda: side_moe(*level), backend=counter)
    for _ in range(3):
        for name in ("triton", "reference"):
            with use_backend(name):
                function()
    assert calls == {("side_moe", "triton"): 3, ("side_moe", "reference"): 3}
    assert counter.frame_count == 2, "once for each backend"


def test_applies_in_every_thread() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_an_unknown_backend_is_named() -> None:
    message = "name must be one of auto, reference, native, triton, cuda, not 'fast'"
    with pytest.raises(ValueError, match=message), use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="backend must be one of reference, native, triton, cuda, not 'fast'"):
        dispatch.register("side_moe", "fast", reference.forward)
