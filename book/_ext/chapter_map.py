"""The map of the chapters: which box stands where, and the drawing as SVG.

The chapters along the pipeline have a place in `PLACES`. Every other numbered chapter of the table of contents appears
by itself, in a row below that bears the caption of its part. Of the appendices only those with a place are shown.
"""

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

from sphinx_external_toc.api import SiteMap


class Chapter(NamedTuple):
    """A numbered page: `nbs/09_matcher` exports `matcher`, `nbs/family/34_dab` exports `family.dab`."""

    page: str
    number: str
    module: str

    @property
    def noun(self) -> str:
        return self.module.rpartition(".")[2]


class Place(NamedTuple):
    """What a chapter answers, and where its box stands."""

    answers: str
    column: int
    row: int


class Box(NamedTuple):
    """A box of the map: its chapter, the corner and the height."""

    chapter: Chapter
    x: int
    y: int
    height: int


# The middle row follows an image from data to training; above it stand the tools, below it the uses of a trained model.
PLACES = {
    "shapes": Place("drawn scenes", 0, 0), "data": Place("images, targets", 0, 1),
    "positions": Place("where a cell is", 1, 0), "backbone": Place("CNN features", 1, 1),
    "attention": Place("who looks where", 2, 0), "transformer": Place("encoder, decoder", 2, 1),
    "notation": Place("words of all", 3, 0), "model": Place("queries, heads", 3, 1),
    "boxes": Place("formats, overlap", 4, 0), "matcher": Place("who finds what", 4, 1),
    "plots": Place("pictures of all", 5, 0), "losses": Place("how wrong", 5, 1),
    "evaluation": Place("how good", 6, 0), "training": Place("learn from it", 6, 1),
    "insight": Place("look inside", 2, 2), "pretrained": Place("weights in, out", 3, 2),
    "cli": Place("from a terminal", 4, 2), "bench": Place("time, memory", 5, 2),
    "clinic": Place("what is wrong", 6, 2),
}
ARROWS = (
    ("shapes", "data"), ("data", "backbone"), ("backbone", "transformer"), ("transformer", "model"),
    ("model", "matcher"), ("matcher", "losses"), ("losses", "training"), ("training", "evaluation"),
    ("positions", "attention"), ("attention", "transformer"), ("boxes", "matcher"),
    ("transformer", "insight"), ("model", "pretrained"), ("pretrained", "cli"), ("training", "clinic"),
)
COLUMNS, MARGIN = 7, 8
WIDTH, HEIGHT, SLIM = 100, 42, 26  # of a box with a place; a box of a row below has one line and is SLIM
RIGHT, DOWN, SLIM_DOWN = 114, 64, 34  # from box to box
CAPTION = 22  # the line above the row of a part
FULL_WIDTH = 2 * MARGIN + RIGHT * (COLUMNS - 1) + WIDTH


# --- the table of contents ----------------------------------------------------------------------------------------
def chapter_of(page: str) -> Chapter | None:
    """The chapter that a page is; None for experiments, solutions and pages without a number."""
    match = re.fullmatch(r"nbs/((?:(?!experiments/|solutions/)\w+/)*)(\d\d)_(\w+)", page)
    return Chapter(page, match[2], match[1].replace("/", ".") + match[3]) if match else None


def pages_below(site_map: SiteMap, page: str) -> Iterator[str]:
    """The pages that the table of contents lists below a page, in its order."""
    for tree in site_map[page].subtrees:
        for file in tree.files():
            yield file
            yield from pages_below(site_map, file)


def pages_by_part(site_map: SiteMap) -> list[tuple[str, list[str]]]:
    """The parts of the table of contents: the caption without its number, and the pages."""
    return [
        (
            re.sub(r"^Part \w+\. ", "", tree.caption or ""),
            [page for file in tree.files() for page in (file, *pages_below(site_map, file))],
        )
        for tree in site_map.root.subtrees
    ]


def parts_of(site_map: SiteMap) -> list[tuple[str, list[Chapter]]]:
    """The parts of the table of contents: the caption without its number, and the chapters."""
    return [
        (caption, [chapter for page in pages if (chapter := chapter_of(page))])
        for caption, pages in pages_by_part(site_map)
    ]


# --- where the boxes stand ----------------------------------------------------------------------------------------
def placed_boxes(chapters: list[Chapter]) -> list[Box]:
    """The boxes of the chapters that have a place; a row without a chapter takes no room."""
    placed = [(chapter, PLACES[chapter.module]) for chapter in chapters if chapter.module in PLACES]
    rows = sorted({place.row for _, place in placed})
    return [
        Box(chapter, MARGIN + RIGHT * place.column, MARGIN + DOWN * rows.index(place.row), HEIGHT)
        for chapter, place in placed
    ]


def row_boxes(chapters: list[Chapter], top: int) -> list[Box]:
    """The boxes of the chapters of one part, in as many lines as they need, all about as long."""
    lines = -(-len(chapters) // COLUMNS)
    length = -(-len(chapters) // max(lines, 1))
    return [
        Box(chapter, MARGIN + RIGHT * (i % length), top + SLIM_DOWN * (i // length), SLIM)
        for i, chapter in enumerate(chapters)
    ]


def lay_out(parts: list[tuple[str, list[Chapter]]]) -> tuple[list[Box], list[tuple[str, int]], int]:
    """The boxes, the captions with the height that they stand at, and the height of the map."""
    boxes, captions = placed_boxes([chapter for _, chapters in parts for chapter in chapters]), []
    bottom = max((box.y + box.height for box in boxes), default=0)
    for caption, chapters in parts:
        rest = [chapter for chapter in chapters if chapter.module not in PLACES and chapter.number < "90"]
        if rest:
            captions.append((caption, bottom + CAPTION - 6))
            boxes += row_boxes(rest, bottom + CAPTION)
            bottom = boxes[-1].y + SLIM
    return boxes, captions, bottom + MARGIN


# --- the drawing --------------------------------------------------------------------------------------------------
def svg_text(x: float, y: int, words: str, size: int, **more: str) -> str:
    """One line of text, `x` being its middle."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y}" font-size="{size}"{extra}>{escape(words)}</text>'


def svg_box(box: Box, lit: bool, link: str) -> str:
    """One box, which leads to its chapter: number and noun, and what it answers if it has a place."""
    name, middle = f"{box.chapter.number} {box.chapter.noun.replace('_', ' ')}", box.x + WIDTH / 2
    lines = svg_text(middle, box.y + 18, name, 11 if len(name) < 14 else 10, font_weight="bold")
    if box.chapter.module in PLACES:
        lines += svg_text(middle, box.y + 33, PLACES[box.chapter.module].answers, 10)
    here = ' class="here" aria-current="location"' if lit else ""
    size = f'width="{WIDTH}" height="{box.height}"'
    return f'<a href="{escape(link)}"{here}><rect x="{box.x}" y="{box.y}" {size} rx="6"/>{lines}</a>'


def svg_arrow(start: Box, end: Box) -> str:
    """An arrow across the gap between two boxes that stand side by side or one above the other."""
    if start.y == end.y:
        return f'<path d="M{start.x + WIDTH} {start.y + HEIGHT / 2:g}h{RIGHT - WIDTH - 2}m-4-3l4 3l-4 3"/>'
    down = 1 if end.y > start.y else -1
    edge = start.y + (HEIGHT if down > 0 else 0)
    length, back = (DOWN - HEIGHT - 2) * down, -4 * down
    return f'<path d="M{start.x + WIDTH / 2:g} {edge}v{length}m-3 {back}l3 {-back}l3 {back}"/>'


def draw_map(parts: list[tuple[str, list[Chapter]]], text: str, lit: str, links: Mapping[str, str]) -> str:
    """The chapters of the table of contents as SVG; the colours come from css/book.css.

    Args:
        parts: captions and chapters, as `parts_of` reads them.
        text: says what the map shows, for those who hear it.
        lit: the module of the chapter that is lit, or nothing.
        links: the address of each page.
    """
    boxes, captions, height = lay_out(parts)
    placed = {box.chapter.module: box for box in boxes}
    drawn = [svg_arrow(placed[start], placed[end]) for start, end in ARROWS if {start, end} <= placed.keys()]
    drawn += [svg_text(MARGIN, y, caption, 10, text_anchor="start") for caption, y in captions]
    drawn += [svg_box(box, box.chapter.module == lit, links[box.chapter.page]) for box in boxes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {FULL_WIDTH} {height}" width="{FULL_WIDTH}" '
        f'role="group" aria-label="{escape(text)}"><rect class="ground" width="{FULL_WIDTH}" height="{height}" rx="8"/>'
        f'<g font-family="sans-serif" text-anchor="middle">{"".join(drawn)}</g></svg>'
    )
