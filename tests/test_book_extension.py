"""The book's own reader of notebooks: directives, and what a page depends on, so that only what changed runs again."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from docutils import nodes
from docutils.utils import new_document
from sphinx import addnodes

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import detr_nb_book as extension  # noqa: E402
import directives  # noqa: E402


def cell(source: str, **more) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, **more)


def notebook(*sources: str) -> str:
    return nbformat.writes(nbformat.v4.new_notebook(cells=[cell(source) for source in sources]))


# --- directives ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("head", "tags"),
    [
        ("#| export", ["export"]), ("#| hide", ["remove-cell"]), ("#| echo: false", ["remove-input"]),
        ("#| code-fold: true", ["hide-input"]), ("#| export\n#| code-fold: true", ["export", "hide-input"]),
        ("#|eval: false", ["skip-execution"]), ("# | slow", ["skip-execution"]), ("", []),
        ("#| default_exp boxes", ["remove-cell"]),
    ],
)
def test_directives_become_tags_and_leave_the_page(head, tags):
    one = cell(f"{head}\nx = 1  # | no directive here" if head else "x = 1  # | no directive here")
    extension.apply_directives(one)
    assert one.metadata.get("tags", []) == tags and one.source == "x = 1  # | no directive here"


def test_a_figure_has_its_name_its_caption_and_its_text():
    one = cell('#| label: fig-cat\n#| fig-cap: A cat\n#| fig-alt: "an orange cat"\n#| reads: a.json b.json\nshow()')
    assert extension.apply_directives(one) == ["a.json", "b.json"]
    figure = {"name": "fig-cat", "caption": "A cat"}
    assert one.metadata["mystnb"] == {"figure": figure, "image": {"alt": "an orange cat"}}


@pytest.mark.parametrize(
    ("source", "words"), [("#| echo: fasle\nx", "unknown directive"), ("#| label: fig-cat\nx", "needs a '#| fig-cap")]
)
def test_a_slip_of_the_pen_in_a_directive_is_an_error(source, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        extension.apply_directives(cell(source))


def test_a_build_never_rewrites_the_library():
    one = cell("import nbdev; nbdev.nbdev_export()")
    extension.apply_directives(one)
    assert one.source == "" and one.metadata["tags"] == ["remove-cell"]


def test_contributing_lists_every_directive_and_no_other():
    table = (ROOT / "CONTRIBUTING.md").read_text("utf8")
    listed = {re.split(r"[ :]", words)[0] for words in re.findall(r"`#\\\| ([^`]+)`", table)}
    known = {name for name, _ in directives.TAGS} | set(directives.TEXTS)
    assert listed == known - {"exporti", "exports", "include"}  # nbdev's own, which no chapter needs


# --- what a chapter depends on ------------------------------------------------------------------------------------
def forget() -> None:
    extension.module_sources.cache_clear()
    extension.file_hash.cache_clear()
    extension.library_names.cache_clear()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A library: `model` imports `boxes` and carries weights, `family.dab` uses `model`, `plots` and `data` nothing."""
    files = {
        "__init__.py": '_PUBLIC = {"detect": "model", "DAB": "family.dab"}\n', "boxes.py": "SIDE = 1\n",
        "plots.py": "", "data.py": "", "weights/model.pt": "1",
        "model.py": 'from detr_nb.boxes import SIDE\n\nFOLDER = "weights"\n',
        "family/__init__.py": '"""Siblings."""\n', "family/static/dab.js": "0", "family/references.py": "POINT = 0\n",
        "family/dab.py": 'from ..model import SIDE\nfrom .references import POINT\nFILE = "static/dab.js"\n'
                         '__all__ = ["DABDecoder"]\n',
    }
    for name, text in files.items():
        (tmp_path / "detr_nb" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "detr_nb" / name).write_text(text)
    (tmp_path / "record.json").write_text("{}")
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def state(text: str) -> tuple[str, set[str]]:
    """The digest and the files of a notebook as a fresh build finds them."""
    forget()
    prepared, files = extension.prepare(text)
    return prepared.metadata["kernelspec"]["detr_nb"], {path.relative_to(extension.ROOT).as_posix() for path in files}


PAGE = notebook("#| reads: record.json\n%matplotlib inline\nfrom detr_nb import detect")


def test_a_page_depends_on_what_it_imports_however_indirectly(project):
    _, files = state(PAGE)
    assert files == {"detr_nb/model.py", "detr_nb/boxes.py", "detr_nb/weights/model.pt", "record.json"}


MODEL = {"detr_nb/model.py", "detr_nb/boxes.py", "detr_nb/weights/model.pt"}
FAMILY = MODEL | {"detr_nb/family/dab.py", "detr_nb/family/references.py", "detr_nb/family/static/dab.js"}


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("from detr_nb.family.dab import FILE", FAMILY), ("from detr_nb.family import dab", FAMILY),
        ("from detr_nb import DAB", FAMILY), ("import detr_nb.family.dab as dab", FAMILY),
        ("from detr_nb.family.references import POINT", {"detr_nb/family/references.py"}),
        ("import detr_nb.family", FAMILY), ("from detr_nb import family", FAMILY),
        ("import detr_nb", FAMILY | {"detr_nb/plots.py", "detr_nb/data.py"}),
        ("from detr_nb import __version__", set()), ("from torch import nn", set()),
    ],
)
def test_imports_are_followed_into_packages_and_out_of_them(project, line, files):
    assert state(notebook(line))[1] == files


FAMILY_PAGE = notebook("from detr_nb.family.dab import FILE")


@pytest.mark.parametrize("file", sorted(FAMILY))
def test_an_edit_of_what_a_member_of_a_package_uses_runs_its_page_again(project, file):
    before, _ = state(FAMILY_PAGE)
    (project / file).write_text((project / file).read_text() + "\n")
    assert state(FAMILY_PAGE)[0] != before


@pytest.mark.parametrize(
    ("file", "text", "again"),
    [
        ("detr_nb/boxes.py", "SIDE = 2\n", True), ("detr_nb/weights/model.pt", "2", True), ("record.json", "[]", True),
        ("detr_nb/plots.py", "x = 1\n", False), ("detr_nb/data.py", "x = 1\n", False),
    ],
)
def test_an_edit_runs_the_pages_again_that_it_can_change_and_no_others(project, file, text, again):
    before, _ = state(PAGE)
    assert state(PAGE)[0] == before
    (project / file).write_text(text)
    assert (state(PAGE)[0] != before) == again


def test_another_marker_of_a_cell_changes_nothing(project):
    for name, page in (("boxes", PAGE), ("family/references", FAMILY_PAGE)):
        (project / "detr_nb" / f"{name}.py").write_text("# %% ../nbs/03_boxes.ipynb #abc\nSIDE = 1\n")
        before, _ = state(page)
        (project / "detr_nb" / f"{name}.py").write_text("# %% ../nbs/03_boxes.ipynb #def\nSIDE = 1\n")
        assert state(page)[0] == before


def test_another_version_of_a_library_runs_everything_again(project, monkeypatch):
    before, _ = state(PAGE)
    monkeypatch.setattr(extension, "installed", lambda name: "0.0")
    assert state(PAGE)[0] != before


def test_a_file_that_is_not_there_cannot_be_read(project):
    with pytest.raises(ValueError, match="matches no file"):
        state(notebook("#| reads: records/*.json\nx"))


def test_outputs_are_dropped_but_those_of_cells_that_are_not_run(project):
    output = nbformat.v4.new_output("stream", text="kept")
    cells = [cell("x", outputs=[output]), cell("#| gpu\nx", outputs=[output])]
    prepared, _ = extension.prepare(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    assert [len(one.outputs) for one in prepared.cells] == [0, 1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_a_notebook_says_which_files_of_the_tests_it_reads(path):
    text = path.read_text("utf8")
    code = "\n".join(one.source for one in nbformat.reads(text, 4).cells if one.cell_type == "code")
    _, files = extension.prepare(text)
    declared = any(ROOT / "tests" / "data" in file.parents for file in files)
    assert declared == ("tests/data" in code), "put `#| reads: tests/data/...` at the head of the cell"


# --- names --------------------------------------------------------------------------------------------------------
def test_the_first_mention_of_a_name_leads_to_the_reference():
    page = new_document("nbs/03_boxes")
    page += nodes.title("", "", nodes.literal(text="box_area"))
    for word in ("pairwise_iou()", "pairwise_iou", "Tensor", "share", "box_area"):
        page += nodes.paragraph("", "", nodes.literal(text=word))
    extension.link_names(SimpleNamespace(env=SimpleNamespace(docname="nbs/03_boxes")), page)
    links = [(link["reftarget"], link.astext()) for link in page.findall(addnodes.pending_xref)]
    assert links == [("detr_nb.boxes.pairwise_iou", "pairwise_iou()"), ("detr_nb.boxes.box_area", "box_area")]


def test_names_of_packages_lead_to_the_reference_too(project):
    assert extension.library_names() == {"DABDecoder": "detr_nb.family.dab.DABDecoder"}


@pytest.mark.parametrize(
    ("name", "module"), [("nbs/03_boxes", "boxes"), ("nbs/family/34_dab", "family.dab"), ("nbs/solutions/03_boxes", "")]
)
def test_a_chapter_ends_with_a_link_to_its_module(project, name, module):
    page = new_document(name)
    page += nodes.section("", nodes.title(text="The end"))
    extension.link_module(SimpleNamespace(env=SimpleNamespace(docname=name)), page)
    targets = [link["reftarget"] for link in page.findall(addnodes.pending_xref)]
    assert targets == ([f"detr_nb.{module}"] if module else [])


def test_names_are_those_that_one_module_exports():
    names = extension.library_names()
    assert names["HungarianMatcher"] == "detr_nb.matcher.HungarianMatcher" and "torch" not in names
    for full in names.values():
        module, _, name = full.removeprefix("detr_nb.").rpartition(".")
        assert name in extension.module_path(module).read_text("utf8")
