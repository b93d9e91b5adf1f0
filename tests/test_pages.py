"""Every page of the built book in a real browser: wide and on a phone, light and dark, by rules of accessibility."""

import json
import re
import sys
from importlib.resources import files
from importlib.util import find_spec

import pytest
from built import HTML, ROOT, listed, need

sys.path.insert(0, str(ROOT / "tools"))
from pdf import STYLE  # noqa: E402

PICTURES = HTML.parent / "screenshots"
SIZES = {"wide": (1200, 900), "phone": (390, 844)}
# The theme says the first on a first visit; every browser asks for the second.
KNOWN = ("Got invalid theme mode: . Resetting to auto.", "favicon.ico")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=listed())
def page(browser, request):
    """One page, opened once for all tests that look at it."""
    page = browser.page((HTML / f"{request.param}.html").as_uri())
    page.name = request.param
    page.wait("!document.querySelector('.math') || !window.MathJax || !!document.querySelector('mjx-container')")
    page.rest(0.4)
    yield page
    page.close()


def show(page, size: str, dark: bool) -> None:
    """The same page at another size and in another light."""
    width, height = SIZES[size]
    page.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.ask("Emulation.setEmulatedMedia", features=[scheme])
    page.wait(f"document.documentElement.dataset.theme === '{scheme['value']}'")
    page.rest(0.15)


# A formula that TeX does not know, an unknown command (red letters), or a page of formulas that were not typeset.
FORMULAS = """[...document.querySelectorAll('[data-mjx-error], g[data-mml-node="mtext"][fill="red"]')].map(e =>
  e.dataset.mjxError || e.textContent).concat(
    document.querySelector('.math') && !document.querySelector('mjx-container') ? ['not typeset'] : [])"""
BROKEN = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
TOO_WIDE = """(() => {
  if (document.documentElement.scrollWidth <= innerWidth + 1) return [];
  const held = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX)) return true; return false };
  const wide = [...document.querySelectorAll('article *')].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 && !held(e));
  return [document.documentElement.scrollWidth, ...wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120))] })()"""
HEADINGS = "[...document.querySelectorAll('article :is(h1, h2, h3, h4, h5)')].map(h => [+h.tagName[1], h.textContent])"
# Contrast is a matter of the theme and takes long to compute, so it is looked at on pages that have everything.
CONTRAST = ("book/index", "nbs/03_boxes", "nbs/13_insight", "nbs/91_explorables")
# What Sphinx makes of docstrings and of citations breaks these rules, and is not ours to mend.
GENERATED = {"book/reference": "definition-list", "book/bibliography": "aria-required-children"}
# What the theme itself does is its authors' business; the article is ours.
AXE = """axe.run({ include: ['article'] }, { runOnly: ['wcag2a', 'wcag2aa'], resultTypes: ['violations'],
  rules: RULES }).then(found => found.violations.filter(one => ['serious', 'critical'].includes(one.impact)).map(
    one => [one.id, one.nodes.length, one.nodes.slice(0, 3).map(node => node.html.slice(0, 200))]))"""


def test_a_page_is_sound_wide_and_on_a_phone_light_and_dark(page):
    PICTURES.mkdir(exist_ok=True)
    found = {}
    for size, dark in (("wide", False), ("wide", True), ("phone", True), ("phone", False)):
        show(page, size, dark)
        if wide := page.evaluate(TOO_WIDE):
            found[f"too wide, {size}"] = wide
        page.picture(PICTURES / f"{page.name.replace('/', '_')}_{size}_{'dark' if dark else 'light'}.png")
    found["broken pictures"] = page.evaluate(BROKEN)
    found["formulas"] = page.evaluate(FORMULAS)
    found["errors"] = [error for error in page.errors if not any(known in error for known in KNOWN)]
    found["foreign"] = [url for url in page.fetched if not url.startswith((HTML.as_uri(), "data:", "blob:"))]
    assert {what: value for what, value in found.items() if value} == {}


def test_headings_are_in_order(page):
    levels = page.evaluate(HEADINGS)
    assert [level for level, _ in levels].count(1) == 1 and levels[0][0] == 1
    skipped = [second for (one, _), (two, second) in zip(levels, levels[1:], strict=False) if two > one + 1]
    assert skipped == []


# Code that is folded is unfolded to be measured. Widths are rounded, so a pixel is none.
CUT = """(() => {
  const folded = [...document.querySelectorAll('article details:not([open])')];
  folded.forEach(one => { one.open = true });
  const cut = [...document.querySelectorAll('article pre')].filter(e => e.scrollWidth > e.clientWidth + 1).map(
    e => [e.scrollWidth - e.clientWidth, e.textContent.slice(0, 60)]);
  folded.forEach(one => { one.open = false });
  return cut })()"""
PRINTED = f"""(() => {{ const style = document.createElement('style');
  style.id = 'printed'; style.textContent = {json.dumps(STYLE)}; document.head.append(style) }})()"""


def test_code_and_what_it_prints_fit_a_window_of_1400_pixels(page):
    page.ask("Emulation.setEmulatedMedia", media="screen")
    page.ask("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)
    page.rest(0.1)
    assert page.evaluate(CUT) == []


def test_a_printed_page_cuts_no_code(page):
    """Neither when a reader prints the page, nor in the printed book."""
    width = round((210 - 2 * 16) / 25.4 * 96)  # A4 without its margins
    page.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.ask("Emulation.setEmulatedMedia", media="print")
    page.rest(0.1)
    cut = page.evaluate(CUT)
    page.evaluate(PRINTED)
    cut += page.evaluate(CUT)
    page.evaluate("document.getElementById('printed').remove()")
    page.ask("Emulation.setEmulatedMedia", media="")
    assert cut == []


REACHABLE = "[...document.querySelectorAll('pre')].every(e => e.tabIndex === 0 || e.scrollWidth <= e.clientWidth)"


def test_a_page_has_no_serious_violation_of_accessibility(page):
    need(find_spec("axe_playwright_python"), "no axe to judge the page with: pip install axe-playwright-python")
    axe = files("axe_playwright_python") / "axe.min.js"
    page.evaluate(axe.read_text("utf8") + "; 0")
    colours = page.name in CONTRAST
    asked = AXE.replace("RULES", "{}" if colours else "{ 'color-contrast': { enabled: false } }")
    violations = {}

    def judged() -> list:
        return [one for one in page.evaluate(asked) if one[0] != GENERATED.get(page.name)]

    for dark in (False, True) if colours else (False,):  # no other rule looks at colours
        show(page, "wide", dark)
        page.wait(REACHABLE)  # the theme looks again at what scrolls, a moment after the window has changed
        found = judged()
        if found:
            page.rest(1)  # on a busy machine that moment may fall between the look and the judgement
            found = judged()
        if found:
            violations["dark" if dark else "light"] = found
    assert violations == {}


def test_the_search_finds_a_term(browser):
    page = browser.page((HTML / "search.html").as_uri() + "?q=assignment")
    page.wait("[...document.querySelectorAll('#search-results li a')].some(a => a.href.includes('09_matcher'))")
    page.close()


@pytest.mark.parametrize("name", listed())
def test_links_lead_somewhere(name):
    need(HTML.exists(), "the book is not built: `make book`")
    file = HTML / f"{name}.html"
    text, lost = file.read_text("utf8"), []
    for address in re.findall(r'<a [^>]*href="([^"]+)"', text[text.index("<article"):text.rindex("</article>")]):
        place, _, part = address.partition("#")
        if re.match(r"[a-z]+:", address):
            continue
        goal = (file.parent / place).resolve() if place else file
        if not goal.exists() or (part and goal.suffix == ".html" and f'id="{part}"' not in goal.read_text("utf8")):
            lost.append(address)
    assert lost == []
