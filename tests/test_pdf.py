"""The printed book: bookmarks by chapter, figures in place, links that stay inside."""

import re
import subprocess
import sys
from collections.abc import Iterable
from html import unescape

import pikepdf
import pytest
from browser import CHROMIUM
from built import HTML, ROOT, listed, need

pytestmark = pytest.mark.slow


def heading(name: str) -> str:
    """The title of a page of the built book."""
    text = (HTML / f"{name}.html").read_text("utf8").partition("<article")[2]
    title = re.search(r"<h1>(.*?)<a class=\"headerlink\"", text, re.S)[1]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", title))).strip()


def bookmarks(items: Iterable[pikepdf.OutlineItem]) -> Iterable[pikepdf.OutlineItem]:
    """All bookmarks, in their order."""
    for item in items:
        yield item
        yield from bookmarks(item.children)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    need(HTML.exists(), "the book is not built: `make book`")
    need(CHROMIUM, "no chromium to print with")
    goal = tmp_path_factory.mktemp("pdf") / "book.pdf"
    done = subprocess.run([sys.executable, "tools/pdf.py", "--to", goal], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with pikepdf.open(goal) as pdf:
        yield pdf


def test_every_chapter_has_a_bookmark_and_a_page_to_begin_on(book):
    titles, first = [heading(name) for name in listed()], {}
    with book.open_outline() as outline:
        for mark in bookmarks(outline.root):
            place = mark.destination if mark.destination is not None else mark.action.D
            first.setdefault(str(mark.title).strip(), pikepdf.Page(place[0]).index)
    assert [title for title in titles if title not in first] == []
    pages = [first[title] for title in titles]
    assert pages == sorted(set(pages))


def test_it_holds_the_pictures_and_leads_nowhere_on_this_machine(book):
    assert sum(len(page.images) for page in book.pages) > 150
    links = [link.A.URI for page in book.pages for link in page.get("/Annots", []) if "/URI" in link.get("/A", {})]
    assert links and [str(link) for link in links if not str(link).startswith("https://")] == []
