"""The oldest Linux that a compiled library runs on, by the versions of the symbols that it needs."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

# glibc 2.x of a manylinux tag, and the newest symbols of libstdc++ that its systems have (auditwheel's policies).
POLICIES = (
    (17, (3, 4, 19), (1, 3, 7)),
    (24, (3, 4, 22), (1, 3, 10)),
    (27, (3, 4, 24), (1, 3, 11)),
    (31, (3, 4, 28), (1, 3, 12)),
    (34, (3, 4, 29), (1, 3, 13)),
    (35, (3, 4, 30), (1, 3, 13)),
    (39, (3, 4, 33), (1, 3, 15)),
)

Versions = dict[str, tuple[int, ...]]


def needed_versions(libraries: Iterable[Path]) -> Versions:
    """Return the newest version of GLIBC, GLIBCXX and CXXABI that any of the libraries needs."""
    newest: Versions = {}
    for library in libraries:
        command = ["readelf", "--version-info", "--wide", str(library)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for name, number in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", shown):
            newest[name] = max(newest.get(name, ()), tuple(map(int, number.split("."))))
    return newest


def platform_tag(needed: Versions, machine: str) -> str:
    """Return the manylinux tag of libraries that need these versions, such as "manylinux_2_34_x86_64".

    Raises:
        ValueError: no known system has symbols as new as these.
    """
    glibc, glibcxx, cxxabi = (needed.get(name, ()) for name in ("GLIBC", "GLIBCXX", "CXXABI"))
    for minor, newest_glibcxx, newest_cxxabi in POLICIES:
        if glibc <= (2, minor, 99) and glibcxx <= newest_glibcxx and cxxabi <= newest_cxxabi:
            return f"manylinux_2_{minor}_{machine}"
    raise ValueError(f"no manylinux tag covers {needed}; add a newer one to POLICIES in tools/manylinux.py")
