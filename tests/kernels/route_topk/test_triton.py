"""Tests of the Triton kernels of route_topk only; test_gpu.py tests all GPU kernels."""

import importlib
from typing import Any

import pytest
import torch

from tests.kernels.helpers.routing_checks import assert_agrees, on, random_logits
from tests.kernels.helpers.triton_gpu import DEVICE, ON_GPU, needs_gpu, needs_triton, reverse_programs

pytestmark = [
    needs_triton,
    # NumPy's, of 0 by 0, which the interpreter divides outside of masks.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_of_several_blocks(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice as many columns as the fewest halve the parts.
    kernels = importlib.import_module("xsmoe_kernels.ops.route_topk.triton_kernels")
    monkeypatch.setattr(kernels, "MOST_PARTS", 2 * parts)
    assert_agrees("triton", random_logits(1000 if ON_GPU else 65, 33, torch.float32, "ties"), 3, True)


def test_more_parts_than_are_added_up_at_once() -> None:
    num_rows = 512 * 32 * 3 + 5 if ON_GPU else 8 * 34 + 1
    assert_agrees("triton", random_logits(num_rows, 5, torch.float32, "ties"), 2, True)


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(50, 21, torch.float32)
    grad = torch.randn(50, 4, device=DEVICE)
    expected = on("triton", logits, 4, True, grad)
    reverse_programs(monkeypatch)
    for actual, wanted in zip(on("triton", logits, 4, True, grad), expected, strict=True):
        assert torch.equal(actual, wanted)


@needs_gpu
def test_more_experts_or_rows_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def run(num_rows: int, num_experts: int) -> None:
        on(
            "triton",
            random_logits(num_rows, num_experts, torch.float32),
            1,
            True,
            torch.ones(num_rows, 1, device=DEVICE),
        )

    run(3000, 5)
    compiled_anew: list[Any] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **seen: compiled_anew.append(seen["repr"]) or False
    )
    for num_rows, num_experts in ((3000, 1), (2048, 16), (1, 2), (2999, 31), (100000, 32)):
        run(num_rows, num_experts)
    assert not compiled_anew
