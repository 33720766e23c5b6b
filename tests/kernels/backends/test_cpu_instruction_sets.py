"""The native kernels on every instruction set, with emulated matrix tiles where the processor has none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.helpers.native_in_batch_softmax_loss import SELECTION as BATCHES
from tests.kernels.helpers.native_library import ROOT, TESTS, needs_library, run_python
from tests.kernels.helpers.native_packed_attention import SELECTION as SEQUENCES
from tests.kernels.helpers.native_ranking import NUM_CASES
from tests.kernels.helpers.native_side_moe import SELECTION
from xsmoe_kernels.backends import cpu as cpu_backend

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
COMPARISON = str(TESTS / "native_side_moe.py")
RANKING = str(TESTS / "native_ranking.py")
PROGRAMS = {
    COMPARISON: len(SELECTION),
    RANKING: NUM_CASES,
    str(TESTS / "native_packed_attention.py"): len(SEQUENCES),
    str(TESTS / "native_in_batch_softmax_loss.py"): len(BATCHES),
}
"""Programs that compare an operator on one instruction set, and print the number of cases that agreed."""
# The start of Python needs as much time as an operator's cases.
ONE_AFTER_THE_OTHER = "import runpy, sys; [runpy.run_path(one, run_name='__main__') for one in sys.argv[1:]]"


@needs_library
@pytest.mark.parametrize("level", cpu_backend.describe().get("tiers") or ["baseline"])
def test_every_operator_agrees_with_its_reference(level: str) -> None:
    printed = run_python("-c", ONE_AFTER_THE_OTHER, *PROGRAMS, XSMOE_CPU_TIER=level)
    assert printed.splitlines() == [f"{level} {agreed}" for agreed in PROGRAMS.values()]


@pytest.fixture(scope="module")
def emulation() -> Path:
    """Return a library whose amx code runs here; compiled only if sources have changed."""
    facts = cpu_backend.describe()
    if not (ROOT / "setup.py").exists():
        pytest.skip("the package has no source tree")
    if "amx" in (facts["tiers"] or ()):
        pytest.skip("the level amx has a run of its own")
    if "avx512_bf16" not in (facts["features"] or ()):
        pytest.skip("the emulation takes a processor with avx512_bf16")
    if "amx" in (facts["left_out"] or ()):
        pytest.skip("the compiler does not support the level amx")
    wanted = {"XSMOE_EMULATE_AMX": "1", "XSMOE_BUILD_TIERS": "amx", "XSMOE_SANITIZE": "0", "LD_PRELOAD": ""}
    run_python(str(ROOT / "setup.py"), "-q", "build_ext", "--inplace", library=None, **wanted)
    return ROOT / "build" / "emulate-amx" / cpu_backend.LIBRARY


@needs_library
@needs_compiler
def test_side_moe_stays_within_the_error_budget_on_emulated_tiles(emulation: Path) -> None:
    assert run_python(COMPARISON, library=emulation, XSMOE_CPU_TIER="amx") == f"amx {len(SELECTION)}\n"


@needs_library
@needs_compiler
def test_rankings_equal_the_references_on_emulated_tiles(emulation: Path) -> None:
    assert run_python(RANKING, library=emulation, XSMOE_CPU_TIER="amx") == f"amx {NUM_CASES}\n"


PROGRAM = """
#include "cpu/amx.h"

using namespace xsmoe::amx;

int main(int, char** arguments) {
    alignas(64) static unsigned char memory[16 * 64];
    TileShapes shapes;
    for (int tile = 0; tile < 3; ++tile) {
        shapes.rows[tile] = tile == 2 ? 16 : 5;
        shapes.row_bytes[tile] = 64;
    }
    switch (arguments[1][0]) {
        case 'b': shapes.palette = 0; break;
        case 'c': shapes.reserved[3] = 1; break;
        case 'd': shapes.rows[3] = 4; break;
        case 'e': shapes.rows[1] = 6; break;
        case 'f': shapes.rows[2] = 15; break;
        case 'g': shapes.row_bytes[2] = 32; break;
        case 'h': shapes.row_bytes[0] = 68; break;
    }
    if (arguments[1][0] != 'i') XSMOE_TILE_CONFIGURE(&shapes);
    XSMOE_TILE_ZERO(0);
    XSMOE_TILE_LOAD(1, memory, 64);
    XSMOE_TILE_LOAD(2, memory, 64);
    if (arguments[1][0] == 'j') XSMOE_TILE_ZERO(3);
    if (arguments[1][0] == 'k') XSMOE_TILE_RELEASE();
    XSMOE_TILE_MULTIPLY(0, 1, 2);
    XSMOE_TILE_STORE(0, memory, 64);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "tiles.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", "-DXSMOE_EMULATE_AMX", "-DXSMOE_ISA=amx", "-o", "tiles"]
    subprocess.run(["c++", *flags, "tiles.cpp"], cwd=folder, check=True)
    return folder / "tiles"


@needs_compiler
@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the package has no source tree")
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("none", ""),
        ("b: palette", "the palette must be 1"),
        ("c: reserved byte", "reserved bytes"),
        ("d: rows without bytes", "a tile has either both rows and bytes or neither"),
        ("e: rows of operand and sums", "sums must have the rows of the left operand"),
        ("f: inner dimensions", "the right operand must have a row for each word of the left one"),
        ("g: columns of operand and sums", "sums must have the columns of the right operand"),
        ("h: too many bytes", "at most 16 rows of 64 bytes"),
        ("i: not configured", "tiles must be configured"),
        ("j: no rows", "a tile without rows cannot be used"),
        ("k: released", "tiles must be configured"),
    ],
)
def test_the_emulation_stops_where_a_processor_would(program: Path, mistake: str, message: str) -> None:
    ran = subprocess.run([program, mistake], capture_output=True, text=True)
    assert message in ran.stderr
    assert (ran.returncode == 0) == (message == ""), ran.stderr
