"""Machine code of compiled kernels for NVIDIA GPUs: instructions by kind, loops, registers and occupancy.

    python -m tests.kernels.helpers.machine_code side_moe            # the Triton kernels of a scenario, for sm_90
    python -m tests.kernels.helpers.machine_code CUBIN...            # binaries that Triton left in TRITON_CACHE_DIR

The tools that read the binaries come with Triton.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported.

from tests.kernels.helpers import triton_offline, triton_scenarios

TARGET = "sm_90"
SHORTEST_LOOP = 12
"""Shorter loops wait for a barrier."""

MATRIX = {"wgmma.mma_async": "HGMMA", "mma.sync": "HMMA"}
"""The machine instruction for each matrix instruction of PTX in half precision on sm_90."""

LOCAL_MEMORY = ("LDL", "STL")
"""Loads and stores of local memory, where spilled registers and arrays with computed indices are."""

_KINDS = {
    "sync": "BAR WARPGROUP DEPBAR LDGDEPBAR WARPSYNC BSYNC BSSY NANOSLEEP ERRBAR MEMBAR FENCE SYNCS",
    "float32": "FFMA FMUL FADD FFMA2 FSEL FMNMX FSETP FSET",
    "float16": "HFMA2 HADD2 HMUL2",
    "convert": "F2F F2FP I2F F2I I2FP PRMT",
    "shuffle": "SHFL REDUX VOTE",
    "branch": "BRA EXIT RET CALL BRX",
    "move": "MOV CS2R S2R S2UR NOP R2UR",
}
KINDS = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_BY_NAME = "HGMMA HMMA IMMA DMMA LDGSTS LDG STG LDS STS LDL STL LDSM STSM UTMALDG UTMASTG UBLKCP MUFU"
BY_NAME = frozenset(_BY_NAME.split())


class Instruction(NamedTuple):
    """One line of a disassembly; a jump's target is the place of an instruction."""

    operation: str
    target: int | None = None

    @property
    def name(self) -> str:
        """The operation without its modifiers."""
        return self.operation.split(".")[0]


class Tool:
    """The tools of Triton's package."""

    @staticmethod
    def path(name: str) -> Path:
        """Return where a tool is, whether or not it exists."""
        import triton

        return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name

    @classmethod
    def run(cls, name: str, option: str, cubin: bytes) -> str:
        """Return what a tool prints for a binary."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [cls.path(name), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> list[Instruction]:
    """Return the instructions of a binary."""
    return parse(Tool.run("nvdisasm", "-c", cubin))


def parse(text: str) -> list[Instruction]:
    """Return the instructions of a disassembly."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", line):
            found.append((code[1], code[2]))
    instructions = []
    for operation, operands in found:
        jump = re.search(r"\.L_x_\d+", operands) if operation.startswith("BRA") else None
        instructions.append(Instruction(operation, labels.get(jump[0]) if jump else None))
    return instructions


def kind(operation: str) -> str:
    """Return the kind of an operation: memory accesses with their width, the rest in groups."""
    name = operation.split(".")[0]
    if name in ("LDGSTS", "LDG", "STG", "LDS", "STS"):
        width = re.search(r"\.[US]?(128|64|16|8)\b", operation)
        return f"{name}.{width[1] if width else 32}"
    if name in BY_NAME:
        return name
    return KINDS.get(name, "uniform" if name.startswith("U") else "integer")


def kinds(instructions: list[Instruction]) -> dict[str, int]:
    """Count instructions by kind, the most frequent first."""
    return dict(Counter(kind(one.operation) for one in instructions).most_common())


def loops(instructions: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last place of each loop."""
    for place, one in enumerate(instructions):
        if one.target is not None and place - one.target >= SHORTEST_LOOP:
            yield one.target, place


def blocks_per_multiprocessor(registers: int, shared: int, warps: int) -> int:
    """Return how many programs of a kernel an sm_90 multiprocessor holds at once."""
    of_a_warp = 32 * (-(-registers // 8) * 8)
    by_registers = 4 * (65536 // 4 // of_a_warp) // warps
    return min(by_registers, (228 << 10) // (shared + 1024), 64 // warps, 32)


def compiled(scenario: triton_scenarios.Scenario) -> dict[str, Any]:
    """Compile one launch of each kernel of a scenario in half precision; return Triton's results by name."""
    launches = {triton_offline.name_of(one): one for one in triton_offline.record(TARGET, "half", [scenario])}
    return {name: triton_offline.compile_launch(one, TARGET) for name, one in launches.items()}


def report(name: str, cubin: bytes, warps: int | None = None, shared: int = 0) -> str:
    """Return a readable summary of a binary."""
    instructions = disassemble(cubin)
    registers, spilled = triton_offline.nvidia_needs(Tool.run("cuobjdump", "--dump-resource-usage", cubin))
    lines = [f"{name}: {len(instructions)} instructions, {registers} registers, {spilled} bytes of local memory"]
    if warps is not None:
        blocks = blocks_per_multiprocessor(registers, shared, warps)
        lines[0] += f", {shared / 1024:.1f} KiB shared, {blocks} programs of {warps} warps per multiprocessor"
    lines.append(f"  all: {kinds(instructions)}")
    for first, last in loops(instructions):
        lines.append(f"  loop {first} to {last}: {kinds(instructions[first : last + 1])}")
    return "\n".join(lines)


def main() -> None:
    """Print a summary of each kernel, or write how often each instruction occurs to a file."""
    scenarios = {one.__name__: one for one in triton_scenarios.SCENARIOS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", help=f"a file, or a scenario: {', '.join(scenarios)}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the scenarios' instructions, for the test")
    options = parser.parse_args()
    counts: dict[str, dict[str, int]] = {}
    for what in options.what:
        if what not in scenarios:
            print(report(what, Path(what).read_bytes()))
            continue
        for name, one in compiled(scenarios[what]).items():
            if options.json is not None:
                counts[name] = dict(Counter(code.name for code in disassemble(one.asm["cubin"])))
            else:
                print(report(name, one.asm["cubin"], one.metadata.num_warps, one.metadata.shared))
    if options.json is not None:
        options.json.write_text(json.dumps(counts))


if __name__ == "__main__":
    sys.exit(main())
