"""Offline compilation of all launched kernels for several GPUs: registers, spills and shared memory.

    python -m tests.kernels.helpers.triton_offline                      # a table for all targets and precisions
    python -m tests.kernels.helpers.triton_offline --targets sm_90 --precisions half
    python -m tests.kernels.helpers.triton_offline --write              # makes it the budget, triton_budget.json

The launchers run on CPU tensors up to the launch, which is recorded and compiled with arguments specialized as Triton
specializes real ones. Nothing runs, so the tensors' contents do not matter.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

# Kernels are compiled, not interpreted; and Triton reads it when it is imported.
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from tests.kernels.helpers.triton_scenarios import SCENARIOS, Scenario
from xsmoe_kernels.triton_utils import kernel_helpers

BUDGET = Path(__file__).parents[1] / "backends" / "triton_budget.json"
WORKERS = 2
PRECISIONS = ("half", "tf32", "ieee")


class Limits(NamedTuple):
    """Limits of a target: bytes of shared memory for a program, and registers for a thread."""

    shared: int
    registers: int


class Target(NamedTuple):
    """An architecture by Triton's name."""

    backend: str
    arch: int | str
    warp: int
    limits: Limits
    precisions: tuple[str, ...] = PRECISIONS


TARGETS = {
    "sm_80": Target("cuda", 80, 32, Limits(99 << 10, 255)),
    "sm_90": Target("cuda", 90, 32, Limits(227 << 10, 255)),
    "sm_100": Target("cuda", 100, 32, Limits(227 << 10, 255)),
    "gfx942": Target("hip", "gfx942", 64, Limits(64 << 10, 512), ("half", "ieee")),
}
"""sm_80 stands for relatives too, some of which have 99 KiB of shared memory; AMD's 512 registers are both kinds."""

NEEDS_TRITON = {"gfx942": (3, 7)}
"""Targets for which an older Triton is not asked: 3.6 does not compile `count_kernel` for gfx942, and spills there."""

MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Found:
    """A kernel on a target at a precision: the largest needs of its launches.

    Attributes:
        registers: of a thread; for AMD both kinds together.
        shared: bytes.
        spills: bytes of stack for NVIDIA, spilled numbers for AMD.
        matrix: the instructions of its products, "" if it has none, "plain" if they are none of the matrix units'.
        launches: the number of different ones.
        error: why one of them does not compile; "" if all compile.
    """

    kernel: str
    target: str
    precision: str
    registers: int
    shared: int
    spills: int
    matrix: str
    launches: int = 1
    error: str = ""


class Launch(NamedTuple):
    """Arguments of a call of `kernel_helpers.launch`."""

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, int]


def record(target: str, precision: str, scenarios: Sequence[Scenario]) -> list[Launch]:
    """Return the launches of scenarios on CPU tensors, configured for a target."""
    recorded: list[Launch] = []

    def keep(kernel: Any, grid: Any, device: Any, arguments: Any, constants: Any, config: Any) -> None:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        recorded.append(Launch(kernel, {**arguments, **constants, **config.blocks}, options))

    with _as_if_on(target, precision, keep):
        for scenario in scenarios:
            scenario(torch.bfloat16 if precision == "half" else torch.float32)
    return recorded


@contextmanager
def _as_if_on(target: str, precision: str, keep: Callable[..., None]) -> Iterator[None]:
    from xsmoe_kernels.triton_utils import tuning

    replaced = {
        (kernel_helpers, "launch"): keep,
        (kernel_helpers, "precision"): lambda tensor: "ieee" if precision == "half" else precision,
        (tuning, "architecture"): lambda device: target,
        (tuning, "default"): lambda table, like, _: table.defaults[target, precision],
    }
    before = {place: getattr(*place) for place in replaced}
    for place, function in replaced.items():
        setattr(*place, function)
    try:
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


def specialised(launch: Launch, target: str) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any], dict[str, Any]]:
    """Return signature, constants, attributes and options of a launch, by Triton's rules for arguments."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_triton_target(target))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, dict(launch.options), bound, specialization, None
    )
    return signature, constants, attributes, options.__dict__


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile a launch for a target, and return Triton's compiled kernel."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes, options = specialised(launch, target)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=_triton_target(target), options=options)


def measure(launch: Launch, target: str) -> Found:
    """Compile a launch, and read what it needs; the precision stays open."""
    compiled = compile_launch(launch, target)
    assembly = compiled.asm
    nvidia = TARGETS[target].backend == "cuda"
    needs = nvidia_needs(cuobjdump(assembly["cubin"])) if nvidia else amd_needs(assembly["amdgcn"])
    text = assembly["ptx" if nvidia else "amdgcn"]
    matrix = ""
    if "tt.dot" in assembly["ttir"]:
        matrix = next((name for name in MATRIX_INSTRUCTIONS if name in text), "plain")
    registers, spills = needs
    return Found(name_of(launch), target, "", registers, int(compiled.metadata.shared), spills, matrix)


def name_of(launch: Launch) -> str:
    """Return the operator and the kernel."""
    return f"{launch.kernel.fn.__module__.split('.')[2]}.{launch.kernel.fn.__name__}"


def cuobjdump(cubin: bytes) -> str:
    """Return the output of NVIDIA's tool, which is part of Triton, for a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_needs(usage: str) -> tuple[int, int]:
    """Return registers, and bytes of stack or local memory."""
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers["REG"], max(numbers["STACK"], numbers["LOCAL"])


def amd_needs(assembly: str) -> tuple[int, int]:
    """Return vector registers of both kinds, and the number of spilled numbers."""
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+_(?:spill_)?count):\s*(\d+)", assembly)}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]


def _triton_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*TARGETS[target][:3])


_work: list[tuple[Launch, str, set[str]]] = []
"""Work for the workers, with the precisions for which it is the same; they are forked after it is complete."""


def _measure_one(place: int) -> list[Found]:
    launch, target, precisions = _work[place]
    found = _measured(launch, target)
    return [replace(found, precision=precision) for precision in precisions]


def _measured(launch: Launch, target: str) -> Found:
    with tempfile.TemporaryFile("w+", errors="replace") as said, _errors_into(said.fileno()):
        try:
            return measure(launch, target)
        except Exception as error:
            said.seek(0)
            notes = re.findall(r"Pipeline failed while executing \[`(\w+)`", said.read())
            reason = f"{type(error).__name__}: {error}".splitlines()[0] + "".join(f" in {note}" for note in notes)
            return Found(name_of(launch), target, "", 0, 0, 0, "", error=reason)


@contextmanager
def _errors_into(file: int) -> Iterator[None]:
    """Capture the compiler's stderr, which is the whole program if a pass fails."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def measure_all(
    targets: Sequence[str], precisions: Sequence[str], scenarios: Sequence[Scenario] = SCENARIOS
) -> list[Found]:
    """Return the largest needs per kernel, target and precision. Equal launches are compiled once."""
    different: dict[str, tuple[Launch, str, set[str]]] = {}
    for target, precision in combinations(targets, precisions):
        for launch in record(target, precision, scenarios):
            identity = str((id(launch.kernel), target, specialised(launch, target)))
            different.setdefault(identity, (launch, target, set()))[2].add(precision)
    _work[:] = different.values()
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        parts = pool.imap_unordered(_measure_one, range(len(_work)))
        return combined(one for part in parts for one in part)


def too_old(target: str, version: str) -> str | None:
    """Return why this version of Triton cannot compile for a target; None if it can."""
    needed = NEEDS_TRITON.get(target, (0, 0))
    if tuple(int(part) for part in version.split(".")[:2]) >= needed:
        return None
    return f"Triton {version} is not held to {target}, which needs {'.'.join(map(str, needed))}"


def combinations(targets: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Return targets with the given precisions that they support."""
    return [(target, one) for target in targets for one in precisions if one in TARGETS[target].precisions]


def launched() -> list[tuple[str, str, str]]:
    """Return every kernel with all targets and precisions, without compilation."""
    return sorted(
        {
            (name_of(launch), target, precision)
            for target, precision in combinations(list(TARGETS), PRECISIONS)
            for launch in record(target, precision, SCENARIOS)
        }
    )


def combined(found: Iterable[Found]) -> list[Found]:
    """Return one entry per kernel, target and precision, with the largest numbers."""
    together: dict[tuple[str, str, str], Found] = {}
    for one in found:
        key = one.kernel, one.target, one.precision
        other = together.get(key)
        if other is not None:
            one = Found(
                *key,
                max(one.registers, other.registers),
                max(one.shared, other.shared),
                max(one.spills, other.spills),
                # A product that is off the matrix units in one launch is not hidden by another.
                max(one.matrix, other.matrix, key=("", *MATRIX_INSTRUCTIONS, "plain").index),
                one.launches + other.launches,
                one.error or other.error,
            )
        together[key] = one
    return [together[key] for key in sorted(together)]


def as_budget(found: Sequence[Found], version: str) -> dict[str, Any]:
    """Return the content of the budget's file, without kernels that do not compile."""
    kernels: dict[str, Any] = {}
    for one in (one for one in found if not one.error):
        entry = {"registers": one.registers, "shared": one.shared, "spills": 0, "matrix": one.matrix}
        kernels.setdefault(one.kernel, {}).setdefault(one.target, {})[one.precision] = entry
    return {"triton": version, "kernels": kernels}


def dumps(budget: Mapping[str, Any]) -> str:
    """Return JSON with a line for each kernel, target and precision, for readable diffs."""
    text = json.dumps(budget, indent=1)
    return re.sub(r"\{\s+(\"registers\"[^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n"


def line(one: Found) -> str:
    """Return a readable table."""
    return (
        f"{one.kernel:36s} {one.target:7s} {one.precision:5s} {one.registers:4d} registers "
        f"{one.shared / 1024:6.1f} KiB  {one.matrix or '-':16s}"
        + (f" SPILLS {one.spills}" if one.spills else "")
        + (f" FAILS: {one.error}" if one.error else "")
        + (f" ({one.launches} launches)" if one.launches > 1 else "")
    )


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--write", action="store_true", help="makes what is found the budget; for all targets only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes what is found to a file, for the test")
    options = parser.parse_args()
    if options.write and (len(options.targets), len(options.precisions)) != (len(TARGETS), len(PRECISIONS)):
        parser.error("--write takes all targets and precisions")
    found = measure_all(options.targets, options.precisions)
    for one in found:
        print(line(one))
    if options.json is not None:
        written = {"triton": triton.__version__, "launched": launched(), "found": [asdict(one) for one in found]}
        options.json.write_text(json.dumps(written))
    if options.write:
        BUDGET.write_text(dumps(as_budget(found, triton.__version__)))
    wrong = [one for one in found if one.spills or one.error]
    if wrong:
        print(f"{len(wrong)} of {len(found)} spill or do not compile, which no budget allows", file=sys.stderr)
    return 1 if wrong and options.json is None else 0


if __name__ == "__main__":
    sys.exit(main())
