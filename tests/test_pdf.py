"""The printed book: bookmarks by chapter, formulas and stills in place."""

import re
import subprocess
import sys

import pytest
from browser import CHROMIUM
from built import HTML, ROOT, listed, need
from pypdf import PdfReader

pytestmark = pytest.mark.slow


def heading(name: str) -> str:
    """The title of a page of the built book."""
    text = (HTML / f"{name}.html").read_text("utf8")
    title = re.search(r"<h1>(.*?)<a class=\"headerlink\"", text, re.S)[1]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", title)).strip()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    need(HTML.exists(), "the book is not built: `make book`")
    need(CHROMIUM, "no chromium to print with")
    goal = tmp_path_factory.mktemp("pdf") / "book.pdf"
    done = subprocess.run([sys.executable, "tools/pdf.py", "--to", goal], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return PdfReader(goal)


def test_every_chapter_has_a_bookmark_that_leads_to_its_first_page(book):
    marks = {}

    def note(outline):
        for mark in outline:
            if isinstance(mark, list):
                note(mark)
            else:
                marks.setdefault(mark.title, book.get_destination_page_number(mark))

    note(book.outline)
    titles = [heading(name) for name in listed()]
    assert [title for title in titles if title not in marks] == []
    pages = [marks[title] for title in titles]
    assert pages == sorted(pages) and len(set(pages)) == len(pages)


def test_figures_are_printed_and_formulas_are_not_left_as_text(book):
    text = "\n".join(page.extract_text() for page in book.pages)
    assert re.findall(r"\\\(|\\\[|\\frac|\\mathrm", text) == []
    assert len(book.pages) > 200 and sum(len(page.images) for page in book.pages) > 200
