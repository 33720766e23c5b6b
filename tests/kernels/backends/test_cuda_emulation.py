"""Emulation of CUDA on a CPU, which tests of CUDA kernels use: its results and its errors."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kernels.helpers.native_library import ROOT, TESTS

CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(
    CXX is None or not (ROOT / "csrc").exists(), reason="there is no C++ compiler, or no sources"
)


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a program that runs each test kernel by name."""
    built = tmp_path_factory.mktemp("emulation") / "emulation"
    sources = (TESTS / "emulation.cpp", ROOT / "csrc" / "cuda" / "emulated.cpp")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "-o", str(built)]
    if request.param == "sanitized":
        flags += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    made = subprocess.run([str(CXX), *map(str, sources), *flags], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return built


def run(program: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_PRELOAD": "", **variables}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, timeout=120)


def numbers(program: Path, *arguments: str, **variables: str) -> list[int]:
    ran = run(program, *arguments, **variables)
    assert ran.returncode == 0, ran.stderr
    return [int(word) for word in ran.stdout.split()]


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_collectives(program: Path, order: str) -> None:
    found = numbers(program, "collectives", XSMOE_EMULATED_ORDER=order)
    for thread in range(64):
        lane = thread % 32
        group = 0xFF << (8 * (lane // 8))
        signed = group - 2**32 if group >= 2**31 else group
        up, down = max(lane - 2, 0) if lane >= 2 else lane, lane + 2 if lane < 30 else lane
        odd = 0xAAAAAAAA - 2**32
        assert found[8 * thread : 8 * thread + 8] == [5, lane ^ 3, up, down, odd, signed, 31, 496]


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_barrier_of_a_block(program: Path, order: str) -> None:
    found = numbers(program, "neighbours", XSMOE_EMULATED_ORDER=order)
    assert found == [(thread + 1) % 32 for thread in range(32)] * 2


def test_a_barrier_that_is_missing_shows_in_one_of_the_orders(program: Path) -> None:
    right = [(thread + 1) % 64 for thread in range(64)]
    found = [numbers(program, "without_a_barrier", XSMOE_EMULATED_ORDER=order) for order in ("ascending", "descending")]
    assert any(one != right for one in found)


@pytest.mark.parametrize("blocks", [1, 3, 2])
def test_a_barrier_of_the_grid(program: Path, blocks: int) -> None:
    found = numbers(program, "grid", XSMOE_EMULATED_MULTIPROCESSORS=str(blocks))
    assert found == [sum(range(1, blocks + 1))] * (32 * blocks)


def test_copies_arrive_when_they_are_waited_for(program: Path) -> None:
    found = numbers(program, "copies")
    # All bits set until then; afterwards 8 bytes of the source and zeros.
    assert found[0::2] == [-1] * 32
    assert found[1::2] == [4 * thread + 1 for thread in range(32)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half_a_warp", "thread 0 of block 0 waits at __syncwarp, and thread 16 of block 0 has ended"),
        ("some_of_a_block", "thread 0 of block 0 waits at __syncthreads, and thread 3 of block 0 has ended"),
        ("other_collectives", "threads of one barrier wait at __ballot_sync and at __shfl_sync"),
        ("grid_alone", "wait_for_grid outside of a cooperative launch"),
        ("too_large_a_grid", "a cooperative launch has more blocks than fit on the device"),
        ("half_a_block", "a block has 48 threads, not a multiple of 32"),
    ],
)
def test_hangs_and_undefined_behaviour_of_a_gpu_raise_errors(program: Path, name: str, message: str) -> None:
    ran = run(program, name)
    assert ran.returncode != 0
    assert message in ran.stderr


def test_too_many_blocks_are_an_error(program: Path) -> None:
    ran = run(program, "too_many_blocks")
    assert "neighbours would need 2147483648 blocks, more than a grid has" in ran.stdout


def test_a_sanitizer_sees_the_end_of_shared_memory(program: Path) -> None:
    ran = run(program, "beyond_shared_memory")
    sanitized = "AddressSanitizer" in ran.stderr
    linked = b"__asan_init" in program.read_bytes()
    assert sanitized == linked


def test_rounds_to_16_bits_as_torch_does(program: Path) -> None:
    values = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -3.14159, 1e-45, -1e-40, 3e38]
    values += [3.39e38, 65504, 65519, 65520, 6e-8, 2.9e-8, 3e-8, 6.1e-5, math.inf, -math.inf, math.nan]
    values += [0.1 * power for power in range(32 - len(values))]
    found = run(program, "rounding", *(repr(value) for value in values))
    rounded = [float(word) for word in found.stdout.split()]
    wanted = torch.tensor(values, dtype=torch.float32)
    for place, dtype in enumerate((torch.bfloat16, torch.float16)):
        expected = wanted.to(dtype).float()
        torch.testing.assert_close(torch.tensor(rounded[place::2]), expected, rtol=0, atol=0, equal_nan=True)
