"""Hooks of mkdocs: pages from files of the repository's root, and links to files that are no pages.

The site's first page is README.md, and CONTRIBUTING.md and CHANGELOG.md are pages too. GitHub shows the same files, so
that their links are rewritten here. Links to sources and results have no target in the site: their text stays. A test
checks that these targets exist.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<!`)(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the repository's root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page."""
    sources = {target: source for source, target in PAGES.items()}
    uri = page.file.src_uri
    folder = ROOT if uri in sources else (ROOT / "docs" / uri).parent

    def rewrite(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if re.match(r"https?:|mailto:|#", target):
            return link[0]
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve().relative_to(ROOT)
        if str(file) in PAGES:
            uri_of = PAGES[str(file)]
        elif file.parts[0] == "docs":
            uri_of = str(file.relative_to("docs"))
        else:
            return text
        depth = len(Path(uri).parts) - 1
        return f"{image}[{text}]({'../' * depth}{uri_of}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewrite, markdown)
