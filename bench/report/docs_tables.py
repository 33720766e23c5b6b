"""Generated parts of README.md and docs: `python -m bench.report.docs_tables --write` renews them.

A part is between `<!-- KIND: ARGUMENTS -->` and `<!-- end -->`. `TABLES` maps each kind to the function that renders
it. Every part is a function of committed files only, so that all machines render the same text. `--check` fails if a
page or the plot of README.md is stale.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.cli.broken_pipe import run_and_exit
from bench.core.machine import ROOT
from bench.report import docs_plot, docs_results, support_matrix

START = re.compile(r"^<!-- (?P<kind>[\w-]+): (?P<arguments>[^\n]+?) -->$", re.MULTILINE)
TABLE = re.compile(START.pattern + r"\n(?P<text>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)

TABLES: Mapping[str, Callable[[str], str]] = {
    "demo": docs_results.demo_table,
    "kernel": docs_results.kernel_table,
    "memory": docs_results.memory_table,
    "profile": docs_results.profile_table,
    "quality": docs_results.quality_tables,
    "slowdowns": docs_results.slowdown_list,
    "speedups": docs_results.speedup_table,
    "stream": docs_results.stream_tables,
    "support": support_matrix.table,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the stale files, or renew them with --write; with --check return 1 if a file is stale."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.docs_tables", description="Generated parts of README.md and docs."
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="renew the stale files")
    action.add_argument("--check", action="store_true", help="exit with code 1 if a file is stale")
    options = parser.parse_args(arguments)
    stale = stale_pages(pages())
    for path, text in stale.items():
        if options.write:
            path.write_text(text)
    stale_plot = not docs_plot.up_to_date()
    if stale_plot and options.write:
        docs_plot.write()
    names = [*stale, *([docs_plot.PATH] if stale_plot else [])]
    for path in names:
        print(f"{path.relative_to(ROOT)}: {'renewed' if options.write else 'stale'}")
    if options.check and names:
        print("run python -m bench.report.docs_tables --write", file=sys.stderr)
        return 1
    return 0


def pages() -> list[Path]:
    """Return the pages that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale_pages(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the pages whose parts differ from the committed files, with their new text."""
    texts = {path: path.read_text() for path in paths}
    return {path: new for path, text in texts.items() if (new := renewed(text, root=path.parent == ROOT)) != text}


def renewed(page: str, *, root: bool = False) -> str:
    """Return a page with its generated parts.

    Args:
        page: the text.
        root: whether the page is in the root folder. Links in generated parts are relative to docs/ otherwise.

    Raises:
        ValueError: a part has an unknown kind or bad arguments, or a marker has no `<!-- end -->`.
        OSError: a part names a missing result.
    """

    def render(part: re.Match[str]) -> str:
        kind, arguments = part["kind"], part["arguments"]
        if kind not in TABLES:
            raise ValueError(f"no generated part is of kind {kind!r}; the kinds are {', '.join(TABLES)}")
        text = TABLES[kind](arguments)
        text = text.replace("](../", "](") if root else text
        return f"<!-- {kind}: {arguments} -->\n\n{text}\n\n<!-- end -->"

    parts = [part for part in TABLE.finditer(page) if not START.search(part["text"])]
    if len(parts) != len(START.findall(page)):
        raise ValueError("a marker of a generated part has no <!-- end -->")
    return TABLE.sub(render, page)


if __name__ == "__main__":
    run_and_exit(main)
