"""The machine code of the Triton kernels for sm_90 multiplies on matrix units and uses no local memory.

`test_triton_budget.py` holds all kernels to what the compiler reports; these tests read the instructions themselves.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.kernels.helpers import machine_code
from tests.kernels.helpers.machine_code import LOCAL_MEMORY, MATRIX, Instruction
from tests.kernels.helpers.triton_offline import BUDGET

ORDINARY = ("side_moe", "grouped_mm")
OTHERS = ("routing", "rank_of_target", "topk_items", "in_batch_softmax_loss")

Counts = dict[str, dict[str, int]]


def instructions(folder: pytest.TempPathFactory, scenarios: tuple[str, ...]) -> Counts:
    """Compile scenarios in a process without Triton's interpreter; count each kernel's instructions."""
    if missing := [name for name in ("nvdisasm", "cuobjdump") if not machine_code.Tool.path(name).exists()]:
        pytest.skip(f"this Triton comes without {' and '.join(missing)}")
    path = folder.mktemp("machine_code") / "counts.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", machine_code.__name__, *scenarios, "--json", str(path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: Counts = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    return instructions(tmp_path_factory, ORDINARY)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    return instructions(tmp_path_factory, OTHERS)


def check(counts: Counts, products: int) -> None:
    """Compare the instructions with the matrix instructions that the budget names for each kernel."""
    budget = json.loads(BUDGET.read_text())["kernels"]
    multiply = 0
    for kernel, found in counts.items():
        expected = MATRIX.get(budget[kernel]["sm_90"]["half"]["matrix"])
        assert {name for name in MATRIX.values() if name in found} == ({expected} if expected else set()), kernel
        assert not [name for name in LOCAL_MEMORY if name in found], kernel
        assert found["EXIT"] >= 1
        multiply += expected is not None
    assert multiply >= products


def test_matrix_units_multiply_and_nothing_spills(ordinary: Counts) -> None:
    check(ordinary, products=8)


@pytest.mark.slow
def test_other_operators(others: Counts) -> None:
    check(others, products=5)


LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
        /*0020*/               @P0 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
        /*0050*/                   STL [R1+0x4], R5 ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0070*/                   EXIT ;
"""


def test_a_listing_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "SHORTEST_LOOP", 2)
    code = machine_code.parse(LISTING)
    assert code[0] == Instruction("LDC")
    assert code[4] == Instruction("BRA", 1)
    assert code[6] == Instruction("BRA", 7)
    assert list(machine_code.loops(code)) == [(1, 4)]
    assert [machine_code.kind(one.operation) for one in code] == [
        "integer", "LDGSTS.128", "LDG.16", "HGMMA", "branch", "STL", "branch", "branch"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(255, 0, 8, 1), (128, 0, 4, 4), (32, 0, 4, 16), (32, 100 << 10, 4, 2), (32, 227 << 10, 4, 1), (16, 0, 1, 32)],
)
def test_programs_per_multiprocessor(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert machine_code.blocks_per_multiprocessor(registers, shared, warps) == blocks
