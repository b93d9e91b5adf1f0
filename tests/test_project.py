"""The ground: notebooks, tables of contents, exported modules, addresses and packaging agree with each other."""

import ast
import builtins
import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import distribution, distributions
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import detr_nb

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "detr_nb"
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
CHAPTERS = [path for path in NOTEBOOKS if path.relative_to(ROOT / "nbs").parts[0] not in ("experiments", "solutions")]
FORWARDS = {"muon"}  # modules that only say where the names of an earlier release are
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("_") and path.stem not in FORWARDS
}
DEVELOPMENT_TOOLS = {"nbdev", "fastcore", "execnb", "jupyter_book", "IPython", "pytest", "hypothesis", "beartype"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf8"))


def module_of(chapter: Path) -> str:
    """The module that a chapter exports: nbs/09_matcher is `matcher`, nbs/family/34_dab is `family.dab`."""
    return ".".join([*chapter.relative_to(ROOT / "nbs").parts[:-1], chapter.stem.split("_", 1)[1]])


NUMBERS = {module_of(path): int(path.stem.split("_", 1)[0]) for path in CHAPTERS}


def code_cells(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def directives(source: str) -> list[str]:
    """The `#|` lines at the head of a cell, without their marks."""
    found = []
    for line in source.splitlines():
        match = re.match(r"^\s*#\s*\|\s*(.*?)\s*$", line)
        if not match:
            break
        found.append(match[1])
    return found


def files_in(node) -> list[str]:
    """Every notebook or page that a table of contents names, in its order."""
    if isinstance(node, str):
        return [node]
    if isinstance(node, list):
        return [file for part in node for file in files_in(part)]
    return [
        file
        for key, part in node.items()
        if key in ("root", "parts", "chapters", "sections", "contents", "file", "href")
        for file in files_in(part)
    ]


def book_order() -> list[str]:
    return files_in(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text("utf8")))


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf8")
    return parser["DEFAULT"]


def imports(tree: ast.AST, package: str = "detr_nb") -> list[tuple[str, list[str]]]:
    """Every import as (full module name, names taken from it), seen from a module of `package`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            found.append((module, [alias.name for alias in node.names]))
    return found


# --- tables of contents -------------------------------------------------------------------------------------------
def test_every_notebook_is_in_the_book():
    listed = [f"{file}.ipynb" for file in book_order() if file.startswith("nbs/")]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == [name_of(path) for path in NOTEBOOKS]


def test_quarto_lists_the_same_chapters_in_the_same_order():
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text("utf8"))
    listed = [file.removesuffix(".ipynb") for file in files_in(quarto["website"]["sidebar"]) if "nbs/" in file]
    assert listed == [file for file in book_order() if file.startswith("nbs/")]


def solutions_of(chapter: Path) -> Path:
    """The notebook with the answers to a chapter: nbs/solutions/ has the folders of nbs/."""
    return ROOT / "nbs" / "solutions" / chapter.relative_to(ROOT / "nbs")


def test_every_solution_belongs_to_a_chapter():
    expected = {solutions_of(path) for path in CHAPTERS}
    solutions = [path for path in NOTEBOOKS if ROOT / "nbs" / "solutions" in path.parents]
    assert solutions and [name_of(path) for path in solutions if path not in expected] == []


def test_every_number_is_the_number_of_one_chapter_and_stands_in_order():
    assert len(set(NUMBERS.values())) == len(CHAPTERS)
    listed = [file for file in book_order() if ROOT / f"{file}.ipynb" in CHAPTERS]
    assert listed == sorted(listed, key=lambda file: Path(file).name)


# --- notebooks ----------------------------------------------------------------------------------------------------
def default_exports(path: Path) -> list[str]:
    lines = [line for source in code_cells(read(path)) for line in directives(source)]
    return [line.split()[1] for line in lines if line.startswith("default_exp")]


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_chapter_exports_the_module_of_its_name(path):
    assert default_exports(path) == [module_of(path)]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path not in CHAPTERS], ids=name_of)
def test_experiments_and_solutions_export_nothing(path):
    lines = [line for source in code_cells(read(path)) for line in directives(source)]
    assert not [line for line in lines if line.split()[0] in ("default_exp", "export", "exporti", "exports")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_small_and_tells_nothing_of_a_machine(path):
    text = path.read_text("utf8")
    assert len(text) < 1.5e6
    notebook = read(path)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    for output in outputs:  # images are base64 and may hold anything
        for kind in [kind for kind in output.get("data", {}) if kind.startswith("image/") and kind != "image/svg+xml"]:
            output["data"][kind] = ""
    assert re.findall(r"(?<![\w.])/(?:root|home|work|tmp|Users)/[\w.]+", json.dumps(outputs)) == []
    assert "widgets" not in notebook["metadata"], "widget state belongs to the book, not to the repository"
    assert {key for cell in notebook["cells"] for key in cell["metadata"]} <= {"tags"}
    assert not any(cell.get("execution_count") for cell in notebook["cells"])


def prose(path: Path) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")


def section(text: str, title: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found[1] if found else ""


@pytest.mark.parametrize("path", [path for path in CHAPTERS if not path.stem.startswith("9")], ids=name_of)
def test_a_chapter_ends_with_recap_exercises_and_next(path):
    text = prose(path)
    assert re.findall(r"^## (Recap|Exercises|Next)$", text, re.M) == ["Recap", "Exercises", "Next"]
    assert 3 <= len(re.findall(r"^- ", section(text, "Recap"), re.M)) <= 6
    exercises = "".join(sorted(set(re.findall(r"^(?:\*\*)?(\d)\. ", section(text, "Exercises"), re.M))))
    least = 3 if NUMBERS[module_of(path)] < 19 else 1  # a page for users and the workshop have one at least
    assert exercises in ["1", "12", "123", "1234", "12345"] and len(exercises) >= least
    if path.stem != "00_notation":  # whose short answers are folded away on its own page
        assert set(re.findall(r"^## (\d)\.", prose(solutions_of(path)), re.M)) == set(exercises)


# The training chapter reads its own clock, so it checks the library and not its own cells.
@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_chapter_checks_the_types_of_the_library_and_of_its_own_cells(path):
    folded = next(source for source in code_cells(read(path)) if "install_import_hook" in source)
    assert 'install_import_hook("detr_nb", "beartype.beartype")' in folded
    assert "%jaxtyping.typechecker beartype.beartype" in folded
    assert folded.index("install_import_hook(") < (folded + "detr_nb.").index("detr_nb."), "the hook comes too late"


# --- the library --------------------------------------------------------------------------------------------------
# Tensors whose annotation names no shape, and why.
SHAPELESS = {
    "attention_bias.like": "only its type is used", "colours.like": "only its device is used",
    "pad_targets.like": "only its device is used", "RandomSizeCrop.transform.part": "an image, boxes or masks",
    "RandomSizeCrop.transform.return": "the same part",
    "ShortSide.transform.part": "an image, boxes or masks", "ShortSide.transform.return": "the same part",
    "check_images.images": "the check of the shape", "check_images.pad": "the check of the shape",
    "check_images.cameras": "the check of the shape",
    "coco_segmentation.mask": "pycocotools checks it",
}


def functions(tree: ast.AST) -> list[tuple[str, ast.FunctionDef]]:
    """The functions and methods of a module by name."""
    found = [(node.name, node) for node in ast.iter_child_nodes(tree) if isinstance(node, ast.FunctionDef)]
    for part in (node for node in ast.iter_child_nodes(tree) if isinstance(node, ast.ClassDef)):
        found += [(f"{part.name}.{name}", node) for name, node in functions(part)]
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_whatever_is_exported_has_types_with_shapes_and_a_docstring(module):
    tree = ast.parse(MODULES[module].read_text("utf8"))
    bare, shapeless, silent = [], set(), []
    for name, node in functions(tree):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        types = {part.arg: part.annotation for part in arguments if part and part.arg not in ("self", "cls")}
        types |= {} if node.name == "__init__" else {"return": node.returns}
        bare += [f"{name}.{part}" for part, kind in types.items() if kind is None]
        shapeless |= {f"{name}.{part}" for part, kind in types.items() if kind and has_bare_tensor(kind)}
        silent += [name] if not ast.get_docstring(node) and not node.name.startswith("_") else []
    silent += [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)]
    assert (bare, silent, shapeless - SHAPELESS.keys()) == ([], [], set())


def has_bare_tensor(kind: ast.AST) -> bool:
    """Is an argument, or a part of a union, a tensor of any shape? (Containers of tensors name theirs in words.)"""
    if isinstance(kind, ast.BinOp):
        return has_bare_tensor(kind.left) or has_bare_tensor(kind.right)
    return isinstance(kind, ast.Name) and kind.id == "Tensor"


def test_every_module_has_a_chapter_and_every_chapter_a_module():
    assert sorted(MODULES) == sorted(NUMBERS)


def test_a_package_has_a_line_of_documentation_and_no_code():
    for path in PACKAGE.rglob("*/__init__.py"):
        tree = ast.parse(path.read_text("utf8"))
        line = ast.get_docstring(tree) or ""
        assert len(tree.body) == 1 and line and "\n" not in line, f"{name_of(path)} holds a docstring of one line"


# --- who may import whom ------------------------------------------------------------------------------------------
def taken(module: str) -> dict[str, list[str]]:
    """The modules of the library that a module imports, and the names taken from each."""
    package = f"detr_nb.{module}".rpartition(".")[0]
    found = imports(ast.parse(MODULES[module].read_text("utf8")), package)
    return {source.removeprefix("detr_nb."): names for source, names in found if source.startswith("detr_nb.")}


def may_import(number: int, other: int) -> bool:
    """May the chapter of a number import the chapter of another one in its exported cells?"""
    if number in (92, 93, 94, 97):  # downloads, optimizer, measuring, files: they know nothing of a detector
        return other == 0 or other == 97 != number
    if other in (92, 93, 94, 97):
        return True
    if number >= 90:
        return other < 90
    if number >= 80:  # the workshop
        return other <= 11 or 80 <= other < number
    return other < number or 80 <= other < 90


@pytest.mark.parametrize(
    ("number", "other", "allowed"),
    [
        (12, 5, True), (12, 12, False), (12, 13, False), (12, 86, True), (12, 93, True), (12, 90, False),
        (82, 11, True), (82, 12, False), (82, 80, True), (82, 83, False), (82, 94, True), (82, 90, False),
        (92, 0, True), (92, 3, False), (92, 97, True), (97, 97, False), (97, 92, False),
        (86, 97, True), (94, 93, False), (90, 42, True), (91, 8, True), (91, 90, False), (96, 92, True),
    ],
)
def test_the_rule_of_imports(number, other, allowed):
    assert may_import(number, other) == allowed


# Imports that break the rule, and why.
EXCEPTIONS = {
    ("explorables", "plots"): "the still pictures of its figures are drawn as all others are",
    ("bench", "peers"): "what others built is compared here, and stands apart from what is ours",
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_the_chapters_that_it_may(module):
    broken = {(module, other) for other in taken(module) if not may_import(NUMBERS[module], NUMBERS[other])}
    assert broken == {pair for pair in EXCEPTIONS if pair[0] == module}


def test_imports_run_in_no_circle():
    order = list(TopologicalSorter({module: taken(module) for module in MODULES}).static_order())
    assert sorted(order) == sorted(MODULES)


def test_the_workshop_does_not_know_detr_by_name():
    for module in (module for module, number in NUMBERS.items() if 80 <= number < 90):
        tree = ast.parse(MODULES[module].read_text("utf8"))
        names = {getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(tree)}
        assert "DETR" not in names | {name for names in taken(module).values() for name in names}, module


def test_the_pictures_know_no_model():
    assert taken("plots").keys() <= {"notation", "boxes"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_by_name_and_no_development_tool(module):
    package = f"detr_nb.{module}".rpartition(".")[0]
    for source, names in imports(ast.parse(MODULES[module].read_text("utf8")), package):
        assert "*" not in names, f"{module} imports everything from {source}"
        assert source.partition(".")[0] not in DEVELOPMENT_TOOLS, f"{module} imports {source}, a development tool"
        assert source != "detr_nb", f"{module} imports {names} from the package: name the chapter"


def run(code: str) -> str:
    """The output of a piece of Python in a process of its own, away from the repository."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    heavy = "{'torch', 'torchvision', 'scipy', 'numpy', 'matplotlib', 'pycocotools'}"
    assert run(f"import sys, detr_nb; dir(detr_nb); print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_the_public_names_load_no_plotting_and_no_compiler():
    code = "import sys, torch, torchvision; before = set(sys.modules); import detr_nb\n"
    code += "for name in detr_nb.__all__: getattr(detr_nb, name)\n"
    heavy = "{'matplotlib', 'torch._dynamo', 'torch._inductor', 'transformers', 'pandas'}"
    assert run(code + f"print(sorted({heavy} & (set(sys.modules) - before)))") == "[]"


@pytest.mark.slow
@pytest.mark.alone
def test_all_public_names_cost_little_more_than_torch_and_torchvision():
    """The best of three, each in a process of its own; the bound leaves room for a busy machine."""
    clock = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    everything = "import detr_nb; [getattr(detr_nb, name) for name in detr_nb.__all__]"
    base, ours = (
        min(float(run(clock.format(code))) for _ in range(3)) for code in ("import torch, torchvision", everything)
    )
    assert ours < 2 * base


def test_the_public_names_need_no_development_tool():
    code = "import sys, detr_nb\nfor name in detr_nb.__all__: getattr(detr_nb, name)\n"
    assert run(code + f"print(sorted({DEVELOPMENT_TOOLS!r} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("name", [name for name in detr_nb.__all__ if name != "__version__"])
def test_every_public_name_can_be_imported(name):
    value = getattr(detr_nb, name)
    assert callable(value) and value.__doc__, f"{name} has no docstring"
    assert value.__module__ == f"detr_nb.{detr_nb._PUBLIC[name]}"
    assert name in dir(detr_nb)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'detr_resnet51'"):
        _ = detr_nb.detr_resnet51


# --- names of the release before ----------------------------------------------------------------------------------
EARLIER = json.loads((ROOT / "tests" / "data" / "names_before_moves.json").read_text("utf8"))
MOVED = json.loads((PACKAGE / "moved.json").read_text("utf8"))


@pytest.mark.parametrize("module", sorted(EARLIER))
def test_a_name_of_the_release_before_is_found_where_it_was(module):
    """With a warning that says where it is now; what has not moved, or is still used there, comes without one."""
    here = import_module(f"detr_nb.{module}")
    for name in EARLIER[module]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            value = getattr(here, name)
        new = MOVED.get(module, {}).get(name)
        assert [str(warning.message) for warning in seen] == (
            [f"detr_nb.{module}.{name} has moved to detr_nb.{new}: write that; the old name goes with the next release"]
            if new and name not in vars(here)
            else []
        )
        if new:
            home, _, there = new.rpartition(".")
            assert value is getattr(import_module(f"detr_nb.{home}"), there)


def test_public_names_are_few():
    """Public is what another chapter or a user imports; all else is exported for its own module."""
    names = [name for module in MODULES for name in getattr(import_module(f"detr_nb.{module}"), "__all__", ())]
    assert len(names) <= 260


# --- addresses and versions ---------------------------------------------------------------------------------------
def test_addresses_agree_with_settings():
    home = settings()
    ours = f"{home['user']}/{home['repo']}"
    texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml")]
    colab = r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/([\w.-]+)/(nbs/[\w/.-]+)"
    found = []
    for path in [*texts, *NOTEBOOKS, *(ROOT / "book").glob("*.md")]:
        text = path.read_text("utf8")
        found += re.findall(colab, text)
        for address in re.findall(r"github\.com/([\w.-]+/[\w.-]*detr_nb)(?=[\s\"'/)])", text):
            assert address == ours, f"{name_of(path)} points to {address}"
        for branch in re.findall(rf"github\.com/{ours}/(?:blob|tree)/([\w.-]+)", text):
            assert branch == home["branch"], f"{name_of(path)} points to the branch {branch}"
    for address, branch, file in found:
        assert (address, branch) == (ours, home["branch"])
        assert (ROOT / file).exists(), f"{file} is linked and does not exist"


def test_the_readme_has_a_badge_for_every_chapter():
    text = (ROOT / "README.md").read_text("utf8")
    badges = re.findall(r"/blob/[\w.-]+/(nbs/[\w/.-]+\.ipynb)", text)
    assert badges == [f"{file}.ipynb" for file in book_order() if file.startswith("nbs/") and "/solutions/" not in file]


def test_versions_agree():
    version = settings()["version"]
    assert detr_nb.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text("utf8")
    assert re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text("utf8"), re.M)[1] == version


def test_constraints_name_versions_and_no_places():
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.+!-]+", line)] == []


def test_every_installed_version_runs_on_the_oldest_python():
    wanted = {dist.metadata["Name"]: dist.metadata.get("Requires-Python") or "" for dist in distributions()}
    assert [name for name, versions in wanted.items() if not SpecifierSet(versions).contains("3.11.0")] == []


def test_the_readme_has_every_part_that_it_promises():
    text = (ROOT / "README.md").read_text("utf8")
    for part in ("## Two commands", "## Three lines", "## Results", "## Chapters", "## Licence"):
        assert f"{part}\n" in text
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert picture.startswith("https://") or (ROOT / picture).exists(), picture


@pytest.mark.slow
def test_the_lines_of_the_readme_run():
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf8"), re.S)
    assert "'AP50': 0." in run(code)  # tests/test_hub.py runs the other lines, which need a download


# --- packaging ----------------------------------------------------------------------------------------------------
def brought_by(name: str, extra: str = "") -> set[str]:
    """What an installation of a package brings, directly or not, by what the installed packages ask for."""
    found, todo = set(), [(name, extra)]
    while todo:
        package, extra = todo.pop()
        if canonicalize_name(package) in found:
            continue
        found.add(canonicalize_name(package))
        wanted = map(Requirement, distribution(package).requires or ())
        todo += [(part.name, "") for part in wanted if part.marker is None or part.marker.evaluate({"extra": extra})]
    return found


def test_the_library_alone_brings_no_notebook_tool_however_indirectly():
    tools = re.compile("nbdev|jupyter|fastcore|execnb|ipython|ipykernel|nbclient|sphinx|pytest|hypothesis|beartype")
    alone = brought_by("detr-nb")
    assert {"torch", "torchvision", "numpy", "kiwisolver"} <= alone  # the last comes with matplotlib
    assert [name for name in alone if tools.search(name)] == []
    assert {"nbdev", "fastcore", "jupyter-book", "ipython"} <= brought_by("detr-nb", "dev"), "the test sees them"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_asks_for_no_development_tool(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "detr_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "dab.py", "static/dab.js", "weights/dab.pt"):  # a package with data of its own
        (source / "detr_nb" / "family" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "detr_nb" / "family" / name).touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "-w", str(tmp_path)], check=True, cwd=tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("detr_nb-*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    files = (path.relative_to(source) for path in (source / "detr_nb").rglob("*") if path.is_file())
    assert {path.as_posix() for path in files if not path.name.startswith(".")} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"detr_nb"}
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M)
    assert {"torch", "torchvision", "pycocotools"} <= set(required)
    assert not {tool for tool in required if re.search("nbdev|jupyter|fastcore|execnb|ipykernel|sphinx", tool)}


# --- pages at the back --------------------------------------------------------------------------------------------
def test_the_reference_has_every_module_and_every_public_name():
    text = (ROOT / "book" / "reference.md").read_text("utf8")
    assert sorted(re.findall(r"automodule:: detr_nb\.([\w.]+)", text)) == sorted(MODULES)
    rows = re.findall(r"^\| (`.+`) \| `([\w.]+)` \|$", text, re.M)
    assert {name: module for names, module in rows for name in re.findall(r"`(\w+)`", names)} == detr_nb._PUBLIC


def test_the_glossary_is_in_order_and_names_chapters_that_use_its_words():
    rows = re.findall(r'^\| (.+) \| <span lang="zh-Hans">(.+)</span> \| .+ \| \[.+\]\(\.\./(nbs/.+)\) \|$',
                      (ROOT / "book" / "glossary.md").read_text("utf8"), re.M)
    words = [word for word, _, _ in rows]
    assert len(rows) > 50 and words == sorted(words, key=str.lower)
    for word, chinese, file in rows:
        assert re.search(r"[\u4e00-\u9fff]", chinese), word
        text = (ROOT / f"{file}.ipynb").read_text("utf8").lower()
        assert any(part[:6] in text for part in re.findall(r"[a-z]{3,}", word.lower())), f"{file} is not about {word}"


# --- in Colab -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_can_fetch_what_it_needs(path):
    """Before the first import there is a cell that fetches the book where the library is missing."""
    sources = code_cells(read(path))
    place = next(i for i, source in enumerate(sources) if 'find_spec("detr_nb")' in source)
    assert all("import" not in source.replace("default_exp", "") for source in sources[:place])
    home = settings()
    assert f"git clone --quiet --depth 1 https://github.com/{home['user']}/{home['repo']}\n" in sources[place]
    assert sources[place].endswith(f"%cd -q {home['repo']}/{path.parent.relative_to(ROOT).as_posix()}")
    assert directives(sources[place]) == ["include: false"]


@pytest.mark.parametrize(
    ("before", "installs"),
    [
        (lambda place: None, True),
        (lambda place: (place / "content" / "detr_nb" / "nbs").mkdir(parents=True), True),  # the last try broke off
        (lambda place: (place / "detr_nb" / "__init__.py").write_text(""), False),
        (lambda place: ((place / "detr_nb" / "__init__.py").write_text(""),
                        (place / "content" / "detr_nb" / "nbs").mkdir(parents=True)), False),  # the session began anew
    ],
    ids=["nothing there", "a clone without an installation", "installed", "both"],
)
def test_the_install_cell_takes_what_is_there(tmp_path, before, installs, monkeypatch):
    """Its decisions, with what it would start written down instead."""
    (tmp_path / "content").mkdir()
    (tmp_path / "detr_nb").mkdir()
    before(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "content"), str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "detr_nb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path / "content")
    source = next(source for source in code_cells(read(CHAPTERS[0])) if "!git clone" in source)
    calls = re.sub(r"^( *)([!%].*)$", r"\1started.append(\2)", source, flags=re.M)
    calls = re.sub(r"append\((.*)\)$", lambda found: f"append({found[1]!r})", calls, flags=re.M)
    importlib.invalidate_caches()
    exec(calls, space := {"started": []})
    assert any("pip install" in words and "-c kept.txt" in words for words in space["started"]) == installs
    moved = (tmp_path / "content" / "detr_nb" / "nbs").is_dir()
    assert (space["started"][-1:] == ["%cd -q detr_nb/nbs"]) == moved


INSTALLED = """
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in {cells!r}:
    shell.run_cell(cell).raise_error()
"""


HEAVY = re.compile("torch|torchvision|triton|(nvidia|cuda)-.*")


def lend_torch(place: Path) -> None:
    """Link PyTorch, five gigabytes, into the packages of another environment: Colab has it before our cell runs."""
    for found in distributions():
        if HEAVY.fullmatch(canonicalize_name(found.metadata["Name"])):
            for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
                if not (place / name).exists():
                    (place / name).symlink_to(found.locate_file(name))


@pytest.mark.slow
def test_the_install_cell_works_in_a_clean_environment(tmp_path):
    """The published cell, word by word, in a fresh environment; git is told to find the address in this tree."""
    tree, home = tmp_path / "tree", settings()
    left_out = shutil.ignore_patterns(".*", "_build", "runs", "*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT, tree, ignore=left_out)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(tree)]
    for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "the tree"]):
        subprocess.run([*git, *words], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "clean")], check=True)
    lend_torch(next((tmp_path / "clean" / "lib").glob("python*/site-packages")))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "ipython", "pip"], check=True)
    sources = code_cells(read(ROOT / "nbs" / "experiments" / "08_how_much_data.ipynb"))
    cells = [sources[0], "import os; print(os.path.basename(os.getcwd()))", *sources[1:6]]
    environment = {
        "PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "MPLBACKEND": "agg",
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_NO_COMPILE": "1", "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{tree.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{home['user']}/{home['repo']}",
    }
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
    (tmp_path / "content").mkdir()
    result = subprocess.run([str(python), "-c", INSTALLED.format(cells=cells)], cwd=tmp_path / "content", text=True,
                            capture_output=True, env=kept | environment, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "experiments\n" in result.stdout and "runs, " in result.stdout


def names_made(tree: ast.AST) -> set[str]:
    """Every name that a program binds somewhere."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(part.asname or part.name).split(".")[0] for part in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            made.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            made.add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    return made


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_uses_only_names_that_it_has(path):
    """The linter cannot say it: to it the axes in annotations are names, too. Execution says it minutes later."""
    lines = [line for source in code_cells(read(path)) if "!git clone" not in source for line in source.splitlines()]
    tree = ast.parse("\n".join(line for line in lines if not line.lstrip().startswith("%")))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert used <= names_made(tree) | set(dir(builtins))
