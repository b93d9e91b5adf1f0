"""A chapter in a folder, nbs/family/34_dab, becomes a module of a package: exported, compared, type-checked."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
BOXES = ("#| default_exp boxes", "# Boxes\n> Areas.", "#| export\ndef area(w: float, h: float) -> float: return w * h")
DAB = (
    "#| default_exp family.dab", "# DAB\n> Queries are boxes.",
    "#| export\nfrom jaxtyping import Float\nfrom torch import Tensor\n\nfrom detr_nb.boxes import area\n"
    "from detr_nb.family.references import POINT",
    '#| export\ndef centres(boxes: Float[Tensor, "q 4"]) -> Float[Tensor, "q 2"]:\n    return boxes[:, :2] + POINT',
    "assert area(2, 3) == 6",
)
REFERENCES = ("#| default_exp family.references", "# References\n> Points.", "#| export\nPOINT = 0")
SOLUTION = ("# Solutions: DAB", "from detr_nb.family.dab import centres")

spec = importlib.util.spec_from_file_location("check_export", ROOT / "tools" / "check_export.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def write_notebook(path: Path, sources: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {True: nbformat.v4.new_markdown_cell, False: nbformat.v4.new_code_cell}
    cells = [kinds[source.startswith("# ")](source) for source in sources]
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A project with a flat chapter, two of a family and a solution, and what `make export` makes of it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    pages = {"03_boxes": BOXES, "family/30_references": REFERENCES, "family/34_dab": DAB}
    for name, sources in (pages | {"solutions/family/34_dab": SOLUTION}).items():
        write_notebook(folder / "nbs" / f"{name}.ipynb", sources)
    (folder / "detr_nb").mkdir()
    for name in (tool.BY_HAND, *tool.FORWARDS):
        shutil.copy(ROOT / "detr_nb" / name, folder / "detr_nb")
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(exported, tmp_path, monkeypatch):
    """A copy to change, which the check looks at."""
    shutil.copytree(exported, tmp_path / "project")
    monkeypatch.setattr(tool, "ROOT", tmp_path / "project")
    return tmp_path / "project"


def test_the_export_writes_a_package_whose_imports_are_relative(exported):
    files = {path.relative_to(exported / "detr_nb").as_posix() for path in (exported / "detr_nb").rglob("*.py")}
    assert files == {"__init__.py", "_modidx.py", "muon.py", "boxes.py",
                     "family/__init__.py", "family/dab.py", "family/references.py"}
    text = (exported / "detr_nb" / "family" / "dab.py").read_text()
    assert "from ..boxes import area\n" in text and "from .references import POINT\n" in text
    assert '"""Queries are boxes."""' in text and "# %% ../../nbs/family/34_dab.ipynb" in text


def write_docstring(package: Path) -> None:
    (package / "family" / "__init__.py").write_text('"""Siblings of DETR."""\n')


def take_away(package: Path) -> None:
    (package / "family" / "dab.py").unlink()


def edit(package: Path) -> None:
    file = package / "family" / "dab.py"
    file.write_text(file.read_text().replace("[:, :2]", "[:, 2:]"))


def add(package: Path) -> None:
    (package / "space").mkdir()
    for name in ("__init__", "cameras"):
        (package / "space" / f"{name}.py").write_text('"""Left behind."""\n')


def take_away_the_mark(package: Path) -> None:
    (package / "family" / "__init__.py").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (write_docstring, []), (take_away, ["detr_nb/family/dab.py is missing"]),
        (edit, ["--- detr_nb/family/dab.py as it is"]), (take_away_the_mark, ["detr_nb/family/__init__.py is missing"]),
        (add, [f"detr_nb/space/{name}.py is exported by no notebook" for name in ("__init__", "cameras")]),
    ],
)
def test_the_check_of_the_export_sees_what_happens_inside_a_package(project, tmp_path, change, said):
    change(project / "detr_nb")
    (tmp_path / "export").mkdir()
    found = tool.differences(tool.export_copy(tmp_path / "export"), project / "detr_nb")
    assert [text.splitlines()[0] for text in found] == said


TYPES = """
from jaxtyping import install_import_hook

install_import_hook("detr_nb", "beartype.beartype")
import torch

from detr_nb.family.dab import centres

print(tuple(centres(torch.ones(5, 4)).shape))
centres(torch.ones(5, 3))
"""


def test_the_type_checker_sees_the_modules_of_a_package(exported):
    done = subprocess.run([sys.executable, "-c", TYPES], cwd=exported, capture_output=True, text=True)
    assert done.stdout == "(5, 2)\n" and "TypeCheckError" in done.stderr
