"""Print the book as one PDF: the pages of the built book in their order, with a bookmark for every chapter and section.

    python tools/pdf.py     after `make book`; writes book/_build/pdf/detr_nb.pdf

Sphinx puts all pages into one, and a headless Chromium prints it. Where the book has an interactive figure, the print
has its still picture: the one that a reader without scripts sees.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pikepdf
from pikepdf import OutlineItem
from playwright.sync_api import Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "book" / "_build"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STYLE = """
@page { size: A4; margin: 17mm 16mm; }
.bd-header, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-footer, .bd-header-article, .prev-next-footer, .headerlink,
  .copybtn, .skip-link, .search-button__wrapper, dialog { display: none !important; }
.bd-main, .bd-content, .bd-article-container, .bd-article { display: block !important; max-width: none !important;
  width: auto !important; padding: 0 !important; margin: 0 !important; }
html { font-size: 9.5pt; }
.chapter { break-before: page; }
h1, h2, h3, h4 { break-after: avoid; }
p, .cell_input, .cell_output, img, svg, figure, tr, .sd-card { break-inside: avoid; }
.cell_output img { max-height: 110mm; width: auto; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; }
pre { line-height: 1.35 !important; padding: 0.4em !important; }
.cell_input pre, .cell_output pre, pre, table { font-size: 7.8pt !important; }
.chapter-map, .output { overflow: visible !important; }
.chapter-map svg { min-width: 0; width: 100%; }
details.hide { display: none; }
"""
CHAPTERS = """document.querySelectorAll('[id^="document-"]').forEach(mark =>
  (mark.tagName === 'SECTION' ? mark : mark.nextElementSibling)?.classList.add('chapter'));
document.querySelectorAll('a[href*="index.html#"]').forEach(link => { link.href = link.href.replace(/^[^#]*/, '') });
document.querySelectorAll('a[href*="_images/"]').forEach(link => link.removeAttribute('href'))"""
# A formula that was not typeset, or that TeX does not know.
FORMULAS = """[...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).map(
  e => e.textContent).concat([...document.querySelectorAll('[data-mjx-error]')].map(e => e.dataset.mjxError))"""
STILLS = """document.querySelectorAll('noscript').forEach(still => {
  const picture = document.createElement('div');
  picture.innerHTML = still.textContent;
  still.replaceWith(picture);
})"""


def one_page() -> Path:
    """All pages as one, with the outputs that the last build of the book left in its cache."""
    places = ["--config", "book/_config.yml", "--toc", "book/_toc.yml", "--path-output", "book"]
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", *places, "--builder", "singlehtml"]
    subprocess.run(command, cwd=ROOT, check=True)
    written = BUILD / "singlehtml" / "book" / "index.html"
    return written.replace(BUILD / "singlehtml" / "book.html")  # Sphinx writes addresses as if it stood there


def without_widgets(route: Route) -> None:
    """Let everything of the book through but what brings widgets to life; nothing comes from elsewhere."""
    address = route.request.url
    (route.continue_ if address.startswith("file:") and "embed-amd" not in address else route.abort)()


def make_ready(page: Page, address: str) -> None:
    """Open the page, wait for its formulas and pictures, and put the stills in the place of interactive figures."""
    page.route("**/*", without_widgets)
    page.goto(address)
    page.evaluate("MathJax.startup.promise")
    if wrong := page.evaluate(FORMULAS):
        raise RuntimeError(f"{len(wrong)} formulas are not typeset, the first: {wrong[0]}")
    page.evaluate(STILLS)
    page.evaluate(CHAPTERS)
    page.add_style_tag(content=STYLE)
    page.evaluate("""Promise.all([...document.images].map(image => { image.loading = 'eager';
      return image.complete || new Promise(done => { image.onload = image.onerror = done }) }))""")


def said_once(title: str) -> str:
    """A title; Chromium writes a heading twice that it moved from the end of one page to the next."""
    half = len(title) // 2
    return title[:half] if title and title[:half] == title[half:] else title


def bookmarks(items: Iterable[OutlineItem]) -> Iterator[OutlineItem]:
    """All bookmarks, in their order."""
    for item in items:
        yield item
        yield from bookmarks(item.children)


def finish(file: Path) -> None:
    """Mend the bookmarks, and pack the many small objects of a tagged PDF together: less than half the size."""
    with pikepdf.open(file, allow_overwriting_input=True) as pdf:
        with pdf.open_outline() as outline:
            for mark in bookmarks(outline.root):
                mark.title = said_once(mark.title)
        pdf.save(file, object_stream_mode=pikepdf.ObjectStreamMode.generate)


def print_page(source: Path, goal: Path) -> None:
    """Print one page as a PDF with bookmarks and page numbers."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    footer = '<div style="font-size: 8pt; width: 100%; text-align: center"><span class="pageNumber"></span></div>'
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(color_scheme="light", reduced_motion="reduce")
        page.set_default_timeout(600_000)
        make_ready(page, source.as_uri())
        page.pdf(path=goal, outline=True, tagged=True, prefer_css_page_size=True, print_background=True,
                 display_header_footer=True, header_template="<span></span>", footer_template=footer)
        browser.close()
    finish(goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=BUILD / "pdf" / "detr_nb.pdf", help="the file to write")
    goal = parser.parse_args().to
    if not CHROMIUM:
        sys.exit("no chromium to print with; on Debian: apt-get install chromium")
    print_page(one_page(), goal)
    print(f"{goal}: {goal.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
