"""`python -m bench kernels`: operators against their rivals, at many sizes."""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from bench import case_plots, kernels, machine, pictures, results
from bench.case import drawn, measure, without_inputs
from bench.workload import Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS, QUICK_SECONDS = 8.0, 3.0


class UsageError(ValueError):
    """The command line asks for what there is not."""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "kernels",
        help="operators against their rivals: time, share of the floor, bytes saved for backward, error",
        description="Times operators against their rivals in interleaved rounds. A variant whose result is wrong gets "
        "no time, and makes the exit code 1. docs/benchmarking.md says how to read the tables.",
    )
    add_options(parser, kernels, "operators")


def add_options(parser: argparse.ArgumentParser, rooms: ModuleType, called: str) -> None:
    """Makes `parser` one that measures what a package of rooms holds, `called` by that word in its help."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{called}; all of them by default: {', '.join(rooms.ROOMS)}"
    )
    parser.add_argument("--sizes", nargs="+", default=[], metavar="L=N[,N]", help="as in N=256,2816 E=10; others stay")
    parser.add_argument("--quick", action="store_true", help="few sizes and few rounds; a minute for one operator")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, metavar="T", help="threads of torch; by default what torch takes")
    parser.add_argument("--variants", metavar="V[,V]", help="only these; also ones that an ordinary run leaves out")
    parser.add_argument("--against", metavar="V[,V]", help="the variants that others are compared with")
    parser.add_argument("--seconds", type=float, help=f"of timing for each size; {SECONDS:g}, quick {QUICK_SECONDS:g}")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes everything, every sample too, to a file")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draws a picture of each case (matplotlib)")
    parser.set_defaults(run=run, rooms=rooms)


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table per case, and returns 1 if a row was refused, 2 if the command line is wrong."""
    begin = time.monotonic()
    device = torch.device(options.device)
    try:
        _check(options)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no CUDA device here")
        planned = list(plan(options, device))
    except UsageError as error:
        print(f"python -m bench {options.given[0]}: {error}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = machine.describe(device)
    print(machine.line(facts), flush=True)
    if machine.busy(facts):
        print(
            "\n**Other programs keep this machine busy: trust ratios more than times, and neither much.**", flush=True
        )
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    cases = []
    for kind, sizes, names, against in planned:
        dtype = DTYPES[options.dtype]
        label = f"{kind.operator} {' '.join(f'{letter}={size}' for letter, size in sizes.items())}"
        workload, reason = drawn(kind, sizes, dtype, device, options.seed)
        if workload is None:
            case = without_inputs(kind, sizes, dtype, device, names, reason)
        else:
            case = measure(workload, names, against, seconds=seconds, say=speaker(label, begin))
        cases.append(case)
        print(f"\n{results.table(results.as_saved(case))}", flush=True)
        # After every case, so that who is stopped loses only what was going on.
        if options.json is not None:
            results.save(results.Run(options.given, facts, cases, time.monotonic() - begin), options.json)
    done = results.Run(options.given, facts, cases, time.monotonic() - begin)
    if options.plot is not None:
        pictures.announced(lambda: case_plots.write(done, options.plot))
    for case, row in done.refused():
        print(f"refused: {case.operator} {row.variant} at {case.sizes}: {row.reason}", file=sys.stderr)
    return 1 if done.refused() else 0


def _check(options: argparse.Namespace) -> None:
    """What argparse does not see, and what would otherwise fail after everything was measured."""
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads must be at least 1, not {options.threads}")
    if options.seconds is not None and options.seconds <= 0:
        raise UsageError(f"--seconds must be above 0, not {options.seconds:g}")
    make_folder("--plot", options.plot)
    if options.json is not None:
        make_file("--json", options.json)


def make_file(option: str, path: Path) -> None:
    """Tries to write the file that an option names, before minutes are spent on what goes into it.

    What is there stays as it is, and where there is nothing, nothing is left: another check may fail after this one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{option}: cannot write {path}: {error.strerror}") from None


def make_folder(option: str, folder: Path | None) -> None:
    """Makes the folder that an option names, if it was given, before minutes are spent."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: cannot make {folder}: {error.strerror}") from None


def plan(
    options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[type[Workload], dict[str, int], list[str], list[str]]]:
    """What to measure: the room, its sizes, the variants and the baselines, for each case."""
    asked = sizes_of(options.sizes)
    rooms = options.rooms
    kinds: dict[str, type[Workload]] = {}
    for name in options.names or rooms.ROOMS:
        if name not in rooms.ROOMS:
            raise UsageError(f"there is no benchmark of {name!r}; there is {', '.join(rooms.ROOMS)}")
        kinds[name] = rooms.room(name)
        if DTYPES[options.dtype] not in kinds[name].dtypes:
            taken = ", ".join(one for one, dtype in DTYPES.items() if dtype in kinds[name].dtypes)
            raise UsageError(f"--dtype: {name} is measured in {taken}, not in {options.dtype}")
    known = {letter for kind in kinds.values() for letter in kind.letters}
    if unknown := sorted(set(asked) - known):
        raise UsageError(f"--sizes: nothing asked for has a size {', '.join(unknown)}; they have {sorted(known)}")
    for kind in kinds.values():
        letters = {**kind.letters, **(kind.cuda_sizes if device.type == "cuda" else {})}
        letters |= kind.quick_sizes if options.quick else {}
        letters |= {letter: values for letter, values in asked.items() if letter in letters}
        every = list(combinations(letters))
        # Names do not depend on sizes, and weights of these are drawn at once.
        workload = kind(dict.fromkeys(letters, 1), DTYPES[options.dtype], device)
        names, against = choose(workload, listed(options.variants), listed(options.against))
        for sizes in [sizes for sizes in every if kind.sensible(sizes)] or every:
            yield kind, sizes, names, against


def combinations(letters: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """All combinations of sizes, the last letter changing first."""
    for values in itertools.product(*letters.values()):
        yield dict(zip(letters, values, strict=True))


def choose(workload: Workload, only: Sequence[str], against: Sequence[str]) -> tuple[list[str], list[str]]:
    """Variants and baselines; a baseline is measured even if it is not among the variants that were asked for."""
    usual, known = list(workload.variants()), {*workload.variants(), *workload.optional()}
    for name in (*only, *against):
        if name not in known:
            raise UsageError(f"{workload.operator} has no variant {name!r}; it has {', '.join(sorted(known))}")
    names = list(only) or usual
    baselines = list(against) or [name for name in workload.baselines() if name in names]
    return [*(name for name in baselines if name not in names), *names], baselines


def sizes_of(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The values of each letter, from what `--sizes` was given."""
    found: dict[str, tuple[int, ...]] = {}
    for one in given:
        letter, _, values = one.partition("=")
        if letter in found:
            raise UsageError(f"--sizes gives {letter} twice; give its values with commas, as in {letter}=3,4")
        try:
            found[letter] = tuple(int(value) for value in values.split(","))
        except ValueError:
            raise UsageError(f"--sizes takes letters and whole numbers, as in N=256,2816, not {one!r}") from None
        if min(found[letter]) < 1:
            raise UsageError(f"--sizes: {one!r} must be at least 1")
    return found


def listed(names: str | None) -> list[str]:
    """The names of a list with commas."""
    return [] if names is None else names.split(",")


def speaker(label: str, begin: float) -> Callable[[str], None]:
    """Says on a terminal what goes on."""
    live = sys.stderr.isatty()

    def say(text: str) -> None:
        line = f"[{time.monotonic() - begin:6.1f} s] {label}: {text}"
        # A terminal shows what goes on now; a log need not keep it.
        if live:
            print(f"\r\x1b[K{line[:150]}\r", end="", file=sys.stderr, flush=True)

    return say
