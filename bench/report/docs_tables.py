"""Tables of the docs from committed results: `python -m bench.report.docs_tables --write` renews them.

A table is between `<!-- KIND: NAME -->` and `<!-- end -->`. `TABLES` maps each kind to the function that renders the
table of a name. `--check` fails if a page is stale.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.cli.broken_pipe import run_and_exit
from bench.core.machine import ROOT
from bench.core.results import load_folder

RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
START = re.compile(r"<!-- [\w-]+: [\w.-]+ -->")
TABLE = re.compile(r"(<!-- (?P<kind>[\w-]+): (?P<name>[\w.-]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def quality_tables(name: str) -> str:
    """Return the tables of `bench/results/quality-NAME.json`, after a line with its command, date and processor."""
    from bench.e2e.quality import report

    path = RESULTS / f"quality-{name}.json"
    found = json.loads(path.read_text())
    machine = found["machine"]
    return (
        f"[{path.name}](../bench/results/{path.name}): `{' '.join(['python -m bench', *found['command']])}`, "
        f"{machine['date']}, {machine['cpu']['model']}.\n\n{report.tables(found['variants'])}"
    )


def slowdown_list(name: str) -> str:
    """Return the slowdowns of the committed results whose names contain `-NAME-`."""
    from bench.report import slowdowns

    return slowdowns.section(load_folder(RESULTS, f"*-{name}-*.json"))


TABLES: Mapping[str, Callable[[str], str]] = {"quality": quality_tables, "slowdowns": slowdown_list}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the stale pages, or renew them with --write; with --check return 1 if a page is stale."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.docs_tables", description="Tables of the docs from committed results."
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="renew the stale pages")
    action.add_argument("--check", action="store_true", help="exit with code 1 if a page is stale")
    options = parser.parse_args(arguments)
    stale = stale_pages()
    for path, page in stale.items():
        if options.write:
            path.write_text(page)
        print(f"{path.relative_to(ROOT)}: {'renewed' if options.write else 'stale'}")
    if options.check and stale:
        print("run python -m bench.report.docs_tables --write", file=sys.stderr)
        return 1
    return 0


def stale_pages(folder: Path = DOCS) -> dict[Path, str]:
    """Return the pages whose tables differ from the committed results, with their new text."""
    pages = {path: path.read_text() for path in sorted(folder.rglob("*.md"))}
    return {path: new for path, page in pages.items() if (new := renewed(page)) != page}


def renewed(page: str) -> str:
    """Return a page with the tables of the committed results.

    Raises:
        ValueError: a table has an unknown kind, or a marker has no `<!-- end -->`.
        OSError: a table names a missing result.
    """

    def render(table: re.Match[str]) -> str:
        if table["kind"] not in TABLES:
            raise ValueError(f"no table is of kind {table['kind']!r}; the kinds are {', '.join(TABLES)}")
        return f"{table[1]}{TABLES[table['kind']](table['name'])}\n{table[5]}"

    tables = [table for table in TABLE.finditer(page) if not START.search(table["text"])]
    if len(tables) != len(START.findall(page)):
        raise ValueError("a table's start marker has no <!-- end -->")
    return TABLE.sub(render, page)


if __name__ == "__main__":
    run_and_exit(main)
