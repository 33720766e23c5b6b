"""The HTML report: one self-contained page."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CSS = """
:root { color-scheme: light; --ink: #1d2433; --quiet: #5d6678; --line: #d9dee8; --band: #f5f7fa; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { max-width: 48rem; } .quiet { color: var(--quiet); margin-top: .25rem; }
.verdict { padding: .8rem 1rem; border-left: 4px solid var(--accent); background: var(--band); max-width: none; }
.verdict.unclear { border-color: #d55e00; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; } thead th.group { text-align: center; }
th:first-child, td:first-child, .text td, .text th { text-align: left; } .text td { white-space: normal; }
tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 1rem 0 2rem; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--quiet); font-size: .9rem; max-width: 48rem; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
@media print { main { padding: 0; } details { display: block; } }
"""


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        heading: the headings of its columns.
        rows: rows with one cell per column.
        groups: headings over groups of columns, as (text, number of columns), for all columns; empty for none.
        text: True for cells of text, which are aligned left; False for numbers, which are aligned right.
    """

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    text: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page: a title and optional paragraphs, tables and pictures.

    Attributes:
        pictures: files of PNG images with their captions.
        folded: whether the section is collapsed at first.
    """

    title: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    pictures: Sequence[tuple[Path, str]] = ()
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A report: its title, its subject, its verdict and whether that is clear, and its sections."""

    title: str
    about: str
    verdict: str
    clear: bool
    sections: Sequence[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """Return the page as HTML with embedded pictures. It refers to no other file and to no network address."""
    mark = "verdict" if page.clear else "verdict unclear"
    body = [f"<h1>{html.escape(page.title)}</h1>", f'<p class="quiet">{html.escape(page.about)}</p>']
    body.append(f'<p class="{mark}">{html.escape(page.verdict)}</p>')
    body += [_section(section) for section in page.sections]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(page.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def settings_table(settings: Mapping[str, object]) -> Table:
    """Return a table of names and values."""
    return Table(["setting", "value"], [[name, _plain(value)] for name, value in settings.items()], text=True)


def _section(section: Section) -> str:
    parts = [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
    if section.table is not None:
        parts.append(_table(section.table))
    for path, caption in section.pictures:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        parts.append(
            f'<figure><img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    title, content = html.escape(section.title), "\n".join(parts)
    if section.folded:
        return f"<details>\n<summary>{title}</summary>\n{content}\n</details>"
    return f"<h2>{title}</h2>\n{content}"


def _table(table: Table) -> str:
    rows = []
    if table.groups:
        cells = "".join(f'<th class="group" colspan="{span}">{html.escape(text)}</th>' for text, span in table.groups)
        rows.append(f"<tr>{cells}</tr>")
    rows.append("<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in table.heading) + "</tr>")
    body = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    kind = ' class="text"' if table.text else ""
    return (
        f'<div class="scroll"><table{kind}>\n<thead>\n{"".join(rows)}\n</thead>\n<tbody>\n'
        + "\n".join(body)
        + "\n</tbody>\n</table></div>"
    )


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    return "none" if value is None else str(value)
