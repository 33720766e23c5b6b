"""Options, their checks, and the session that the measuring commands share."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.core import machine, results
from bench.core.benchmark import Benchmark
from bench.core.measure import create, without_inputs
from bench.core.results import Case, Run, sizes_text
from bench.core.timing import Say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(ValueError):
    """An invalid command line; the message names the option."""


def add_machine(parser: argparse.ArgumentParser, dtypes: Iterable[str] = DTYPES) -> None:
    """Add --dtype, --device and --threads."""
    parser.add_argument("--dtype", choices=tuple(dtypes), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, metavar="T", help="threads of torch; the default is torch's")


def check_machine(device: str | None, threads: int | None = None) -> None:
    """Check that this machine has the device, and that the number of threads is valid.

    Raises:
        UsageError: they are not, as for all functions here.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")


def check_seconds(seconds: float | None) -> None:
    """Check a measuring time."""
    if seconds is not None and not seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {seconds:g}")


def check_kinds(kinds: Mapping[str, type[Benchmark]], dtype: str, letters: Collection[str]) -> None:
    """Check that benchmarks, by name, support a dtype, and that one of them has each size letter."""
    for name, kind in kinds.items():
        if DTYPES[dtype] not in kind.dtypes:
            supported = ", ".join(one for one, known in DTYPES.items() if known in kind.dtypes)
            raise UsageError(f"--dtype: {name} is measured in {supported}, not in {dtype}")
    known_letters = {letter for kind in kinds.values() for letter in kind.default_sizes}
    if unknown := sorted(set(letters) - known_letters):
        raise UsageError(
            f"--sizes: none of the benchmarks has a size {', '.join(unknown)}; they have {sorted(known_letters)}"
        )


def check_file(option: str, path: Path | None) -> None:
    """Check that the file of an option can be written, before minutes are spent on its content.

    An existing file is not changed, and a new one is removed again, because a later check may fail.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} must name a file, and {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path}: {error.strerror}") from None


def make_folder(option: str, folder: Path | None) -> None:
    """Create the folder of an option, before minutes are spent on its content."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: cannot make {folder}: {error.strerror}") from None


def parse_sizes(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the values of each letter in `--sizes`."""
    found: dict[str, tuple[int, ...]] = {}
    for one in given:
        letter, _, values = one.partition("=")
        if letter in found:
            raise UsageError(f"--sizes gives {letter} twice; separate its values by commas, as in {letter}=3,4")
        try:
            found[letter] = tuple(int(value) for value in values.split(","))
        except ValueError:
            raise UsageError(f"--sizes needs letters and whole numbers, as in N=256,2816, not {one!r}") from None
        if min(found[letter]) < 1:
            raise UsageError(f"--sizes: {one!r} must be at least 1")
    return found


def split_names(names: str | None) -> list[str]:
    """Return the names of a comma-separated list."""
    return [] if names is None else names.split(",")


def choose_variants(benchmark: Benchmark, only: Sequence[str], against: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the variants to measure, and the names of the baselines among them.

    Args:
        benchmark: the operator.
        only: names from --variants; empty selects the default variants.
        against: names from --against; empty selects the default baselines. They are measured even if `only` does not
            name them.
    """
    known = {variant.name: variant for variant in benchmark.variants()}
    for name in (*only, *against):
        if name not in known:
            raise UsageError(f"{benchmark.operator} has no variant {name!r}; it has {', '.join(sorted(known))}")
    names = list(only) or [name for name, variant in known.items() if variant.default]
    baselines = list(against) or [name for name, variant in known.items() if variant.baseline and name in names]
    return [*(name for name in baselines if name not in names), *names], baselines


def begin(device: torch.device, threads: int | None, *, timed: bool) -> dict[str, Any]:
    """Set torch's threads, if a number is given; print and return the machine facts."""
    if threads is not None:
        torch.set_num_threads(threads)
    facts = machine.describe(device)
    print(machine.line(facts), flush=True)
    if timed and machine.busy(facts):
        print(f"\n{machine.BUSY}", flush=True)
    return facts


def progress(started: float, label: str = "") -> Say:
    """Return a function that shows progress in one terminal line, with the time since `started`.

    An empty text clears the line.
    """
    live = sys.stderr.isatty()

    def say(text: str) -> None:
        if not live:
            return
        about = f" ({label})" if label else ""
        line = f"[{time.monotonic() - started:6.1f} s] {text}{about}" if text else ""
        # A line that wraps could not be cleared.
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{line[:width]}\r", end="", file=sys.stderr, flush=True)

    return say


class Session:
    """The cases that a command measures in sequence, and the JSON file that grows with them.

    Args:
        options: the checked command line.
        started: when the command began.
        timed: whether times are measured.
    """

    def __init__(self, options: argparse.Namespace, started: float, *, timed: bool) -> None:
        self.options, self.started = options, started
        self.device, self.dtype = torch.device(options.device), DTYPES[options.dtype]
        self.facts = begin(self.device, options.threads, timed=timed)
        self.cases: list[Case] = []

    def measure(
        self,
        kind: type[Benchmark],
        sizes: Mapping[str, int],
        names: Sequence[str],
        run: Callable[..., Case],
    ) -> Case:
        """Measure a case; all its rows are skipped if its weights do not fit into memory.

        Args:
            kind: the benchmark.
            sizes: its sizes.
            names: the variants to measure.
            run: called with the benchmark, the names, and `say`.
        """
        say = progress(self.started, f"{kind.operator} {sizes_text(sizes)}")
        try:
            say("weights")
            benchmark, reason = create(kind, sizes, self.dtype, self.device, self.options.seed)
            if benchmark is None:
                case = without_inputs(kind, sizes, self.dtype, self.device, names, reason)
            else:
                case = run(benchmark, names, say=say)
        finally:
            say("")
        self.cases.append(case)
        # After every case, so that an interruption loses only the running case.
        if self.options.json is not None:
            results.save(self.run(), self.options.json)
        return case

    def run(self) -> Run:
        """Return what was measured so far."""
        return Run(self.options.given, self.facts, self.cases, time.monotonic() - self.started)

    def any_refused(self) -> bool:
        """Print the refused rows; return whether there are any."""
        refused = self.run().refused()
        for case, row in refused:
            print(f"refused: {case.operator} {row.variant} at {case.sizes}: {row.reason}", file=sys.stderr)
        return bool(refused)
