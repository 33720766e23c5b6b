"""Loading of compiled kernel libraries: their path, a check of their schemas, and errors."""

import os
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1]


def path_from(variable: str) -> Path | None:
    """Return the library that an environment variable names, or None if it is not set.

    Raises:
        ImportError: the file does not exist.
    """
    given = os.environ.get(variable)
    if not given:
        return None
    if not Path(given).exists():
        raise ImportError(f"{variable} names a file that does not exist: {given}")
    return Path(given)


def matches(kernel: torch._ops.OpOverload, operator: torch._ops.OpOverload) -> bool:
    """Return whether a kernel has the operator's arguments, except for the last, `backend`, and its result types."""
    found, expected = kernel._schema, operator._schema
    arguments, declared = ([(a.name, str(a.type)) for a in schema.arguments] for schema in (found, expected))
    results, declared_results = ([str(result.type) for result in schema.returns] for schema in (found, expected))
    return arguments == declared[:-1] and results == declared_results


def missing_reason(what: str, failure: str) -> str:
    """Return why there is no library: the message of a failed build in the file `failure`, or that there was none."""
    if (FOLDER / failure).exists():
        return (FOLDER / failure).read_text(encoding="utf-8").strip()
    return f"{what} are not built: {rebuild()}"


def rebuild() -> str:
    """Return how to build the library."""
    root = FOLDER.parent
    if (root / "setup.py").exists() and (root / "csrc").exists():
        return f"run `python setup.py build_ext --inplace` in {root}"
    return "install xsmoe again, with `pip install --force-reinstall --no-deps --no-build-isolation`"


def load_error(path: Path, problem: str, built: str | None) -> ImportError:
    """Return the error for a library that cannot be used; `built` is the torch it was built against, if known."""
    against = f"torch {built}" if built else "an unknown torch"
    return ImportError(
        f"{path} {problem}. It was built against {against}; torch {torch.__version__} is running. To build it again, "
        f"{rebuild()}"
    )
