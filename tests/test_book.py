"""The built book: every page is there, needs no network, and describes its pictures."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from built import HTML, ROOT, listed, need

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from chapter_map import chapter_of  # noqa: E402

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page loads, and the pictures of its article with their descriptions."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded, self.pictures, self.depth = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.loaded.append(attrs.get("src") or "")
        if tag == "link" and attrs.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loaded.append(attrs.get("href") or "")
        self.depth += tag == "article"
        if tag == "img" and self.depth:
            self.pictures.append((attrs.get("src") or "", attrs.get("alt") or ""))

    def handle_endtag(self, tag):
        self.depth -= tag == "article"


@pytest.fixture(params=listed(), scope="module")
def page(request) -> Path:
    need(HTML.exists(), "the book is not built: `make book`")
    return HTML / f"{request.param}.html"


def test_a_page_loads_nothing_from_elsewhere(page):
    loaded = Page(page.read_text("utf8")).loaded
    assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == []
    for address in loaded:
        if address and not address.startswith("data:"):
            assert (page.parent / address.split("?")[0]).exists(), f"{address} is not in the book"


def test_every_picture_says_what_it_shows(page):
    silent = [source for source, alt in Page(page.read_text("utf8")).pictures if not alt or alt == source]
    assert not silent, "give each a text: detr_nb.plots does, and `#| fig-alt: ...` does"


CHAPTERS = [chapter for name in listed() if (chapter := chapter_of(name))]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.module)
def test_a_chapter_leads_to_the_reference(chapter):
    need(HTML.exists(), "the book is not built: `make book`")
    place = f"{'../' * chapter.page.count('/')}book/reference.html#module-detr_nb.{chapter.module}"
    assert f'href="{place}"' in (HTML / f"{chapter.page}.html").read_text("utf8")


def test_the_front_door_leads_to_the_front_page():
    need(HTML.exists(), "the book is not built: `make book`")
    assert f"url={listed()[0]}.html" in (HTML / "index.html").read_text("utf8")


@pytest.mark.parametrize("name", [name for name in listed() if name.startswith("nbs/")])
def test_a_page_says_once_where_on_the_reading_paths_it_stands(name):
    need(HTML.exists(), "the book is not built: `make book`")
    text = (HTML / f"{name}.html").read_text("utf8").partition("<article")[2]
    (line,) = re.findall(r'<nav class="reading-line" aria-label="Reading paths">(.*?)</nav>', text)
    assert text.index("<h1>") < text.index(line) < text.index("<h2>")
    for place, part in re.findall(r'href="([^"#]+)#([^"]+)"', line):
        assert f'id="{part}"' in (HTML / f"{name}.html").parent.joinpath(place).read_text("utf8")


def test_the_front_page_lists_the_paths_with_their_minutes():
    need(HTML.exists(), "the book is not built: `make book`")
    text = (HTML / f"{listed()[0]}.html").read_text("utf8")
    assert len(re.findall(r'id="path-[a-z-]+"', text)) == 3 and "TIME" not in text
    assert text.count("\u00a0min") >= 20
