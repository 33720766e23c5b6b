"""Errors about packages of an optional extra, such as `xsmoe[train]`."""

from collections.abc import Iterator
from contextlib import contextmanager

OWN = ("xsmoe", "xsmoe_kernels", "torch", "numpy")


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed. The message names the extra."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra to install if an import inside this context fails.

    Args:
        name: the extra that installs what is imported, a key of `project.optional-dependencies`.

    Raises:
        MissingExtra: a package is not installed.
    """
    try:
        yield
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in OWN:
            raise
        message = f"the package {package!r} is not installed; run `pip install 'xsmoe[{name}]'`"
        raise MissingExtra(message, name=error.name) from error
