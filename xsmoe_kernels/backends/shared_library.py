"""What libraries of native kernels share: where they lie, whether their operators are ours, and why one is absent."""

import os
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1]


def named(variable: str) -> Path | None:
    """The library that an environment variable names, if it names one.

    Raises:
        ImportError: there is no such file.
    """
    given = os.environ.get(variable)
    if not given:
        return None
    if not Path(given).exists():
        raise ImportError(f"{variable} names a file that does not exist: {given}")
    return Path(given)


def matches(kernel: torch._ops.OpOverload, operator: torch._ops.OpOverload) -> bool:
    """Whether a kernel takes the operator's arguments, all but the last, `backend`, and gives its results."""
    own, asked = kernel._schema, operator._schema
    takes, given = ([(a.name, str(a.type)) for a in schema.arguments] for schema in (own, asked))
    gives, expected = ([str(result.type) for result in schema.returns] for schema in (own, asked))
    return takes == given[:-1] and gives == expected


def absence(what: str, failure: str) -> str:
    """Why there is no library: what the build left in the file `failure`, or that there was none."""
    if (FOLDER / failure).exists():
        return (FOLDER / failure).read_text(encoding="utf-8").strip()
    return f"{what} are not built: {rebuild()}"


def rebuild() -> str:
    """What to do about it."""
    root = FOLDER.parent
    if (root / "setup.py").exists() and (root / "csrc").exists():
        return f"run `python setup.py build_ext --inplace` in {root}"
    return "install xsmoe anew, with `pip install --force-reinstall --no-deps --no-build-isolation`"


def unusable(path: Path, problem: str, built: str | None) -> ImportError:
    """The error that a library which is there cannot be used; `built` is the torch it was built against, if known."""
    against = f"torch {built}" if built else "a torch that is not known, by another Python"
    return ImportError(
        f"{path} {problem}. It was built against {against}; torch {torch.__version__} is running. To build it anew, "
        f"{rebuild()}"
    )
