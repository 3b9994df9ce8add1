"""The site of the documents: it is built, its links lead somewhere, and a browser shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.browser import reported, shown
from tests.support.make_tools import REPO, make, uv

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Built by `make docs`, which warns of nothing: mkdocs is strict about links and anchors."""
    uv()
    folder = tmp_path_factory.mktemp("site")
    make("docs", f"SITE={folder}")
    yield folder


class Page(HTMLParser):
    """What a page links to, what can be linked to in it, and what it loads."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attributes}
        self.anchors |= {has[name] for name in ("id", "name") if name in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        elif tag == "link" and has.get("rel") in ("canonical", "prev", "next"):
            pass
        elif "src" in has or tag == "link":
            self.loads.append(has.get("src") or has["href"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}


def inside(link: str) -> bool:
    return not urlsplit(link).scheme


def test_no_link_is_dead(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for file, page in pages.items():
        for link in filter(inside, page.links + page.loads):
            parts = urlsplit(link)
            aim = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if aim.is_dir():
                aim = aim / "index.html"
            known = pages[aim].anchors if aim in pages else set()
            anchor = unquote(parts.fragment)
            if not aim.is_file() or (anchor and aim in pages and anchor not in known):
                dead.append(f"{file.relative_to(site)}: {link}")
    assert dead == []


def test_every_document_is_a_page_that_one_gets_to(site: Path, pages: dict[Path, Page]) -> None:
    wanted = {
        site / re.sub(r"README\.md$", "index.md", file.relative_to(REPO / "docs").as_posix())
        for file in (REPO / "docs").rglob("*.md")
    }
    assert {file.with_suffix(".html") for file in wanted} <= set(pages)
    sources = {f"{file.stem}.html" for file in (REPO / "docs" / "formats").glob("*.toml")}
    assert sources <= {file.name for file in pages if file.parent.name == "formats"}
    seen, todo = set(), [site / "index.html"]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        aims = (
            (file.parent / urlsplit(link).path).resolve()
            for link in filter(inside, pages[file].links)
        )
        todo += [aim for aim in aims if aim in pages]
    assert seen == set(pages)


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        assert [
            link for link in page.loads if not inside(link) and not link.startswith("data:")
        ] == [], file
    for file in site.rglob("*.css"):
        assert not re.search(
            r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", file.read_text("utf-8")
        ), file


PROBE = """<!doctype html><body><script>
const pages = %s, widths = [400, 1200], found = [];
const frame = document.createElement("iframe");
frame.style.height = "900px"; document.body.append(frame);
const loaded = (page, width) => new Promise(done => {
  frame.onload = () => setTimeout(done, 50); frame.style.width = width + "px"; frame.src = page;
});
(async () => {
  for (const page of pages) for (const width of widths) {
    await loaded(page, width);
    const there = frame.contentDocument, body = there.querySelector(".md-content__inner");
    found.push({page, width, wide: there.documentElement.scrollWidth,
                scrolls: [...there.querySelectorAll("table[data-stacks]")]
                  .filter(one => one.scrollWidth > one.clientWidth + 1).length,
                words: body.innerText.trim().length,
                size: parseFloat(frame.contentWindow.getComputedStyle(body).fontSize)});
  }
  const pre = document.createElement("pre");
  pre.id = "reported"; pre.textContent = JSON.stringify(found); document.body.append(pre);
})();
</script>"""


def test_every_page_is_readable_at_400_and_1200_px(
    site: Path, pages: dict[Path, Page], tmp_path: Path
) -> None:
    names = [file.relative_to(site).as_posix() for file in pages]
    probe = site / "probe.html"
    probe.write_text(PROBE % json.dumps(names))
    try:
        dom, log = shown(probe.as_uri(), tmp_path / "profile", "--window-size=1300,1000")
    finally:
        probe.unlink()
    found = reported(dom)
    assert len(found) == 2 * len(names)
    assert [one for one in found if one["wide"] > one["width"]] == []  # tables scroll, pages do not
    assert [one for one in found if one["scrolls"] and one["width"] == 400] == []
    assert any("data-stacks" in file.read_text("utf-8") for file in pages)
    assert [one for one in found if one["words"] < 40 or one["size"] < 14] == []
    errors = [line for line in log.splitlines() if "CONSOLE" in line and "Uncaught" in line]
    assert errors == []


@pytest.mark.parametrize(
    ("words", "first"),
    [("gap_s", "reference/source-file.html"), ("runaway", ""), ("missing_user_id", ""), ("SESSIONMILL_ID_KEY", "")],
)  # fmt: skip
def test_the_search_finds_a_word(site: Path, tmp_path: Path, words: str, first: str) -> None:
    address = f"{(site / 'index.html').as_uri()}?q={words}"
    dom, _ = shown(address, tmp_path / "profile")
    results = re.findall(r'<a href="([^"]+)" class="md-search-result__link"', dom)
    assert results and any(first in one for one in results), results


def test_the_search_says_when_there_is_nothing(site: Path, tmp_path: Path) -> None:
    dom, _ = shown(f"{(site / 'index.html').as_uri()}?q=zyxwvu", tmp_path / "profile")
    assert "md-search-result__link" not in dom and "No matching documents" in dom
