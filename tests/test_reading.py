"""The reading paths and reading times: what they count, what the front page and the line of a page make of them."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from docutils import nodes
from docutils.utils import new_document
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import detr_nb_book as extension  # noqa: E402
import reading  # noqa: E402
from chapter_map import pages_by_part  # noqa: E402

TOC = parse_toc_yaml(ROOT / "book" / "_toc.yml")
TITLES = extension.page_titles(TOC)
FRONT = (ROOT / "book" / "index.md").read_text("utf8")
READ = [page for page in TITLES if "/solutions/" not in page]


# --- the paths ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", reading.PATHS, ids=lambda path: path.name)
def test_a_path_leads_over_pages_of_the_book_each_of_them_once(path):
    assert [page for page in path.pages if page not in TITLES] == []
    assert len(set(path.pages)) == len(path.pages)


def test_a_first_evening_is_an_evening_without_the_workshop():
    evening = reading.PATHS[0]
    assert evening.name == "First evening" and not any("nbs/8" in page for page in evening.pages)
    assert 120 <= sum(map(extension.page_minutes, evening.pages)) <= 200


def test_an_implementer_reads_a_chapter_before_those_that_build_on_it():
    (path,) = [path for path in reading.PATHS if path.name == "Implementer"]
    chapters = [page for page in path.pages if "experiments" not in page]
    assert chapters == sorted(chapters)


def test_every_part_of_the_book_with_pages_off_the_paths_has_words_for_them():
    known = {*reading.ASIDES, "The pieces", "DETR at work", "Solutions"}
    assert {caption for caption, _ in pages_by_part(TOC)} <= known


# --- how long a page takes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("# Boxes\n\n> Four numbers make a box.", (6, 0, 0)),
        ("See [chapter 3](03_boxes.ipynb) -- it is <b>short</b>.", (6, 0, 0)),
        ("so $$a = b$$ and $c$\n\n\\begin{align}a &= b\\end{align}", (3, 0, 2)),
        ("```{chapter-map}\nWhere we are: here.\n```\n\nNow", (1, 0, 0)),
        ("Run\n```bash\nmake book\n\n)\n```", (1, 1, 0)),
        (":::{note}\nNot so fast.\n:::", (3, 0, 0)),
    ],
)
def test_words_lines_and_formulas_are_counted_and_addresses_are_not(text, amount):
    assert reading.amount_of_text(text) == amount


def notebook(*cells) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])


@pytest.mark.parametrize("head", ["#| hide", "#| echo: false", "#| code-fold: true", "#| default_exp boxes"])
def test_code_that_does_not_show_takes_no_time(head):
    assert reading.amount_of(notebook("a = [\n    1,\n]\n", f"{head}\nb = 1")) == (0, 2, 0)


@pytest.mark.parametrize(
    ("amount", "minutes"), [((0, 0, 0), 5), ((2000, 0, 0), 10), ((2000, 150, 0), 20), ((2000, 150, 10), 25)]
)
def test_minutes_follow_from_the_three_speeds(amount, minutes):
    assert reading.Amount(*amount).minutes == minutes


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(5, "5 minutes"), (60, "1 hour"), (155, "2 hours 35 minutes"), (299, "4 hours 59 minutes"), (1234, "21 hours")],
)
def test_a_time_is_said_as_one_says_it(minutes, words):
    assert reading.in_words(minutes) == words


@pytest.mark.parametrize("page", READ)
def test_no_notebook_says_its_own_time(page):
    cells = nbformat.read(ROOT / f"{page}.ipynb", 4).cells
    said = [cell.source for cell in cells if re.search(r"\b[Tt]ime:\*", cell.source)]
    assert said == [], "the book counts it, and says it below the title"


# --- the front page -----------------------------------------------------------------------------------------------
def test_the_front_page_shows_every_path_and_every_page_in_the_order_of_the_book():
    assert re.findall(r"^```{reading-path} (.+)$", FRONT, re.M) == [path.name for path in reading.PATHS]
    tables = re.findall(r"^```{page-table}\n(.*?)^```$", FRONT, re.M | re.S)
    rows = [line.partition(":")[0] for table in tables for line in table.splitlines()]
    assert len(tables) == 6 and rows == sorted(READ, key=rows.index)
    order = {page: index for index, page in enumerate(READ)}
    for table in tables:
        places = [order[line.partition(":")[0]] for line in table.splitlines()]
        assert places == sorted(places)


def test_a_path_is_a_list_of_links_with_minutes_and_their_sum():
    path = reading.ReadingPath("Short cut", ("nbs/a", "nbs/experiments/b", "nbs/to_come"))
    titles, minutes = {"nbs/a": "1 A", "nbs/experiments/b": "B"}, {"nbs/a": 40, "nbs/experiments/b": 25}
    assert reading.path_list(path, titles, minutes, "book/index").replace("\u00a0", " ") == (
        "(path-short-cut)=\n1. [1 A](../nbs/a), 40 min\n2. [B](../nbs/experiments/b), 25 min\n\n"
        "Together 1 hour 5 minutes."
    )


def test_a_table_leaves_out_what_the_book_does_not_have():
    rows = [("nbs/a", "see"), ("nbs/to_come", "hear")]
    table = reading.page_table(rows, {"nbs/a": "1 A"}, {"nbs/a": 40}, "book/index")
    assert table.splitlines()[2:] == ["| [1 A](../nbs/a) | see | 40 |"]


# --- the line of a page -------------------------------------------------------------------------------------------
def link(page, path=None) -> str:
    return path.name if path else f"[{page}]"


def test_the_line_says_the_place_on_each_path_and_what_comes_next(monkeypatch):
    pages = ("nbs/01_attention", "nbs/09_matcher", "nbs/10_losses")
    monkeypatch.setattr(reading, "PATHS", (
        reading.ReadingPath("One", pages), reading.ReadingPath("Two", (*pages[:2], "nbs/79_to_come")),
    ))
    first, *stops = extension.line_of("nbs/09_matcher", TOC, link)
    assert re.fullmatch(r"About \d+ minutes\.", first)
    assert stops == ["On the path One: 2 of 3, next [nbs/10_losses].", "On the path Two: 2 of 2, the last page."]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("nbs/80_config", "Workshop: for a bad day; not on a first reading."),
        ("nbs/90_plots", "Appendix: to look things up; not on a first reading."), ("nbs/17_bench", reading.ASIDE),
    ],
)
def test_a_page_off_the_paths_says_what_it_is(page, words):
    assert extension.line_of(page, TOC, link)[1:] == [words]


def test_solutions_lead_to_their_chapter():
    said = extension.line_of("nbs/solutions/09_matcher", TOC, link)
    assert said == ["Solutions of [nbs/09_matcher]: try the exercises first."]


@pytest.mark.parametrize("promise", [True, False])
def test_the_line_stands_below_the_title_and_the_promise(promise):
    page = new_document("nbs/03_boxes")
    head = [nodes.title(text="Boxes"), *([nodes.block_quote()] if promise else [])]
    page += nodes.section("", *head, nodes.paragraph(text="Now."), nodes.block_quote())
    env = SimpleNamespace(docname="nbs/03_boxes", external_site_map=TOC)
    extension.add_line(SimpleNamespace(env=env), page)
    kinds = [type(child) for child in page[0]]
    assert kinds.index(extension.reading_line) == 1 + promise and kinds.count(extension.reading_line) == 1


def test_other_pages_have_no_line():
    page = new_document("book/glossary")
    page += nodes.section("", nodes.title(text="Glossary"))
    env = SimpleNamespace(docname="book/glossary", external_site_map=TOC)
    extension.add_line(SimpleNamespace(env=env), page)
    assert not list(page.findall(extension.reading_line))


# --- addresses that moved -----------------------------------------------------------------------------------------
def build_ends(folder: Path, pages: set[str]) -> None:
    env = SimpleNamespace(found_docs=pages, titles={"nbs/93_optimizer": nodes.title(text="Optimizer")})
    builder = SimpleNamespace(name="html")
    extension.forward(SimpleNamespace(builder=builder, env=env, outdir=folder), None)


def test_an_old_address_leads_to_the_page_of_today(tmp_path):
    build_ends(tmp_path, {"nbs/93_optimizer"})
    text = (tmp_path / "nbs" / "93_muon.html").read_text("utf8")
    assert 'http-equiv="refresh" content="0; url=93_optimizer.html"' in text
    assert '<a href="93_optimizer.html">Optimizer</a>' in text


@pytest.mark.parametrize("pages", [{"nbs/93_muon"}, {"nbs/93_muon", "nbs/93_optimizer"}])
def test_a_page_that_is_there_is_not_written_over(tmp_path, pages):
    build_ends(tmp_path, pages)
    assert list(tmp_path.iterdir()) == []


def test_old_addresses_are_no_pages_and_lead_to_some():
    for old, new in extension.MOVED.items():
        assert old not in TITLES and new in TITLES
