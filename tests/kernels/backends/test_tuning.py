"""Tuning with a simulated clock: the configurations tried, the file, and cases without tuning."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from xsmoe_kernels import BackendUnavailable
from xsmoe_kernels.backends import triton as triton_backend
from xsmoe_kernels.ops.scoring import item_scores
from xsmoe_kernels.runtime import dispatch
from xsmoe_kernels.triton_utils import tuning, tuning_cache
from xsmoe_kernels.triton_utils.tuning import Config, Table

pytest.importorskip("triton")

SLOW, GOOD, TOO_LARGE, BROKEN = (Config({"BLOCK": size}, 4, 2) for size in (16, 64, 4096, 3))
DEFAULT = Config({"BLOCK": 32}, 4, 3)
TABLE = Table(
    "toy.kernel",
    {(name, precision): DEFAULT for name in tuning.ARCHITECTURES for precision in tuning.PRECISIONS},
    interpreted=Config({"BLOCK": 8}),
    candidates=(SLOW, TOO_LARGE, GOOD, BROKEN, DEFAULT),
)
SECONDS = {16: 3.0, 32: 2.0, 64: 1.0}
KEY = {"D": 768, "R": 64}
# Not on a CPU: tuning treats it as a GPU tensor.
ROWS = torch.empty(2816, 768, device="meta", dtype=torch.bfloat16)


class Launcher:
    """Count launches by configuration; some configurations do not compile."""

    def __init__(self) -> None:
        self.launched: list[Config] = []
        self.timed: list[Config] = []

    def __call__(self, config: Config) -> int:
        from triton.runtime.errors import OutOfResources

        self.launched.append(config)
        if config == TOO_LARGE:
            raise OutOfResources(300000, 232448, "shared memory")
        if config == BROKEN:
            raise RuntimeError("PassManager::run failed")
        return config.blocks["BLOCK"]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launcher]:
    """Return a launcher on a named device whose time depends on the block size alone, with an empty cache folder."""
    launcher = Launcher()

    def median_seconds(launch: object, device: torch.device) -> float:
        assert callable(launch)
        seconds = SECONDS[launch()]
        launcher.timed.append(launcher.launched[-1])
        return seconds

    monkeypatch.setattr(tuning, "median_seconds", median_seconds)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA Toy")
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    monkeypatch.setattr(tuning_cache, "_warned", set())
    monkeypatch.setenv("XSMOE_AUTOTUNE", "1")
    monkeypatch.setenv("XSMOE_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield launcher
    tuning.forget()


def run(launch: Launcher, table: Table = TABLE, like: torch.Tensor = ROWS, key: dict[str, int] = KEY) -> int:
    return tuning.run(table, like, "ieee", key, launch)


def stored(tmp_path: Path) -> dict[str, dict[str, object]]:
    choices: dict[str, dict[str, object]] = json.loads((tmp_path / "cache" / tuning_cache.NAME).read_text())["choices"]
    return choices


def test_without_the_variable_the_default_runs_and_no_file_is_touched(
    launch: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in (None, "0"):
        monkeypatch.delenv("XSMOE_AUTOTUNE") if value is None else monkeypatch.setenv("XSMOE_AUTOTUNE", value)
        assert run(launch) == 32
    assert launch.launched == [DEFAULT, DEFAULT]
    assert list(tmp_path.iterdir()) == []


def test_the_first_launch_tries_all_and_later_ones_use_the_best(launch: Launcher, tmp_path: Path) -> None:
    assert run(launch) == 64
    assert launch.timed == [DEFAULT, SLOW, GOOD]
    assert set(map(id, launch.launched)) >= {id(TOO_LARGE), id(BROKEN)}
    assert launch.launched[-1] == GOOD
    launched = len(launch.launched)
    assert run(launch) == 64
    assert launch.launched[launched:] == [GOOD]
    (entry, choice), *others = stored(tmp_path).items()
    assert not others
    assert choice == {"blocks": {"BLOCK": 64}, "num_warps": 4, "num_stages": 2}
    for part in ("toy.kernel", "NVIDIA Toy", "bfloat16 ieee", "D=768 R=64", "triton 3."):
        assert part in entry


def test_another_process_reads_the_choice(launch: Launcher) -> None:
    run(launch)
    tuning.forget()
    launch.launched.clear()
    assert run(launch) == 64
    assert launch.launched == [GOOD]


@pytest.mark.parametrize(
    ("table", "like", "key"),
    [
        (TABLE, ROWS, {"D": 384, "R": 64}),
        (TABLE, ROWS.half(), KEY),
        (replace(TABLE, kernel="toy.other"), ROWS, KEY),
        (replace(TABLE, candidates=TABLE.candidates[1:]), ROWS, KEY),
    ],
    ids=["width", "dtype", "kernel", "candidates"],
)
def test_another_key_is_tuned_again(
    launch: Launcher, tmp_path: Path, table: Table, like: torch.Tensor, key: dict[str, int]
) -> None:
    run(launch)
    tuning.forget()
    timed = len(launch.timed)
    run(launch, table, like, key)
    assert len(launch.timed) > timed
    assert len(stored(tmp_path)) == 2


def test_a_changed_source_is_tuned_again(launch: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(launch)
    tuning.forget()
    monkeypatch.setattr(tuning, "_sources", lambda operator: operator.encode())
    run(launch)
    assert len(stored(tmp_path)) == 2
    assert len(launch.timed) == 6


def test_sources_are_those_of_the_operator() -> None:
    tuning._sources.cache_clear()
    assert len({tuning._sources(name) for name in ("side_moe", "route_topk", "no such operator")}) == 3


def test_another_number_of_rows_is_not_tuned_again(launch: Launcher) -> None:
    run(launch)
    timed = len(launch.timed)
    assert run(launch, like=ROWS[:1000]) == 64
    assert run(launch, like=ROWS[:1]) == 64
    assert len(launch.timed) == timed


def test_few_rows_choose_nothing(launch: Launcher, tmp_path: Path) -> None:
    assert run(launch, like=ROWS[:1]) == 32
    assert run(launch, like=ROWS[:0]) == 32
    assert launch.launched == [DEFAULT, DEFAULT]
    assert run(launch) == 64
    assert len(stored(tmp_path)) == 1


def test_a_capture_uses_known_choices_and_does_not_tune(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    assert run(launch) == 32
    assert launch.launched == [DEFAULT]
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    run(launch)
    tuning.forget()
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    launch.launched.clear()
    assert run(launch) == 64
    assert launch.launched == [GOOD]


def test_on_a_cpu_and_without_candidates_nothing_is_tuned(launch: Launcher, tmp_path: Path) -> None:
    assert run(launch, like=torch.empty(300, 4)) == 8
    assert run(launch, replace(TABLE, candidates=())) == 32
    assert list(tmp_path.iterdir()) == []


def test_where_only_the_default_does_not_fit_another_one_runs(launch: Launcher) -> None:
    table = replace(TABLE, defaults=dict.fromkeys(TABLE.defaults, TOO_LARGE))
    assert run(launch, table) == 64


def test_where_nothing_fits_the_reason_is_raised(launch: Launcher) -> None:
    from triton.runtime.errors import OutOfResources

    table = replace(TABLE, defaults=dict.fromkeys(TABLE.defaults, TOO_LARGE), candidates=(BROKEN,))
    with pytest.raises(OutOfResources):
        run(launch, table)


def test_other_errors_are_not_treated_as_a_lack_of_resources(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(launch: object, device: torch.device) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "median_seconds", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(launch)


@pytest.mark.parametrize("damage", ['{"schema": 1, "choi', "[]", '{"schema": 0, "choices": {}}', "\x00\udcff"])
def test_a_damaged_file_warns_once_and_is_rewritten(launch: Launcher, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cache" / tuning_cache.NAME
    path.parent.mkdir()
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match="tuned again") as warnings:
        assert run(launch) == 64
    assert len(warnings) == 1
    assert len(stored(tmp_path)) == 1


def test_an_entry_that_names_no_configuration_is_tuned_again(launch: Launcher, tmp_path: Path) -> None:
    run(launch)
    (entry,) = stored(tmp_path)
    tuning_cache.add(tmp_path / "cache", entry, {"blocks": {"BLOCK": 7}})
    tuning.forget()
    assert run(launch) == 64
    assert stored(tmp_path)[entry]["blocks"] == {"BLOCK": 64}


def test_where_the_folder_cannot_be_written_the_choice_is_kept_in_memory(
    launch: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XSMOE_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="as long as this process"):
        assert run(launch) == 64
    timed = len(launch.timed)
    assert run(launch) == 64
    assert len(launch.timed) == timed


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XSMOE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.folder() == tmp_path / "xdg" / "xsmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / ".cache" / "xsmoe"
    monkeypatch.setenv("XSMOE_CACHE", str(tmp_path))
    assert tuning.folder() == tmp_path


def add_many(folder: Path, writer: int) -> None:
    for number in range(20):
        tuning_cache.add(folder, f"{writer} {number}", number)


def test_several_processes_write_and_none_loses_a_choice(tmp_path: Path) -> None:
    spawned = multiprocessing.get_context("fork")
    writers = [spawned.Process(target=add_many, args=(tmp_path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(tuning_cache.read(tmp_path)) == 80
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{tuning_cache.NAME}.lock", tuning_cache.NAME]


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, xsmoe_kernels.triton_utils.tuning; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_tunes_a_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XSMOE_AUTOTUNE", "1")
    monkeypatch.setenv("XSMOE_CACHE", str(tmp_path))
    tuning.forget()
    from xsmoe_kernels import route_topk, use_backend

    logits = torch.randn(4096, 10, device="cuda")
    with use_backend("triton"):
        found = route_topk(logits, 2)
    with use_backend("reference"):
        expected = route_topk(logits, 2)
    assert torch.equal(found.experts, expected.experts)
    (choice,) = tuning_cache.read(tmp_path).values()
    assert choice["blocks"]
    tuning.forget()


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Return the compute capability of all GPUs, which may be changed."""
    capabilities = [(7, 5)]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[-1])
    # Without kernels of other libraries, which would ask for the GPU as well.
    kernels = {name: {k: v for k, v in own.items() if k != "cuda"} for name, own in dispatch._kernels.items()}
    monkeypatch.setattr(dispatch, "_kernels", kernels)
    for cached in (tuning._cached_too_old, tuning.architecture):
        cached.cache_clear()
    yield capabilities
    for cached in (tuning._cached_too_old, tuning.architecture):
        cached.cache_clear()


@pytest.mark.parametrize("operator", triton_backend.LAUNCHERS)
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_auto_selects_the_reference_on_an_old_gpu(capability: list[tuple[int, int]], operator: str, name: str) -> None:
    device = torch.device(name)
    assert dispatch.select(operator, "auto", device, torch.float32) == "reference"
    assert "8.0 or newer" in (dispatch.unavailable_reason(operator, "triton", device, torch.float32) or "")
    with pytest.raises(BackendUnavailable, match=rf"8\.0 or newer, but {name} has 7\.5"):
        dispatch.select(operator, "triton", device, torch.float32)
    tuning._cached_too_old.cache_clear()
    capability.append((8, 0))
    assert dispatch.select(operator, "auto", device, torch.float32) == "triton"


def test_the_capability_of_a_gpu_is_read_once(
    capability: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    for _ in range(3):
        assert dispatch.select("side_moe", "auto", torch.device("cuda:1"), torch.float32) == "triton"
    assert asked == [torch.device("cuda:1")]


@pytest.mark.filterwarnings("error:Dynamo detected a call to:UserWarning")
@pytest.mark.parametrize(("age", "chosen"), [((7, 5), "reference"), ((9, 0), "triton")])
def test_a_compiler_asks_too(monkeypatch: pytest.MonkeyPatch, age: tuple[int, int], chosen: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        backend = dispatch.select("in_batch_softmax_loss_backward", "auto", torch.device("cuda", 0), torch.float32)
        return x + (1 if backend == chosen else 2)

    # The compiler itself must find no GPU.
    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda device: age)
    without_hip = SimpleNamespace(hip=None)
    monkeypatch.setattr(tuning, "torch", SimpleNamespace(cuda=cuda, compiler=torch.compiler, version=without_hip))
    torch.compiler.reset()
    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


def test_no_age_where_there_is_no_nvidia_gpu(
    capability: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuning.too_old(torch.device("cpu")) is None
    with monkeypatch.context() as patched:
        patched.setattr(torch.version, "hip", "7.0")
        assert tuning.too_old(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.too_old(torch.device("cuda")) is None


@pytest.mark.parametrize("operator", triton_backend.RANKING)
def test_auto_selects_the_reference_above_32_bits_of_items(capability: list[tuple[int, int]], operator: str) -> None:
    capability.append((9, 0))
    device, queries = torch.device("cuda:0"), torch.empty(2, 1, device="meta")
    for more, backend in ((0, "triton"), (1, "reference")):
        items = torch.empty(item_scores.MOST_ITEMS + more, 1, device="meta")
        arguments = queries, items, torch.empty(2, device="meta"), None, None
        assert dispatch.select(operator, "auto", device, torch.float32, *arguments) == backend
    with pytest.raises(BackendUnavailable, match=r"items has 2147482625 rows, but the triton kernels support at most"):
        dispatch.select(operator, "triton", device, torch.float32, *arguments)


def test_a_gpu_that_is_too_old_is_named(capability: list[tuple[int, int]]) -> None:
    with pytest.raises(BackendUnavailable, match=r"8\.0 or newer, but cuda:3 has 7\.5; use_backend\(\"reference\"\)"):
        tuning.architecture(torch.device("cuda:3"))
