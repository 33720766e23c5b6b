"""Tables of docs/quality.md out of committed results: `python -m bench.quality.page --write` renews them.

Between `<!-- quality: NAME -->` and `<!-- end -->` stand the tables of `bench/results/quality-NAME.json`.
"""

import argparse
import json
import re
from collections.abc import Sequence

from bench.machine import ROOT
from bench.quality import tables

PAGE = ROOT / "docs" / "quality.md"
RESULTS = ROOT / "bench" / "results"
PART = re.compile(r"(<!-- quality: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page with new tables, or with --write put it in its place."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    page = renewed(PAGE.read_text())
    if parser.parse_args(arguments).write:
        PAGE.write_text(page)
    else:
        print(page)
    return 0


def renewed(page: str) -> str:
    """Return a page whose parts are as the committed results have them.

    Raises:
        ValueError: the page has no such part.
        OSError: a part names a result that is not there.
    """
    if not PART.search(page):
        raise ValueError("the page has no part that begins with <!-- quality: NAME -->")
    return PART.sub(lambda part: f"{part[1]}{section(part['name'])}\n{part[4]}", page)


def section(name: str) -> str:
    """Return the tables of a committed result, below a line that says how and where it was measured."""
    path = RESULTS / f"quality-{name}.json"
    found = json.loads(path.read_text())
    machine = found["machine"]
    return (
        f"[{path.name}](../bench/results/{path.name}): `{' '.join(['python -m bench', *found['command']])}`, "
        f"{machine['date']}, {machine['cpu']['model']}.\n\n{tables.report(found['variants'])}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
