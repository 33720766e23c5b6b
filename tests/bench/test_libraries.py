"""Libraries with a grouped product: absent with a reason, checked, and called with valid arguments."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.core import baselines
from bench.core.correctness import check
from bench.core.measure import inputs_and_truth
from bench.core.results import Row
from bench.ops.grouped_mm import LIBRARIES, GroupedMM

SIZES = {"M": 67, "E": 3, "K": 48, "P": 8}


def grouped(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([mine @ one for mine, one in zip(rows.split(counts), weight, strict=True)])


class FakeScatterMoE:
    """`scattermoe.parallel_experts`, for grouped input and output."""

    kernels = SimpleNamespace(ops=SimpleNamespace(ALLOW_TF32=True))

    @staticmethod
    def parallel_linear(
        inputs: Tensor,
        expert_weights: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        expert_biases: Tensor | None = None,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        assert k == 1
        assert grouped_in
        assert grouped_out
        assert len(inputs) == len(sorted_expert_idxs) == len(sorted_scattered_idxs) == expert_offsets[-1]
        counts = expert_offsets.diff(prepend=expert_offsets.new_zeros(1)).tolist()
        assert counts == torch.bincount(sorted_expert_idxs, minlength=len(expert_weights)).tolist()
        return grouped(inputs, expert_weights, counts)


class FakeMegaBlocks:
    """`megablocks.grouped_gemm_util`."""

    class ops:
        @staticmethod
        def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
            assert batch_sizes.dtype == torch.int64
            assert batch_sizes.device.type == "cpu"
            return grouped(a, b, batch_sizes.tolist())


FAKES = {"scattermoe": FakeScatterMoE, "megablocks": FakeMegaBlocks}


def checked(name: str) -> Row:
    benchmark = GroupedMM(SIZES, torch.float32, torch.device("cpu"))
    return check(benchmark, benchmark.variant(name), *inputs_and_truth(benchmark)).row


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_is_absent_or_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert GroupedMM(SIZES, torch.float32, torch.device("cpu")).variant(name).default
    assert checked(name).reason == f"{name} needs a CUDA device, not cpu"
    monkeypatch.setattr(baselines, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    missing = checked(name)
    assert missing.status == "absent"
    assert (missing.reason or "").startswith(f"{name} is not installed")
    monkeypatch.setitem(sys.modules, LIBRARIES[name], FAKES[name])
    assert checked(name).status == "measured", checked(name).reason


def test_scattermoe_multiplies_float32_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "scattermoe.parallel_experts", FakeScatterMoE)
    assert checked("scattermoe").status == "measured"
    assert FakeScatterMoE.kernels.ops.ALLOW_TF32 is (torch.backends.cuda.matmul.fp32_precision == "tf32")


def test_a_library_that_fails_is_absent_and_one_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "megablocks.grouped_gemm_util", FakeMegaBlocks)

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("Expected a.scalar_type() == torch::kBFloat16")

    monkeypatch.setattr(FakeMegaBlocks.ops, "gmm", staticmethod(fails))
    assert checked("megablocks").reason == "megablocks fails here: Expected a.scalar_type() == torch::kBFloat16"
    wrong = staticmethod(lambda a, b, sizes: grouped(a, b * 1.001, sizes.tolist()))
    monkeypatch.setattr(FakeMegaBlocks.ops, "gmm", wrong)
    assert checked("megablocks").status == "refused"
    monkeypatch.setattr(FakeMegaBlocks, "ops", None)
    assert "without grouped_gemm" in (checked("megablocks").reason or "")


def test_a_library_whose_import_breaks_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "DEVICES", ("cpu",))

    def breaks(_: str) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(baselines.importlib, "import_module", breaks)
    assert checked("megablocks").reason == "megablocks cannot be imported: no driver"
