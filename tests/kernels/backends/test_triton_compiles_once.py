"""A growing stream compiles no further binaries: kernels are not specialized for rows, experts and items."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# In a process of its own: this one may have decorated its kernels for the interpreter.
SCRIPT = """
import json, torch
from tests.kernels.helpers import triton_scenarios as scenarios
from tests.kernels.helpers.triton_offline import name_of, record, specialised

def forms(scenario):
    found = {}
    for launch in record("sm_90", "half", [scenario]):
        found.setdefault(name_of(launch), set()).add(str(specialised(launch, "sm_90")))
    return found

needs = (True,) * 5
def level(rows, experts, apart, one_row):
    def scenario(dtype):
        scenarios.side_moe_step(dtype, levels=2, needs=needs, apart=apart, one_row=one_row, recompute=True,
                                sizes=(rows, 768, 64, experts))
    return scenario

def products(rows, experts):
    def scenario(dtype):
        x, weight = torch.empty(rows, 768, dtype=dtype), torch.empty(experts, 768, 64, dtype=dtype)
        offsets = torch.zeros(experts + 1, dtype=torch.int64)
        y = scenarios.launcher("grouped_mm")(x, weight, offsets, experts - 1)
        scenarios.launcher("grouped_mm_backward")(y, x, weight, offsets, experts - 1, True, True)
    return scenario

def routes(rows, experts):
    return lambda dtype: scenarios.launcher("route_topk")(torch.empty(rows, experts, dtype=dtype), 1, True)

def ranks(rows, experts):
    def scenario(dtype):
        queries, items = torch.empty(rows, 128, dtype=dtype), torch.empty(experts * rows, 128, dtype=dtype)
        offsets = experts * torch.arange(rows + 1)
        seen, targets = torch.zeros(experts * rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        scenarios.launcher("rank_of_target")(queries, items, targets, seen, offsets)
        scenarios.launcher("topk_items")(queries, items, 10, seen, offsets)

    return scenario


def losses(queries, items, width):
    def scenario(dtype):
        scenarios.in_batch_softmax_loss_step(dtype, sizes=(queries, items, 128, width))

    return scenario


SIZES = [(2816, 10), (2817, 10), (2832, 11), (17, 2), (2, 16), (2816, 17), (5000, 33), (16, 1)]
found = {}
for one_row in (False, True):
    for apart in (True, False):
        for rows, experts in SIZES:
            for name, own in forms(level(rows, experts, apart, one_row)).items():
                found.setdefault(f"{name} one_row={one_row}", set()).update(own)
for rows, experts in SIZES:
    for name, own in forms(products(rows, experts)).items():
        found.setdefault(name, set()).update(own)
    for name, own in forms(ranks(rows, experts)).items():
        found.setdefault(name, set()).update(own)
    if experts <= 32:
        for name, own in forms(routes(rows, experts)).items():
            found.setdefault(name, set()).update(own)
BATCHES = [(2560, 2640, 11), (2561, 2641, 1), (16, 17, 0), (1, 1, 16), (70000, 5, 2), (70000, 70000, 9)]
for queries, items, width in BATCHES:
    for name, own in forms(losses(queries, items, width)).items():
        found.setdefault(name, set()).update(own)
print(json.dumps({name: len(own) for name, own in found.items()}))
"""


SEVERAL = {
    "in_batch_softmax_loss.item_gradient_kernel": 2,  # into the result, or into slices that are added up
    "in_batch_softmax_loss.query_gradient_kernel": 4,  # likewise, and what came out undefined once more
    "grouped_mm.product_kernel": 2,  # forward, and the gradient of the rows
    "grouped_mm.weight_gradient_kernel": 2,  # into the result, or into slices that are added up
    "scoring.hidden_keys_kernel": 2,  # with targets, or without
    "topk_items.topk_merge_kernel": 3,  # of scores, into the results or into candidates; and of candidates
}


def test_rows_experts_and_items_do_not_recompile() -> None:
    root = Path(__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    forms = json.loads(ran.stdout)
    assert len(forms) > 15
    assert {name: number for name, number in forms.items() if number > 1} == SEVERAL
