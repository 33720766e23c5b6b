"""Arguments that several commands take: how they are given, what they mean, and what is wrong with them."""

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from bench.workload import Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(ValueError):
    """The command line asks for what there is not."""


def add_machine(parser: argparse.ArgumentParser, dtypes: Iterable[str] = DTYPES) -> None:
    """Adds --dtype, --device and --threads."""
    parser.add_argument("--dtype", choices=tuple(dtypes), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, metavar="T", help="threads of torch; by default what torch takes")


def check_machine(device: str | None, threads: int | None = None) -> None:
    """Whether this machine has the device, and a number of threads is one.

    Raises:
        UsageError: they are not; the message names the argument, as those of all functions here do.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, not {threads}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")


def check_seconds(seconds: float | None) -> None:
    """Whether so long can be measured."""
    if seconds is not None and not seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {seconds:g}")


def check_kinds(kinds: Mapping[str, type[Workload]], dtype: str, asked: Collection[str]) -> None:
    """Whether workloads, by their names, are measured in a dtype, and whether one of them has each letter asked for."""
    for name, kind in kinds.items():
        if DTYPES[dtype] not in kind.dtypes:
            taken = ", ".join(one for one, known in DTYPES.items() if known in kind.dtypes)
            raise UsageError(f"--dtype: {name} is measured in {taken}, not in {dtype}")
    letters = {letter for kind in kinds.values() for letter in kind.letters}
    if unknown := sorted(set(asked) - letters):
        raise UsageError(f"--sizes: nothing asked for has a size {', '.join(unknown)}; they have {sorted(letters)}")


def make_file(option: str, path: Path | None) -> None:
    """Tries to write the file that an option names, if it was given, before minutes are spent on what goes into it.

    What is there stays as it is, and where there is nothing, nothing is left: another check may fail after this one.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} must name a file, and {path} is a folder")
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


def choose(workload: Workload, only: Sequence[str], against: Sequence[str]) -> tuple[list[str], list[str]]:
    """Variants and baselines; a baseline is measured even if it is not among the variants that were asked for."""
    usual, known = list(workload.variants()), {*workload.variants(), *workload.optional()}
    for name in (*only, *against):
        if name not in known:
            raise UsageError(f"{workload.operator} has no variant {name!r}; it has {', '.join(sorted(known))}")
    names = list(only) or usual
    baselines = list(against) or [name for name in workload.baselines() if name in names]
    return [*(name for name in baselines if name not in names), *names], baselines


def listed(names: str | None) -> list[str]:
    """The names of a list with commas."""
    return [] if names is None else names.split(",")
