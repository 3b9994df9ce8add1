"""Hooks of mkdocs: documents that lie outside docs/ are pages too, and links work here as they do in
the repository.

Documents link to each other by their paths in the repository. A link to a page becomes a link within
the site; a link to any other file of the repository becomes its path, as text. A ready source file
(docs/formats/*.toml) is a page of its own.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "RESULTS.md": "results/results.md",
    "results/clicks-evening.md": "results/clicks-evening.md",
    "results/clicks-nights.md": "results/clicks-nights.md",
    "results/baskets-nights.md": "results/baskets-nights.md",
    "results/films.md": "results/films.md",
    "results/next-basket.md": "results/next-basket.md",
    "results/habit.md": "results/habit.md",
    "results/what-is-a-session.md": "results/what-is-a-session.md",
    "results/scale.md": "results/scale.md",
    "benchmarks/README.md": "benchmarks/benchmarks.md",
    "benchmarks/peers.md": "benchmarks/peers.md",
    "benchmarks/power.md": "benchmarks/power.md",
    "ARCHITECTURE.md": "design/architecture.md",
    "CONTRIBUTING.md": "design/contributing.md",
    "CHANGELOG.md": "design/changelog.md",
    "LAB_LOG.md": "design/lab-log.md",
    "README.md": "index.md",  # a link to it: the site has a first page of its own
}
"""Documents outside docs/, and the page that each of them is."""
FENCE = re.compile(r"^(```.*?^```\s*?$)", re.M | re.S)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
TABLE = re.compile(r"<table>.*?</table>", re.S)
log = get_plugin_logger("documents")


def on_files(files: Files, config: Any) -> Files:
    for path, page in OUTSIDE.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, content=(REPO / path).read_text("utf-8")))
    for picture in [*(REPO / "results").glob("*.svg"), *(REPO / "benchmarks").glob("*.svg")]:
        shown = f"{picture.parent.name}/{picture.name}"
        files.append(File.generated(config, shown, abs_src_path=str(picture)))
    for source in sorted((REPO / "docs" / "formats").glob("*.toml")):
        name = f"formats/{source.stem}.md"
        text = f"# {source.name}\n\n```toml\n{source.read_text('utf-8')}```\n\n[All of them](README.md)\n"
        files.append(File.generated(config, name, content=text))
        if (copied := files.get_file_from_path(f"formats/{source.name}")) is not None:
            files.remove(copied)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    pages = {site: path for path, site in OUTSIDE.items() if path != "README.md"}
    path = pages.get(here, f"docs/{here}")
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _rewritten(link, path, here), one) for one in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Tables of the reference, whose cells say what they are: on a narrow screen a row is a card."""
    return TABLE.sub(_labelled, html) if page.file.src_uri.startswith("reference/") else html


def _labelled(table: re.Match[str]) -> str:
    heads = re.findall(r"<th[^>]*>(.*?)</th>", table[0])

    def row(cells: re.Match[str]) -> str:
        labels = iter(heads)
        return re.sub(r"<td", lambda _: f'<td data-label="{next(labels)}"', cells[0])

    return re.sub(r"<tr>.*?</tr>", row, table[0], flags=re.S).replace(
        "<table", "<table data-stacks", 1
    )


def _rewritten(link: re.Match[str], path: str, here: str) -> str:
    picture, text, target = link.groups()
    if "://" in target or target.startswith(("#", "mailto:")):
        return link[0]
    aim, _, anchor = target.partition("#")
    aim = posixpath.normpath(posixpath.join(posixpath.dirname(path), aim))
    page = _page(aim)
    if page is not None:
        to = posixpath.relpath(page, posixpath.dirname(here))
        return f"{picture}[{text}]({to}{'#' + anchor if anchor else ''})"
    if not (REPO / aim).exists():
        log.warning(f"{path} links to {target}, which is not there")
    return text if "`" in text else f"{text} (`{aim}`)"


def _page(path: str) -> str | None:
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path == "docs/formats":
        return "formats/README.md"
    if re.fullmatch(r"(results|benchmarks)/[\w-]+\.svg", path):
        return path
    if path.startswith("docs/"):
        return re.sub(r"^(formats/[\w-]+)\.toml$", r"\1.md", path.removeprefix("docs/"))
    return None
