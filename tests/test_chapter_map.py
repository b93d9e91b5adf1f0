"""The map of the chapters: drawn from the table of contents, every box a link, the current chapter lit."""

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import chapter_map  # noqa: E402

TOC = ROOT / "book" / "_toc.yml"
PARTS = chapter_map.parts_of(parse_toc_yaml(TOC))
CHAPTERS = [chapter for _, part in PARTS for chapter in part]
SVG = "{http://www.w3.org/2000/svg}"
PLANNED = {
    "Part II. DETR at work": "19_errors 20_finetuning 21_export 22_failures 23_live",
    "Part III. The family": "30_references 31_focal 32_conditional 33_anchor 34_dab 35_smca 36_pyramid 37_deformable "
                            "38_two_stage 39_denoising 40_one_to_many 41_sam 42_dino 44_distributions",
    "Part IV. Space": "50_cameras 51_detr3d 52_petr",
    "Part V. The workshop": "81_hub 82_checks 83_cache 84_loading 85_formats 86_runs 87_steps 88_checkpoints "
                            "89_terminal",
}
FOLDERS = {"Part III. The family": "family/", "Part IV. Space": "space/"}


def draw(parts, lit: str = "") -> ElementTree.Element:
    """The map, with the page itself as its address."""
    links = {chapter.page: f"{chapter.page}.html" for _, part in parts for chapter in part}
    return ElementTree.fromstring(chapter_map.draw_map(parts, "Where we are: here & now.", lit, links))


def addresses(tree: ElementTree.Element) -> list[str]:
    return [link.get("href") for link in tree.iter(f"{SVG}a")]


def write_toc(path: Path, more: dict[str, list[str]]) -> Path:
    """The table of contents of the book with more parts before the workshop."""
    toc = yaml.safe_load(TOC.read_text("utf8"))
    for part in toc["parts"]:  # one that has begun goes on
        known = {chapter["file"] for chapter in part["chapters"]}
        part["chapters"] += [{"file": file} for file in more.pop(part["caption"], []) if file not in known]
    parts = [{"caption": caption, "chapters": [{"file": file} for file in files]} for caption, files in more.items()]
    place = next(i for i, part in enumerate(toc["parts"]) if "workshop" in part["caption"])
    toc["parts"][place:place] = parts
    path.write_text(yaml.safe_dump(toc, sort_keys=False))
    return path


@pytest.fixture
def later(tmp_path):
    """The parts of the book with those chapters that are to come."""
    more = {caption: [f"nbs/{FOLDERS.get(caption, '')}{name}" for name in names.split()]
            for caption, names in PLANNED.items()}
    toc = write_toc(tmp_path / "_toc.yml", more)
    text = toc.read_text().replace("- file: nbs/17_bench", "- file: nbs/15_segmentation\n  - file: nbs/17_bench")
    toc.write_text(text)
    return chapter_map.parts_of(parse_toc_yaml(toc))


@pytest.mark.parametrize(
    ("page", "number", "module"),
    [("nbs/09_matcher", "09", "matcher"), ("nbs/family/34_dab", "34", "family.dab"), ("nbs/40_a_b", "40", "a_b")],
)
def test_a_chapter_is_a_page_with_a_number(page, number, module):
    assert chapter_map.chapter_of(page) == (page, number, module)


@pytest.mark.parametrize(
    "page", ["book/index", "nbs/experiments/01_train", "nbs/solutions/09_matcher", "nbs/solutions/space/52_petr"]
)
def test_experiments_solutions_and_other_pages_are_no_chapters(page):
    assert chapter_map.chapter_of(page) is None


def test_every_chapter_is_on_the_map_and_every_box_leads_to_its_page():
    found = addresses(draw(PARTS))
    assert sorted(found) == sorted(f"{one.page}.html" for one in CHAPTERS if one.number < "90" or one.module == "plots")


@pytest.mark.parametrize("module", chapter_map.PLACES)
def test_a_place_belongs_to_a_chapter_which_can_be_lit(module):
    tree = draw(PARTS, module)
    (lit,) = [link for link in tree.iter(f"{SVG}a") if link.get("class") == "here"]
    assert lit.get("href").endswith(f"_{module}.html") and lit.get("aria-current") == "location"
    assert (tree.get("role"), tree.get("aria-label")) == ("group", "Where we are: here & now.")


def test_chapters_to_come_appear_by_themselves_in_rows_of_their_parts(later):
    before, tree = draw(PARTS), draw(later, "family.dab")
    new = {f"{chapter.page}.html" for _, part in later for chapter in part} - {f"{one.page}.html" for one in CHAPTERS}
    assert set(addresses(tree)) == set(addresses(before)) | new and len(new) >= 8
    captions = [text.text for text in tree.iter(f"{SVG}text") if text.get("text-anchor") == "start"]
    assert captions == ["DETR at work", "The family", "Space", "The workshop"]
    rows = {}
    for link in tree.iter(f"{SVG}a"):
        rows.setdefault(float(link.find(f"{SVG}rect").get("y")), []).append(link.get("href")[4:-5])
    lengths = [len(names) for _, names in sorted(rows.items())]
    assert lengths == [7, 7, 5, 6, 7, 7, 3, 5, 5]
    (lit,) = [link for link in tree.iter(f"{SVG}a") if link.get("class") == "here"]
    assert lit.get("href") == "nbs/family/34_dab.html"


def test_every_box_bears_its_noun_and_can_be_lit(later):
    shown = [chapter for _, part in later for chapter in part if chapter.number < "90" or chapter.module == "plots"]
    for chapter in shown:
        (lit,) = [link for link in draw(later, chapter.module).iter(f"{SVG}a") if link.get("class") == "here"]
        assert lit.find(f"{SVG}text").text == f"{chapter.number} {chapter.noun.replace('_', ' ')}"


def check_boxes(tree: ElementTree.Element) -> None:
    """Boxes stand inside and apart, and hold their words. (DejaVu is wider than the sans-serif fonts of browsers.)"""
    width, height = (float(number) for number in tree.get("viewBox").split()[2:])
    boxes = []
    for link in tree.iter(f"{SVG}a"):
        x, y, w, h = (float(link.find(f"{SVG}rect").get(name)) for name in ("x", "y", "width", "height"))
        assert 0 < x < x + w < width and 0 < y < y + h < height
        boxes.append((x, y, x + w, y + h))
        for text in link.iter(f"{SVG}text"):
            font = FontProperties(family="DejaVu Sans", weight=text.get("font-weight", "normal"))
            words = TextPath((0, 0), text.text, float(text.get("font-size")), prop=font).get_extents()
            assert words.width < w, text.text
    for (x, y, right, down), (x2, y2, right2, down2) in combinations(boxes, 2):
        assert right < x2 or right2 < x or down < y2 or down2 < y


def test_the_boxes_stand_apart_inside_and_hold_their_words(later):
    check_boxes(draw(PARTS))
    check_boxes(draw(later))


def test_the_arrows_join_neighbours():
    for start, end in chapter_map.ARROWS:
        (_, column, row), (_, column_end, row_end) = chapter_map.PLACES[start], chapter_map.PLACES[end]
        assert abs(column - column_end) + abs(row - row_end) == 1, (start, end)
    assert len(list(draw(PARTS).iter(f"{SVG}path"))) == len(chapter_map.ARROWS)


def test_a_book_of_two_chapters_has_a_map_of_two_boxes():
    tree = draw([("The pieces", [chapter_map.chapter_of("nbs/09_matcher"), chapter_map.chapter_of("nbs/10_losses")])])
    assert len(addresses(tree)) == 2 and len(list(tree.iter(f"{SVG}path"))) == 1
    check_boxes(tree)
    assert float(tree.get("viewBox").split()[3]) < 60


# --- in the notebooks ---------------------------------------------------------------------------------------------
FENCE = re.compile(r"```{chapter-map}(?: (?P<lit>[\w.]+))?\nWhere we are: (?P<text>.+)\n```")


def maps_in(page: str) -> list[re.Match]:
    cells = json.loads((ROOT / f"{page}.ipynb").read_text("utf8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert not any("pipeline(" in source for source in sources)
    return [FENCE.fullmatch(source) for source in sources if "{chapter-map}" in source]


@pytest.mark.parametrize("chapter", [one for one in CHAPTERS if one.number <= "90"], ids=lambda one: one.module)
def test_a_chapter_has_the_map_and_says_in_words_where_it_is(chapter):
    (found,) = maps_in(chapter.page)
    noun = chapter.noun.replace("_", " ")
    assert found["lit"] is None and found["text"].startswith(f"chapter {chapter.number}, {noun}, ")


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))])
def test_an_experiment_lights_a_chapter_and_names_it(name):
    (found,) = maps_in(f"nbs/experiments/{name}")
    number = {one.module: one.number for one in CHAPTERS}[found["lit"]]
    assert found["text"].startswith(f"an experiment beside chapter {number}, ")


# --- in a build ---------------------------------------------------------------------------------------------------
def write_page(path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    words = (f"# {title}", "```{chapter-map}\nWhere we are.\n```")
    cells = [*map(nbformat.v4.new_markdown_cell, words), nbformat.v4.new_code_cell(f"print({title!r})")]
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))


def build(folder: Path) -> str:
    """Build the small book; returns what the program said."""
    program = Path(sys.executable).with_name("jupyter-book")
    places = ["--config", "book/_config.yml", "--toc", "book/_toc.yml", "--path-output", "book", "-W", "--keep-going"]
    done = subprocess.run([program, "build", ".", *places], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def write_small_toc(folder: Path, **parts: list[str]) -> None:
    listed = [{"caption": name, "chapters": [{"file": file} for file in files]} for name, files in parts.items()]
    toc = {"format": "jb-book", "root": "book/index", "parts": listed}
    (folder / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))


@pytest.mark.slow
def test_a_new_chapter_is_drawn_on_every_page_and_no_page_is_executed_again(tmp_path):
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("_build", "vendor", "*.md"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "detr_nb").mkdir()
    (tmp_path / "detr_nb" / "__init__.py").write_text("_PUBLIC = {}\n")
    (tmp_path / "book" / "index.md").write_text("# The book\n\n```{chapter-map}\nThe chapters.\n```\n")
    old, new = ["nbs/09_matcher", "nbs/10_losses"], "nbs/family/34_dab"
    for name in (*old, new):
        write_page(tmp_path / f"{name}.ipynb", name)
    pages = [tmp_path / "book" / "_build" / "html" / f"{name}.html" for name in old]

    write_small_toc(tmp_path, pieces=old)
    build(tmp_path)
    assert all("34 dab" not in page.read_text("utf8") for page in pages)

    write_small_toc(tmp_path, pieces=old, family=[new])
    said = build(tmp_path)
    assert re.search(f"{new} done in .*, executed in", said)
    for name, page in zip(old, pages, strict=True):
        assert re.search(f"{name} done in .*, outputs from the cache", said)
        text = page.read_text("utf8")
        assert '<a href="family/34_dab.html"><rect' in text and text.count('aria-current="location"') == 1

    drawing = tmp_path / "book" / "_ext" / "chapter_map.py"
    drawing.write_text(drawing.read_text("utf8").replace("who finds what", "who takes what"))
    paths = tmp_path / "book" / "_ext" / "reading.py"
    paths.write_text(paths.read_text("utf8").replace("Implementer", "Builder"))
    said = build(tmp_path)
    assert "executed in" not in said
    for page, place in zip(pages, ("1 of 2, next", "2 of 2, the last page"), strict=True):
        text = page.read_text("utf8")
        assert "who takes what" in text and f">Builder</a>: {place}" in text
