"""Out-of-memory errors: their messages, and that a run can be resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stream import tiny
from xsmoe.out_of_memory import allocated, is_out_of_memory, requested
from xsmoe.stream import OutOfMemory, Stream, StreamConfig, StreamingTrainer, epoch, trainer
from xsmoe.stream.cuda.out_of_memory import GIB, MemoryUse, advice, fitting_batch
from xsmoe.stream.evaluation import window_evaluation
from xsmoe.stream.hidden_states import placement
from xsmoe.stream.state.run_folder import read_metrics

SAID = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.06 GiB is "
    "free.\nSee documentation for Memory Management."
)


def fit(folder: Path | None = None, **options: Any) -> list[dict[str, Any]]:
    stream = Stream(tiny.windows()[:2], tiny.features())
    with StreamingTrainer(tiny.model(), stream, tiny.config(**options), folder=folder) as run:
        return tiny.without_time(run.fit())


@pytest.fixture(scope="module")
def uninterrupted() -> list[dict[str, Any]]:
    return fit()


def failing(real: Callable[..., Any], after: int, error: Exception) -> Callable[..., Any]:
    count = iter(range(10_000))

    def call(*arguments: Any, **named: Any) -> Any:
        if next(count) == after:
            raise error
        return real(*arguments, **named)

    return call


@pytest.mark.parametrize(
    ("module", "name", "after", "message"),
    [
        (epoch, "train_step", 0, "window 0, epoch 0: a training step of 5 sequences does not fit into the memory"),
        (epoch, "train_step", 7, "window 0, epoch 2: a training step of 5 sequences .*Try --batch-size 2 .*estimate"),
        (
            trainer,
            "rank_with_model",
            1,
            "window 0, epoch 2: the validation does not fit .* nor --precision .* --device",
        ),
        (window_evaluation, "rank_targets", 0, r"the test on a window does not fit .*--batch-size \(here 5\)"),
    ],
)
def test_out_of_memory_is_explained_and_the_run_can_be_resumed(
    uninterrupted: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    module: Any,
    name: str,
    after: int,
    message: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), after, torch.OutOfMemoryError(SAID)))
        with pytest.raises(OutOfMemory, match=message) as raised:
            fit(tmp_path)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    text = str(raised.value)
    assert "(CUDA out of memory. Tried to allocate 2.50 GiB)" in text
    assert "All saved files are intact: the same command resumes" in text
    kept = tiny.without_time(read_metrics(tmp_path))
    assert kept == uninterrupted[: len(kept)]
    assert fit(tmp_path) == uninterrupted


@pytest.mark.parametrize("module", [epoch, window_evaluation])
def test_cpu_out_of_memory_error_is_recognized(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "train_step" if module is epoch else "rank_targets"
    with pytest.raises(RuntimeError) as short:
        torch.empty(1 << 50)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), 0, short.value))
        with pytest.raises(OutOfMemory, match=r"of cpu \(.*tried to allocate 4503599627370496 bytes\)"):
            fit()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), 0, RuntimeError("another")))
        with pytest.raises(RuntimeError, match="another"):
            fit()


def test_out_of_memory_messages_suggest_the_cache_limit(
    uninterrupted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = torch.OutOfMemoryError(SAID)
    with monkeypatch.context() as patch:
        patch.setattr(placement, "place", failing(placement.place, 0, short))
        with pytest.raises(
            OutOfMemory, match=r"hidden states do not fit .* --store-gib \(here 1.0\) .* use --store-gib 0, which keeps"
        ):
            fit(tmp_path, store_gib=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(epoch, "train_step", failing(epoch.train_step, 7, short))
        with pytest.raises(OutOfMemory, match="Try --batch-size 2, or --store-gib 0, which"):
            fit(tmp_path, store_gib=1.0)
    assert fit(tmp_path, store_gib=1.0) == uninterrupted


def test_the_estimate_halves_until_it_fits_with_a_tenth_to_spare() -> None:
    # 4 GiB are held, and each sequence needs 0.25 GiB: 36 GiB for 128 sequences, 20 GiB for 64.
    def fits(users: int, gib: int) -> int:
        return fitting_batch(users, MemoryUse(4 * GIB, 68 * GIB, gib * GIB))

    assert [fits(256, gib) for gib in (80, 40, 39, 5, 4)] == [128, 128, 64, 2, 0]
    assert fits(1, 80) == 0
    # If only an earlier peak is known, it may be below the held memory.
    assert fitting_batch(8, MemoryUse(4 * GIB, 4 * GIB - 1, 80 * GIB)) == 4


def test_advice_states_its_basis() -> None:
    config, taken = StreamConfig(device="cuda", precision="float32"), MemoryUse(4 * GIB, 68 * GIB, 39 * GIB)
    said = advice(config, taken, sequences=256, cached=False)
    assert said.startswith(
        "Try --batch-size 64, or --precision bfloat16, which halves activations (estimated, not tested"
    )
    assert "4.00 GiB of 39.00 GiB are allocated before the first step, and the step needed at least 68.00 GiB" in said
    assert "--store-gib" not in said
    there = advice(StreamConfig(device="cuda"), taken, sequences=256, cached=True)
    assert there.startswith("Try --batch-size 64, or --store-gib 0, which keeps the items' hidden states on the host (")
    assert "--precision" not in there
    # The window has fewer sequences than a batch.
    assert advice(config, taken, sequences=30, cached=False).startswith("Try --batch-size 7, ")
    full = taken._replace(available=4 * GIB)
    assert "not even one sequence fits" in advice(config, full, sequences=256, cached=False)
    one = advice(StreamConfig(), None, sequences=1, cached=False)
    assert one == "The batch size cannot be reduced further: use a device with more memory."
    assert advice(StreamConfig(), None, sequences=256, cached=False).startswith("Try --batch-size 128 (half;")


def test_allocated_memory_is_parsed_from_the_message() -> None:
    more = " Of the allocated memory 70.50 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but"
    assert allocated(torch.OutOfMemoryError(SAID + more)) == 141 * GIB // 2
    # With CUDA graphs.
    more = "\nOf the allocated memory 512.00 MiB is allocated by PyTorch, with 1.00 GiB allocated in private pools"
    assert allocated(torch.OutOfMemoryError(SAID + more)) == 512 << 20
    assert allocated(torch.OutOfMemoryError(SAID)) is None


def test_out_of_memory_advice_uses_the_sequences_of_a_small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch, "train_step", failing(epoch.train_step, 0, torch.OutOfMemoryError(SAID)))
    with pytest.raises(OutOfMemory, match=r"a training step of 14 sequences .* Try --batch-size 7 "):
        fit(batch_size=256)


def test_out_of_memory_in_ranking_suggests_disabling_the_cache(
    uninterrupted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module, name, place in (
        (trainer, "rank_with_model", "validation"),
        (window_evaluation, "rank_targets", "the test on a window"),
    ):
        folder = tmp_path / place
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(getattr(module, name), 0, torch.OutOfMemoryError(SAID)))
            with pytest.raises(
                OutOfMemory, match=rf"{place} does not fit .*: use --store-gib 0, which .*, free memory"
            ):
                fit(folder, store_gib=1.0)
        # The setting may change when the run is resumed.
        assert fit(folder, store_gib=0.0) == uninterrupted


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_out_of_memory_outside_of_the_allocator_is_recognized(said: str, short: bool) -> None:
    assert is_out_of_memory(RuntimeError(said)) == short


def test_requested_memory_is_parsed_from_the_message() -> None:
    of_cpu = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
    for text, size in [
        (SAID, 5 * GIB // 2),
        (of_cpu, 4096),
        ("Tried to allocate 20.00 MiB.", 20 << 20),
        ("out of memory", 0),
    ]:
        assert requested(torch.OutOfMemoryError(text)) == size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_estimate_has_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(epoch, "train_step", step)
    stream = Stream(tiny.windows()[:1], tiny.features())
    with pytest.raises(OutOfMemory, match=r"By estimate, not even one sequence fits|estimated, not tested"):
        StreamingTrainer(tiny.model(), stream, tiny.config(device="cuda")).fit()
