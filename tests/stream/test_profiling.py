"""Profile of training steps: its contents, and that it does not change the training."""

import gzip
import json
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stream import tiny
from xsmoe.cli.commands.profile import rows
from xsmoe.stream import Stream, StreamingTrainer
from xsmoe.stream.profiling import STEPS, WAIT, WARM_UP, StepProfiler, require_writable_folder
from xsmoe_kernels.runtime.profiler_ranges import each, named_range, opening_ranges, ranges_open

PARTS = ["data", "encode", "attend", "loss", "backward", "optimizer"]
CPU = torch.device("cpu")


def trained(listener: Any = None, **options: Any) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train on one window in 21 steps."""
    config = tiny.config(epochs=7, warmup_epochs=5, **options)
    model = tiny.model()
    stream = Stream(tiny.windows()[:1], tiny.features(), protocol=config.protocol)
    with StreamingTrainer(model, stream, config, listener=listener) as trainer:
        return tiny.without_time(trainer.fit()), model.state_dict()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[StepProfiler, list[dict], dict[str, torch.Tensor]]:
    with StepProfiler(tmp_path_factory.mktemp("profile"), CPU) as profiler:
        return profiler, *trained(profiler)


def test_training_is_equal_with_and_without_profile(profiled: Any) -> None:
    profiler, again, theirs = profiled
    lines, weights = trained()
    assert profiler.result is not None
    assert again == lines
    assert weights.keys() == theirs.keys()
    for name, value in weights.items():
        assert torch.equal(value, theirs[name]), name


def test_each_part_of_a_step_has_a_range_in_the_table_and_in_the_trace(profiled: Any) -> None:
    found = profiled[0].result
    assert (found.steps, found.problem) == (STEPS, None)
    assert [one.name for one in found.ranges if one.parent is None] == PARTS
    # Two levels for each of two modalities.
    assert [(one.name, one.parent, one.calls) for one in found.ranges if one.parent] == [
        ("counters", "encode", 4 * STEPS)
    ]
    assert all(one.calls == STEPS for one in found.ranges if one.parent is None)
    encode, counters = found.ranges[1:3]
    assert 0 < counters.cpu_seconds < encode.cpu_seconds
    assert all(one.cuda_seconds is None for one in found.ranges)

    with gzip.open(found.trace) as file:
        events = json.load(file)["traceEvents"]
    spans = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    steps = sorted(int(name.split("#")[1]) for name in spans if name.startswith("ProfilerStep#"))
    assert steps == list(range(WAIT + WARM_UP, WAIT + WARM_UP + STEPS))
    assert all(spans[name] == STEPS for name in PARTS[1:])
    assert any(event["name"].startswith("xsmoe::side_moe_group") for event in events)


def test_the_table_sums_up_to_the_step(tmp_path: Path) -> None:
    with StepProfiler(tmp_path, CPU) as profiler:
        trained(profiler, protocol="paper")
    assert profiler.result is not None
    header, *body, last = rows(profiler.result)
    assert header == ["range", "calls", "CPU ms", "share"]
    assert [row[0] for row in body] == [*PARTS[:2], "  counters", *PARTS[2:], "counters"]
    of_step = [row for row in body if not row[0].startswith(" ")]
    assert sum(float(row[2]) for row in of_step) == pytest.approx(float(last[2]), abs=0.01)
    assert sum(float(row[3].rstrip("%")) for row in of_step) == pytest.approx(100, abs=0.5)
    assert last[3] == "100.0%"


def test_ranges_on_a_gpu_have_separate_columns(profiled: Any) -> None:
    found = profiled[0].result
    timed = [replace(one, cuda_seconds=found.steps * (0.25 if one.parent is None else 0.05)) for one in found.ranges]
    table = rows(replace(found, ranges=timed))
    assert table[0][4:] == ["CUDA ms", "share"]
    assert table[-1][4:] == ["1500.000", "100.0%"]
    assert table[1][4:] == ["250.000", "16.7%"]


def test_short_training_is_profiled_partially(tmp_path: Path) -> None:
    fields = {"window": 0, "epoch": 0, "done": 1, "of": 1}
    for taken, profiled in [(WAIT + WARM_UP, None), (WAIT + WARM_UP + 2, 2)]:
        with StepProfiler(tmp_path, CPU) as profiler:
            for _ in range(taken):
                with named_range("encode"):
                    torch.ones(3).sum()
                profiler("batch", fields)
        assert profiler.steps == taken
        assert (profiler.result and profiler.result.steps) == profiled
    assert profiler.result is not None
    assert [(one.name, one.calls) for one in profiler.result.ranges] == [("encode", 2)]


def test_error_of_a_step_is_raised(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, CPU)

    def fail(event: str, fields: dict[str, Any]) -> None:
        profiler(event, fields)
        if profiler.steps == WAIT + WARM_UP + 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), profiler:
        trained(fail)
    assert profiler.result is None
    assert not list(tmp_path.iterdir())
    assert not ranges_open()


def test_unwritable_trace_is_reported_and_training_continues(tmp_path: Path) -> None:
    (tmp_path / "trace.json.gz").mkdir()
    with StepProfiler(tmp_path, CPU) as profiler:
        trained(profiler)
    assert profiler.result is not None
    assert "trace.json.gz: Is a directory" in str(profiler.result.problem)


def test_ranges_are_open_only_until_the_profile_is_there(tmp_path: Path) -> None:
    seen = []

    def listen(event: str, fields: dict[str, Any]) -> None:
        profiler(event, fields)
        if event == "batch":
            seen.append(ranges_open())

    with StepProfiler(tmp_path, CPU) as profiler:
        assert ranges_open()
        with pytest.raises(RuntimeError, match="one profile at a time"), StepProfiler(tmp_path, CPU):
            pass
        trained(listen)
    assert seen == [place + 1 < WAIT + WARM_UP + STEPS for place in range(len(seen))]
    assert seen[-1] is False


def test_closed_ranges_are_cheap() -> None:
    def seconds(repeats: int = 2000) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            with named_range("encode"):
                pass
        return (time.perf_counter() - start) / repeats

    # A step opens about ten ranges, and needs milliseconds.
    assert min(seconds() for _ in range(5)) < 20e-6


def test_each_opens_a_range_for_every_item_and_none_for_the_end() -> None:
    opened: list[str] = []

    class Opened:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: object, *_: object) -> None:
            opened.append(self.name if kind is None else "end")

    with opening_ranges(Opened):
        assert list(each("data", iter([1, 2]))) == [1, 2]
    assert opened == ["data", "data", "end"]
    assert list(each("data", [3])) == [3]
    assert len(opened) == 3


def test_unusable_profile_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"--profile: .*file is a file; give a folder"):
        require_writable_folder(file)
    with pytest.raises(ValueError, match=r"--profile: cannot write into .*below: Not a directory; give another"):
        require_writable_folder(file / "below")
    require_writable_folder(tmp_path / "new" / "one")
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "one"]
    assert not list((tmp_path / "new" / "one").iterdir())
    with monkeypatch.context() as patch:

        def refused(*_: object, **named: object) -> None:
            raise PermissionError(13, os.strerror(13))

        patch.setattr("tempfile.TemporaryFile", refused)
        with pytest.raises(ValueError, match="--profile: cannot write into .*: Permission denied"):
            require_writable_folder(tmp_path / "new")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_table_has_its_time_and_the_trace_its_kernels(tmp_path: Path) -> None:
    device = torch.device("cuda")
    lines, _ = trained(device="cuda", precision="float32")
    with StepProfiler(tmp_path, device) as profiler:
        again, _ = trained(profiler, device="cuda", precision="float32")
    assert [line["loss"] for line in again if line["kind"] == "epoch"] == pytest.approx(
        [line["loss"] for line in lines if line["kind"] == "epoch"], rel=1e-4
    )
    assert profiler.result is not None
    assert all((one.cuda_seconds or 0) > 0 for one in profiler.result.ranges)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
