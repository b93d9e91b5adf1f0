"""The reading paths of the book, and how long its pages take: the one place where both are written.

The front page lists the paths, and a line at the head of every page says where on them it stands. Both are made from
`PATHS` when the book is built, so that no notebook names them and none is executed again for them. A page that the
table of contents does not list (yet) is left out.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from posixpath import dirname, relpath
from typing import NamedTuple

import nbformat
from directives import apply_directives


class ReadingPath(NamedTuple):
    """Pages to read in this order, for one purpose."""

    name: str
    pages: tuple[str, ...]

    @property
    def anchor(self) -> str:
        return f"path-{self.name.lower().replace(' ', '-')}"


# An evening holds no plumbing and takes about three hours; an implementer has then read all that a DETR is made of.
PATHS = (
    ReadingPath("First evening", (
        "nbs/01_attention", "nbs/08_model", "nbs/09_matcher", "nbs/experiments/01_train_on_shapes",
        "nbs/experiments/06_why_no_nms",
    )),
    ReadingPath("Implementer", (
        "nbs/00_notation", "nbs/01_attention", "nbs/02_positions", "nbs/03_boxes", "nbs/05_data", "nbs/06_backbone",
        "nbs/07_transformer", "nbs/08_model", "nbs/09_matcher", "nbs/10_losses", "nbs/11_evaluation", "nbs/12_training",
        "nbs/16_clinic", "nbs/experiments/10_misreadings",
    )),
    ReadingPath("User", (
        "nbs/18_cli", "nbs/14_pretrained", "nbs/82_checks", "nbs/experiments/02_photographs", "nbs/20_finetuning",
        "nbs/experiments/03_fine_tune", "nbs/19_errors", "nbs/16_clinic", "nbs/21_export",
    )),
)

# What a page off every path says of itself, by the part of the table of contents that it stands in.
ASIDE = "On no reading path: read it when its question is yours."
ASIDES = {
    "Words": "On no reading path: to look things up.",
    "The family": "After DETR itself; not on a first reading.",
    "Space": "After DETR itself; not on a first reading.",
    "The workshop": "Workshop: for a bad day; not on a first reading.",
    "Appendix": "Appendix: to look things up; not on a first reading.",
}


# --- how long a page takes --------------------------------------------------------------------------------------------
# Adults read 238 words of English non-fiction a minute, most of them between 175 and 300, and those with another mother
# tongue fewer (Brysbaert 2019, a review of 190 studies, doi.org/10.1016/j.jml.2019.104047). The text is technical, so:
WORDS_A_MINUTE = 200
# Who reviews code reads 125 to 500 lines an hour (Humphrey 1989, as Code Complete cites it), looking for faults. These
# lines are short, and explained and run beside them. Our assumption: four seconds a line, what it prints included.
LINES_A_MINUTE = 15
# Our assumption for a formula that stands by itself. Those within a line count as words.
FORMULAS_A_MINUTE = 2

UNSEEN = {"remove-cell", "remove-input", "hide-input"}  # tags of cells whose code does not show, or is folded away
FENCE = re.compile(r"^(`{3,}|:{3,})(.*?)\n(.*?)^\1", re.M | re.S)
FORMULA = re.compile(r"\$\$.+?\$\$|\\begin{(align|equation)\*?}.+?\\end{\1\*?}", re.S)


class Amount(NamedTuple):
    """What there is to read on a page."""

    words: int
    lines: int
    formulas: int

    @property
    def minutes(self) -> int:
        """The time that it takes, to five minutes, exercises not included."""
        exact = self.words / WORDS_A_MINUTE + self.lines / LINES_A_MINUTE + self.formulas / FORMULAS_A_MINUTE
        return max(5, 5 * round(exact / 5))


def code_lines(text: str) -> int:
    """Lines with something to read: not those of brackets alone."""
    return sum(bool(re.search(r"\w", line)) for line in text.splitlines())


def amount_of_text(text: str) -> Amount:
    """What a Markdown cell holds; code in a fence counts as code, a map of the chapters not at all."""
    fences = FENCE.findall(text)
    lines = sum(code_lines(body) for _, kind, body in fences if not kind.startswith("{"))
    notes = " ".join(body for _, kind, body in fences if kind.startswith("{") and "chapter-map" not in kind)
    rest = FENCE.sub("", text)
    formulas = len(FORMULA.findall(rest))
    rest = re.sub(r"\]\([^)]*\)|<[^>]+>", " ", FORMULA.sub("", rest))  # addresses and tags are not read
    return Amount(len(re.findall(r"\S*\w\S*", f"{rest} {notes}")), lines, formulas)


def amount_of(notebook: nbformat.NotebookNode) -> Amount:
    """What a notebook holds; what is hidden or folded is not counted."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(amount_of_text(cell.source))
        elif cell.cell_type == "code":
            apply_directives(cell)
            if not UNSEEN & set(cell.metadata.get("tags", [])):
                parts.append(Amount(0, code_lines(cell.source), 0))
    return Amount(*map(sum, zip(*parts, strict=True))) if parts else Amount(0, 0, 0)


def read_amount(path: Path) -> Amount:
    """What the notebook at this path holds."""
    return amount_of(nbformat.reads(path.read_text("utf8"), as_version=4))


def in_words(minutes: int) -> str:
    """A time as one says it: exact in minutes below five hours, in hours above."""
    hours, rest = divmod(minutes, 60)
    if hours >= 5:
        return f"{round(minutes / 60)} hours"
    parts = ([f"{hours} hour{'s' * (hours > 1)}"] if hours else []) + ([f"{rest} minutes"] if rest or not hours else [])
    return " ".join(parts)


# --- where a page stands ----------------------------------------------------------------------------------------------
class Stop(NamedTuple):
    """A page's place on a path: the how-manieth of how many, and the page after it, if there is one."""

    path: ReadingPath
    number: int
    count: int
    next: str | None


def listed_pages(path: ReadingPath, titles: Mapping[str, str]) -> list[str]:
    """The pages of a path that the book has."""
    return [page for page in path.pages if page in titles]


def stops_of(page: str, titles: Mapping[str, str]) -> list[Stop]:
    """Where a page stands on the paths."""
    stops = []
    for path in PATHS:
        pages = listed_pages(path, titles)
        if page in pages:
            index = pages.index(page)
            stops.append(Stop(path, index + 1, len(pages), pages[index + 1] if index + 1 < len(pages) else None))
    return stops


# --- what the front page shows, as Markdown ---------------------------------------------------------------------------
def link(page: str, titles: Mapping[str, str], here: str) -> str:
    return f"[{titles[page]}]({relpath(page, dirname(here) or '.')})"


def path_list(path: ReadingPath, titles: Mapping[str, str], minutes: Mapping[str, int], here: str) -> str:
    """The pages of a path with their minutes, and how long it takes."""
    pages = listed_pages(path, titles)
    lines = [f"{i}. {link(page, titles, here)}, {minutes[page]}\u00a0min" for i, page in enumerate(pages, 1)]
    total = in_words(sum(minutes[page] for page in pages))
    return "\n".join([f"({path.anchor})=", *lines, "", f"Together {total}."])


def page_table(
    rows: Iterable[tuple[str, str]], titles: Mapping[str, str], minutes: Mapping[str, int], here: str
) -> str:
    """The table of pages: what one can do after each, and its minutes."""
    head = ["| page | what you can do after it | minutes |", "|---|---|--:|"]
    return "\n".join(head + [
        f"| {link(page, titles, here)} | {words} | {minutes[page]} |" for page, words in rows if page in titles
    ])
