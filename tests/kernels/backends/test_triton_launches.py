"""Each operator starts a fixed number of kernels, forward and backward.

A launch costs a GPU some 2 us and the host more. A change that adds one has to change this table.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SIDE_MOE = (
    "gate_kernel",
    "hidden_kernel",
    "mixture_kernel",
    "count_kernel",
    "hidden_gradient_kernel",
    "logit_gradient_kernel",
    "row_gradient_kernel",
    "weight_gradient_kernel",
    "weight_sum_kernel",
)
LOSS = {
    "sums_kernel": 1,
    "logit_lse_kernel": 2,
    "mean_kernel": 1,
    "query_gradient_kernel": 2,
    "slice_sum_kernel": 2,
    "item_gradient_kernel": 1,
}
LAUNCHES = {
    "side_moe": dict.fromkeys(SIDE_MOE, 1),
    "side_moe with recompute": dict.fromkeys(SIDE_MOE, 1),
    "side_moe_group of two": dict.fromkeys(SIDE_MOE, 1),
    "route_topk": {"route_kernel": 1, "order_kernel": 1, "gradient_kernel": 1},
    "grouped_mm": {"product_kernel": 2, "weight_gradient_kernel": 1},
    "in_batch_softmax_loss": LOSS,
    "rank_of_target": {"hidden_keys_kernel": 1, "count_kernel": 1, "rank_kernel": 1},
    "topk_items": {"hidden_keys_kernel": 1, "score_kernel": 1, "topk_merge_kernel": 1},
}
"""The Triton kernels that a call on 256 rows launches."""

OPERATIONS = {
    "side_moe": {"aten::copy_": 2},
    "side_moe with recompute": {"aten::copy_": 2},
    "side_moe_group of two": {"aten::copy_": 4},
    "route_topk": {},
}
"""The operations of torch that start further kernels. The other operators check the values of CPU tensors, which
costs operations that a GPU does not see."""

Counts = dict[str, list[dict[str, int]]]


def run_module(*arguments: str) -> None:
    """Run a module in a process without Triton's interpreter, where the fake driver reaches no other test."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    path: Path = tmp_path_factory.mktemp("launches") / "counts.json"
    run_module("-m", "tests.kernels.helpers.triton_host_time", "--json", str(path))
    found: Counts = json.loads(path.read_text())
    return found


def test_every_call_is_in_the_table(counts: Counts) -> None:
    assert list(counts) == list(LAUNCHES)


@pytest.mark.parametrize("call", LAUNCHES)
def test_launches(counts: Counts, call: str) -> None:
    assert counts[call][0] == LAUNCHES[call]


@pytest.mark.parametrize("call", OPERATIONS)
def test_operations_of_torch(counts: Counts, call: str) -> None:
    assert counts[call][1] == OPERATIONS[call]


EXTRA = """
import torch
from tests.kernels.helpers import triton_host_time
from tests.kernels.helpers.triton_fake_driver import fake_driver
from triton.runtime.driver import driver
from xsmoe_kernels import use_backend
from xsmoe_kernels.triton_utils import kernel_helpers

before = driver._active
with fake_driver() as launches, use_backend("triton"):
    call = triton_host_time.calls(16)["side_moe"]
    kernels, operations = triton_host_time.count(call, launches)
    launch = kernel_helpers.launch
    def twice(*arguments):
        launch(*arguments)
        launch(*arguments)
        torch.zeros(3)
    kernel_helpers.launch = twice
    doubled, more = triton_host_time.count(call, launches)
assert doubled == {name: 2 * number for name, number in kernels.items()}, doubled
assert more["aten::zero_"] >= len(kernels), more
assert driver._active is before
"""


def test_an_extra_launch_is_counted_and_the_driver_is_restored() -> None:
    run_module("-c", EXTRA)
