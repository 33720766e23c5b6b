"""Links, files, modules and commands that README and docs name exist; measured numbers are in generated tables only."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.report import docs_tables
from xsmoe_kernels import FrozenExperts, __version__

ROOT = Path(__file__).parents[1]
PAGES = [*docs_tables.pages(), ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:xsmoe|xsmoe_kernels|bench|csrc|tests|docs|examples|tools)/[\w./<>*-]*)`")
MODULE = re.compile(r"`?(?:python -m |\b)((?:xsmoe|xsmoe_kernels|bench)(?:\.\w+)+)")
MAKE = re.compile(r"`make ([\w-]+)")
MEASURED = re.compile(r"\d[\d.,]*\s?(?:(?:ms|us|µs|s|MiB|GiB|[GT]FLOP/s|[GT]B/s|times|minutes|seconds)(?![\w/])|%)")
MEASURED_ONCE = {"docs/kernels.md": "What was tried", "docs/triton_kernels.md": ""}
"""A section with measurements of the past; nothing for forecasts."""
CONSTANTS = {
    "docs/benchmarking.md": ("100 %", "96 MiB", "5 %", "99 %", "256 MiB", "1 GiB"),
    "docs/cuda_kernels.md": ("64 MiB",),
    "docs/triton_kernels.md": ("64 MiB",),
}
"""Thresholds and sizes by design, which are not measurements."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def own_text(path: Path) -> str:
    """A page without its generated parts."""
    return docs_tables.TABLE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problems(path: Path, text: str) -> Iterator[str]:
    """What a text names that does not exist."""
    for target in LINK.findall(text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        if not linked.exists():
            yield f"link to {target}"
        elif anchor and anchor not in anchors(linked):
            yield f"no heading for {target}"
    for file in FILE.findall(text):
        pattern = re.sub(r"<\w+>", "*", file).rstrip("/")
        if not any(ROOT.glob(pattern)):
            yield f"file {file}"
    for module in MODULE.findall(text):
        if not exists(module):
            yield f"module {module}"
    makefile = (ROOT / "Makefile").read_text()
    for goal in MAKE.findall(text):
        if not re.search(rf"^{goal}:", makefile, re.MULTILINE):
            yield f"make {goal}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            if importlib.util.find_spec(".".join(parts[:end])) is None:
                continue
        except ModuleNotFoundError:
            continue
        found: object = importlib.import_module(".".join(parts[:end]))
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_what_a_page_names_exists(path: Path) -> None:
    assert list(problems(path, path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "[page](nowhere.md)",
        "[page](README.md#no-such-heading)",
        "`bench/no_such_file.py`",
        "`csrc/<operator>/no_such.cpp`",
        "`python -m bench.no_such`",
        "`xsmoe.StreamingTrainers`",
        "`make nothing`",
    ],
)
def test_a_name_that_does_not_exist_is_found(text: str) -> None:
    assert len(list(problems(ROOT / "README.md", text))) == 1


def measured(page: str, text: str) -> list[str]:
    """The measured numbers of a page's running text."""
    section = MEASURED_ONCE.get(page)
    if section == "":
        text = re.sub(r"^Forecast .*?(?=\n\n|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    elif section:
        text = re.sub(rf"^## {section}$.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    return [number for number in MEASURED.findall(text) if number not in CONSTANTS.get(page, ())]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_measured_numbers_are_in_generated_tables(path: Path) -> None:
    assert measured(named(path), own_text(path)) == []


@pytest.mark.parametrize(
    "text",
    [
        "It takes 12.5 ms.",
        "It takes 65 us, 32 s with the set-up.",
        "It takes 12 minutes.",
        "That is 3.25 times as fast.",
        "That is 2 times as fast.",
        "That is 40 % faster.",
        "It saves 300 MiB.",
        "It reaches 350 GFLOP/s.",
        "It reaches 780 TFLOP/s.",
    ],
)
def test_a_measured_number_in_a_sentence_is_found(text: str) -> None:
    assert measured("README.md", own_text(ROOT / "README.md") + text) != []


def test_prepacked_weights_have_twice_the_size() -> None:
    """docs/results.md and docs/kernels.md say so."""
    down, up = torch.randn(9, 64, 768), torch.randn(9, 64, 768)
    pack = FrozenExperts(down, up).pack()
    if pack is None:
        pytest.skip("no native kernels, no prepacked weights")
    assert pack.nbytes == 2 * (down.nbytes + up.nbytes)


def test_the_newest_version_of_the_changelog_is_that_of_the_package() -> None:
    versions = re.findall(r"^## ([\d.]+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda one: [int(part) for part in one.split(".")], reverse=True)
