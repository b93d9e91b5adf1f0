"""The book's own Sphinx extension.

It does nine things:

- reads `.ipynb` files: nbdev's `#|` directives become the tags that Jupyter Book knows (`read_notebook`, and
  directives.py beside this file);
- makes the execution cache notice edits of the library: a digest of the modules a notebook imports, of the files it
  says it reads and of the installed versions goes into the kernel's metadata, which the cache hashes (`digest`), and
  the same files become Sphinx dependencies of the page (`note_sources`);
- gives every widget the still picture of its output for readers without scripts (`keep_stills`);
- takes the repository's address from settings.ini (`set_repository`);
- draws the map of the chapters from the table of contents, each box a link (`ChapterMap`, `place_map`, and
  chapter_map.py beside this file);
- says at the head of every page how long it takes and where on the reading paths it stands, and lists the paths and
  the pages on the front page (`add_line`, `write_lines`, `FrontPageDirective`, and reading.py beside this file);
- forwards from the addresses of pages that moved (`forward`);
- leads from the first mention of a name of the library on a page to its entry in the reference, and from
  the end of a chapter to its module (`link_names`, `link_module`);
- says which chapter is being built and how long it took (`say_start`, `say_end`).
"""

import ast
import configparser
import hashlib
import json
import os
import re
import sys
import time
from functools import lru_cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.util import resolve_name
from pathlib import Path
from posixpath import dirname, relpath

import nbformat
from chapter_map import chapter_of, draw_map, pages_by_part, parts_of
from directives import apply_directives
from docutils import nodes
from myst_nb.core.render import NbElementRenderer
from reading import (
    ASIDE,
    ASIDES,
    PATHS,
    ReadingPath,
    Stop,
    in_words,
    page_table,
    path_list,
    read_amount,
    stops_of,
)
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "detr_nb"
MAP = "book/_ext/chapter_map.py"
READING = "book/_ext/reading.py"
MOVED = {"nbs/93_muon": "nbs/93_optimizer"}  # old addresses that lead to a page of today
VERSIONS = ("torch", "torchvision", "numpy", "scipy", "matplotlib", "pycocotools", "pillow", "jaxtyping", "ipywidgets")
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

# --- what a notebook depends on -----------------------------------------------------------------------------------
def parse_cell(source: str) -> ast.Module:
    """The syntax tree of a code cell without its magics; an empty one if it is not Python."""
    lines = ["" if line.lstrip().startswith(("%", "!", "?")) else line for line in source.splitlines()]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def module_path(name: str) -> Path:
    """The file of a module by its name below the package: `boxes`, `family.dab`."""
    return ROOT / PACKAGE / f"{name.replace('.', '/')}.py"


def modules() -> list[str]:
    """Every module of the library by its name below the package."""
    paths = (path.relative_to(ROOT / PACKAGE).with_suffix("") for path in (ROOT / PACKAGE).rglob("*.py"))
    return sorted(".".join(path.parts) for path in paths if not path.name.startswith("_"))


def public_names() -> dict[str, str]:
    """The table in detr_nb/__init__.py of public names and the modules they live in."""
    for node in parse_cell((ROOT / PACKAGE / "__init__.py").read_text("utf8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
            return ast.literal_eval(node.value)
    return {}


def modules_behind(full: str) -> set[str]:
    """The modules that a full name can reach: its own, that of a public name, or all of a package."""
    package, *parts = full.split(".")
    if package != PACKAGE:
        return set()
    for end in range(len(parts), 0, -1):
        if module_path(name := ".".join(parts[:end])).exists():
            return {name}
    name = ".".join(part for part in parts if part != "*")
    if name in public_names():
        return {public_names()[name]}
    return {module for module in modules() if module.startswith(f"{name}." if name else "")}


def imported(tree: ast.AST, package: str = PACKAGE) -> set[str]:
    """Names of the modules of detr_nb that a syntax tree imports anywhere; `package` is the one that it stands in."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return set().union(*map(modules_behind, names))


@lru_cache(None)
def module_sources(name: str) -> frozenset[Path]:
    """The file of a module, the files of the modules it imports, and the package data that it names."""
    tree = parse_cell(module_path(name).read_text("utf8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    files = {module_path(name)}
    for folder in ("static", "weights"):
        if any(text == folder or text.startswith(folder + "/") for text in texts):
            for home in {ROOT / PACKAGE, module_path(name).parent}:
                files |= {path for path in (home / folder).rglob("*") if path.is_file()}
    for other in imported(tree, f"{PACKAGE}.{name}".rpartition(".")[0]) - {name}:
        files |= module_sources(other)
    return frozenset(files)


def sources(notebook: nbformat.NotebookNode, reads: list[str]) -> list[Path]:
    """Every file that the outputs of a notebook depend on, besides the notebook."""
    files: set[Path] = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for name in imported(parse_cell(cell.source)):
                files |= module_sources(name)
    for pattern in reads:
        matches = [path for path in ROOT.glob(pattern) if path.is_file()]
        if not matches:
            raise ValueError(f"'#| reads: {pattern}' matches no file")
        files |= set(matches)
    return sorted(files)


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


@lru_cache(None)
def file_hash(path: Path) -> str:
    text = path.read_bytes()
    if ROOT / PACKAGE in path.parents and path.suffix == ".py":  # the markers of nbdev name cells: no code
        text = re.sub(rb"(?m)^# %% .*$", b"", text)
    return hashlib.sha256(text).hexdigest()


def real_data(notebook: nbformat.NotebookNode) -> list[str]:
    """The data sets at hand, for a notebook that looks for them: with and without them it is a different chapter."""
    if not any("DETR_NB_DATA" in cell.source for cell in notebook.cells if cell.cell_type == "code"):
        return []
    folder = os.environ.get("DETR_NB_DATA")
    return sorted(path.name for path in Path(folder).iterdir() if path.is_dir()) if folder else []


def digest(notebook: nbformat.NotebookNode, files: list[Path]) -> str:
    """A hash of everything but the cells' text that decides what executing the notebook gives."""
    skipped = [
        [index, cell.outputs]
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and "skip-execution" in cell.metadata.get("tags", [])
    ]
    state = {
        "python": sys.version_info[:2],
        "versions": {name: installed(name) for name in VERSIONS},
        "files": {path.relative_to(ROOT).as_posix(): file_hash(path) for path in files},
        "skipped": skipped,
        "data": real_data(notebook),
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def prepare(text: str) -> tuple[nbformat.NotebookNode, list[Path]]:
    """A notebook as the book executes it, and the files it depends on."""
    notebook = nbformat.reads(text, as_version=4)
    reads = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            reads += apply_directives(cell)
            if "skip-execution" not in cell.metadata.get("tags", []):
                cell.outputs, cell.execution_count = [], None
    files = sources(notebook, reads)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL | {"detr_nb": digest(notebook, files)}})
    return notebook, files


def read_notebook(text: str) -> nbformat.NotebookNode:
    """The reader of `.ipynb` files (`nb_custom_formats` in _config.yml)."""
    return prepare(text)[0]


# --- alternative texts of figures ---------------------------------------------------------------------------------
_render_image = NbElementRenderer.render_image


def render_image(self, data):
    """Pass on the alternative text that a figure carries in its output's metadata (`{"image/png": {"alt": ...}}`)."""
    images = _render_image(self, data)
    alt = data.output_metadata.get(data.mime_type, {}).get("alt") or data.output_metadata.get("alt")
    for image in images:
        if alt and not image.get("alt"):
            image["alt"] = alt
    return images


# --- still pictures of widgets ------------------------------------------------------------------------------------
def keep_stills(app, doctree) -> None:
    """Where no script runs, show the picture that an output carries beside its widget."""
    for bundle in doctree.findall(nodes.container):
        if bundle.get("nb_element") == "mime_bundle":
            kinds = {part["mime_type"]: part for part in bundle.children}
            widget, picture = kinds.get(WIDGET), kinds.get("image/svg+xml", kinds.get("image/png"))
            if widget is not None and picture is not None:
                before, after = (nodes.raw("", mark, format="html") for mark in ("<noscript>", "</noscript>"))
                widget += [before, *(part.deepcopy() for part in picture.children), after]


# --- the map of the chapters -----------------------------------------------------------------------------------------
class page_html(nodes.General, nodes.Element):
    """HTML that stands on many pages; unlike `nodes.raw`, its words do not lead the search to each of them."""


def write_html(translator, node) -> None:
    translator.body.append(node["html"])
    raise nodes.SkipNode


class chapter_map(nodes.General, nodes.Element):
    """Where the map stands until the addresses of the pages are known."""


class ChapterMap(SphinxDirective):
    """`{chapter-map} module`: the map with the chapter of the page lit, or that of a module; the text describes it."""

    has_content = True
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        for source in (self.config.external_toc_path, MAP):  # another map is drawn anew; nothing is executed for it
            self.env.note_dependency(str(ROOT / source))
        own = chapter_of(self.env.docname)
        lit = self.arguments[0] if self.arguments else own.module if own else ""
        place = chapter_map(text=" ".join(self.content), lit=lit)
        self.set_source_info(place)
        return [place]


def place_map(app, doctree, docname) -> None:
    """Draw the map for the page that it stands on."""
    for place in list(doctree.findall(chapter_map)):
        parts = parts_of(app.env.external_site_map)
        chapters = [chapter for _, part in parts for chapter in part]
        if place["lit"] and place["lit"] not in [chapter.module for chapter in chapters]:
            LOGGER.warning(f"the map has no chapter '{place['lit']}' to light", location=place)
        links = {chapter.page: app.builder.get_relative_uri(docname, chapter.page) or "#" for chapter in chapters}
        svg = draw_map(parts, place["text"], place["lit"], links)
        place.replace_self(page_html(html=f'<div class="chapter-map">{svg}</div>'))


# --- the reading paths --------------------------------------------------------------------------------------------
def page_titles(site_map) -> dict[str, str]:
    """The notebooks of the table of contents and their titles there."""
    return {page: site_map[page].title or page for page in site_map if (ROOT / f"{page}.ipynb").exists()}


@lru_cache(None)
def minutes_of(path: Path, changed: int) -> int:
    """How long a notebook takes to read; `changed` says when it was written."""
    return read_amount(path).minutes


def page_minutes(page: str) -> int:
    path = ROOT / f"{page}.ipynb"
    return minutes_of(path, path.stat().st_mtime_ns)


class reading_line(nodes.General, nodes.Element):
    """Where the line of a page stands until the addresses of the pages are known."""


def add_line(app, doctree) -> None:
    """Make room for the line of a notebook, below its title and the promise that follows the title."""
    page, section = app.env.docname, next(doctree.findall(nodes.section), None)
    if section is not None and page in page_titles(app.env.external_site_map):
        head = (nodes.title, nodes.block_quote)
        place = next((i for i, child in enumerate(section) if not isinstance(child, head)), len(section))
        section.insert(place, reading_line(page=page))


def stop_in_words(stop: Stop, link) -> str:
    """One path on the line of a page that stands on it."""
    then = f"next {link(stop.next)}" if stop.next else "the last page"
    return f"On the path {link(None, stop.path)}: {stop.number} of {stop.count}, {then}."


def line_of(page: str, site_map, link) -> list[str]:
    """What the line of a page says: its minutes, and its place on the paths or why it has none.

    Args:
        page: the page.
        site_map: the table of contents.
        link: gives a link to a page, or to a path of the front page.
    """
    if "/solutions/" in page:
        chapter = page.replace("/solutions/", "/")
        return [f"Solutions of {link(chapter)}: try the exercises first."] if chapter in site_map else []
    part = next((caption for caption, pages in pages_by_part(site_map) if page in pages), "")
    stops = [stop_in_words(stop, link) for stop in stops_of(page, page_titles(site_map))]
    return [f"About {page_minutes(page)} minutes.", *(stops or [ASIDES.get(part, ASIDE)])]


def write_lines(app, doctree, docname) -> None:
    """Write the lines of the pages that a document consists of."""
    site_map = app.env.external_site_map

    def link(page: str | None, path: ReadingPath | None = None) -> str:
        address = app.builder.get_relative_uri(docname, page or site_map.root.docname)
        if path:
            return f'<a href="{escape(address.partition("#")[0])}#{path.anchor}">{escape(path.name)}</a>'
        return f'<a href="{escape(address or "#")}">{escape(site_map[page].title or page)}</a>'

    for place in list(doctree.findall(reading_line)):
        parts = "".join(f"<span>{words}</span> " for words in line_of(place["page"], site_map, link))
        html = f'<nav class="reading-line" aria-label="Reading paths">{parts.rstrip()}</nav>' if parts else ""
        place.replace_self(page_html(html=html))


class FrontPageDirective(SphinxDirective):
    """What lists pages of the table of contents with their minutes; it is written anew when one of them changes."""

    has_content = True

    def pages(self) -> tuple[dict[str, str], dict[str, int]]:
        """The titles and the minutes of the pages that take time to read."""
        titles = page_titles(self.env.external_site_map)
        titles = {page: title for page, title in titles.items() if "/solutions/" not in page}
        for source in (self.config.external_toc_path, READING, *(f"{page}.ipynb" for page in titles)):
            self.env.note_dependency(str(ROOT / source))
        return titles, {page: page_minutes(page) for page in titles}

    def read(self, markdown: str) -> list[nodes.Node]:
        return self.parse_text_to_nodes(markdown)


class PathList(FrontPageDirective):
    """`{reading-path} name`: the pages of a path in their order."""

    has_content = False
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        path = next((path for path in PATHS if path.name == self.arguments[0]), None)
        if path is None:
            raise self.error(f"no reading path '{self.arguments[0]}': reading.py has {[path.name for path in PATHS]}")
        return self.read(path_list(path, *self.pages(), self.env.docname))


class PageTable(FrontPageDirective):
    """`{page-table}`: a table of the pages that the lines name, `nbs/09_matcher: what you can do after it`."""

    def run(self) -> list[nodes.Node]:
        rows = [(page, words.strip()) for page, _, words in (line.partition(":") for line in self.content)]
        return self.read(page_table(rows, *self.pages(), self.env.docname))


class WholeTime(FrontPageDirective):
    """`{reading-time}`: a sentence with `TIME` in it, which becomes the time that all pages take together."""

    def run(self) -> list[nodes.Node]:
        return self.read(" ".join(self.content).replace("TIME", in_words(sum(self.pages()[1].values()))))


def forward(app, error) -> None:
    """Lead on from the addresses of pages that moved."""
    if error is None and app.builder.name == "html":
        for old, new in MOVED.items():
            if new in app.env.found_docs and old not in app.env.found_docs:
                goal = f"{relpath(new, dirname(old))}.html"
                place = Path(app.outdir) / f"{old}.html"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>This page has moved</title>
<meta http-equiv="refresh" content="0; url={goal}"><link rel="canonical" href="{goal}"></head>
<body><p>This page has moved: <a href="{goal}">{app.env.titles[new].astext()}</a>.</p></body></html>
''')


# --- names of the library -----------------------------------------------------------------------------------------
@lru_cache(None)
def library_names() -> dict[str, str]:
    """The full name behind every exported name that one module alone exports and that is no everyday word."""
    found: dict[str, list[str]] = {}
    for module in modules():
        for node in parse_cell(module_path(module).read_text("utf8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                for name in ast.literal_eval(node.value):
                    found.setdefault(name, []).append(f"{PACKAGE}.{module}.{name}")
    telling = {name for name in found if "_" in name or name[0].isupper()} | public_names().keys()
    return {name: places[0] for name, places in found.items() if len(places) == 1 and name in telling}


def stands_in(node: nodes.Node, *kinds: type[nodes.Node]) -> bool:
    """Is the node inside of one of these kinds?"""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds):
            return True
    return False


def reference_to(app, kind: str, full: str, shown: nodes.Node) -> addnodes.pending_xref:
    """A link that Sphinx resolves if the reference has the name, and leaves as it is if not."""
    link = addnodes.pending_xref("", refdomain="py", reftype=kind, reftarget=full, refdoc=app.env.docname,
                                 refexplicit=True, refwarn=False)
    link += shown.deepcopy()
    return link


def link_module(app, doctree) -> None:
    """End every chapter with a link to its module in the reference."""
    chapter = chapter_of(app.env.docname)
    sections = list(doctree.findall(nodes.section))
    if chapter and module_path(chapter.module).exists() and sections:
        full = f"{PACKAGE}.{chapter.module}"
        link = reference_to(app, "mod", full, nodes.literal(text=full))
        words = "All names of this chapter, with arguments and returns: "
        sections[-1] += nodes.paragraph("", words, link, nodes.Text("."))


LINKED = (nodes.reference, addnodes.pending_xref, addnodes.desc_signature)  # what is or becomes a link


def link_names(app, doctree) -> None:
    """Make the first mention of each name a reference."""
    seen = set()
    for literal in list(doctree.findall(nodes.literal)):
        full = library_names().get(literal.astext().removesuffix("()"))
        if full is None or full in seen or stands_in(literal, nodes.title, *LINKED):
            continue
        seen.add(full)
        literal.replace_self(reference_to(app, "obj", full, literal))


# --- events -------------------------------------------------------------------------------------------------------
LOGGER = logging.getLogger(__name__)
_progress = {"names": [], "start": 0.0}


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf8")
    return parser["DEFAULT"]


def set_repository(app, config) -> None:
    """Links to the repository and the Colab button, from settings.ini."""
    home = settings()
    config.html_theme_options |= {
        "repository_url": home["git_url"],
        "repository_branch": home["branch"],
        "path_to_docs": "",
        "use_repository_button": True,
        "use_source_button": True,
        "use_issues_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com", "notebook_interface": "classic"},
    }


def skip_fields(app, what, name, obj, skip, options) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class already describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def escape_axes(app, what, name, obj, options, lines) -> None:
    """In the type of a field, an axis such as `*n` is no beginning of emphasis."""
    lines[:] = [line.replace("'*", "'\\*") if line.startswith(":vartype") else line for line in lines]


def plan(app, env, docnames) -> None:
    _progress["names"] = list(docnames)


def note_sources(app, docname, source) -> None:
    """Make the page depend on what its notebook depends on; a build after an edit of the library reads it again."""
    if app.env.doc2path(docname).endswith(".ipynb"):
        for path in (app.config.external_toc_path, READING):  # of its line; nothing is executed for them
            app.env.note_dependency(str(ROOT / path))
        try:
            files = prepare(source[0])[1]
        except ValueError as error:
            raise ValueError(f"{docname}: {error}") from error
        for path in files:
            app.env.note_dependency(str(path))


def say_start(app, docname, source) -> None:
    names = _progress["names"]
    place = names.index(docname) + 1 if docname in names else 0
    _progress["start"] = time.time()
    LOGGER.info(f"[{place:2d}/{len(names)}] {docname} ...", color="blue")


def say_end(app, doctree) -> None:
    docname, seconds = app.env.docname, time.time() - _progress["start"]
    run = (getattr(app.env, "nb_metadata", None) or {}).get(docname, {}).get("exec_data")
    how = ""
    if run:
        fresh = run["mtime"] >= _progress["start"]
        how = f", executed in {run['runtime']:.1f} s" if fresh else ", outputs from the cache"
    LOGGER.info(f"        {docname} done in {seconds:.1f} s{how}", color="blue")


def setup(app):
    NbElementRenderer.render_image = render_image
    app.connect("config-inited", set_repository, priority=100)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", escape_axes, priority=900)  # after the docstrings are rewritten
    app.connect("env-before-read-docs", plan)
    app.connect("source-read", say_start, priority=100)
    app.connect("source-read", note_sources)
    app.add_node(chapter_map)
    app.add_directive("chapter-map", ChapterMap)
    app.connect("doctree-resolved", place_map)
    app.add_node(page_html, html=(write_html, None))
    app.add_node(reading_line)
    app.add_directive("reading-path", PathList)
    app.add_directive("page-table", PageTable)
    app.add_directive("reading-time", WholeTime)
    app.connect("doctree-read", add_line)
    app.connect("doctree-resolved", write_lines)
    app.connect("build-finished", forward)
    app.connect("doctree-read", keep_stills, priority=800)
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", link_module)
    app.connect("doctree-read", say_end, priority=900)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
