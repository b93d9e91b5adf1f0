"""Try the project where readers have other versions: in Colab's environment, or with the oldest packages it allows.

    python tools/environments.py colab      the first cell, then all notebooks
    python tools/environments.py oldest     all notebooks, then the tests
    python tools/environments.py colab nbs/03_boxes.ipynb ...    some notebooks only

Each environment is a folder of its own (.venv-colab, .venv-oldest), made the first time: several gigabytes and some
minutes, an hour with all notebooks. Neither belongs to `make test`. Colab's versions stand in tools/colab.txt, the
oldest in tools/oldest.txt. Colab has Python 3.13; where there is none, the Python that runs this is taken, and
`--python PATH` names another.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = "https://github.com/detr-nb/detr_nb"
BEFORE = ["pip", "setuptools", "nbclient", "nbformat", "ipython", "ipykernel", "ipywidgets"]
TESTED = ["pytest", "hypothesis", "beartype", "tensorboard"]  # what the tests cannot do without
LEFT_OUT = ["test_project", "test_packages", "test_book", "test_book_extension", "test_chapter_map", "test_pages",
            "test_pdf", "test_explorables", "test_execute", "test_reading"]  # they want the tools of the book


def constraints(name: str) -> Path:
    return ROOT / "tools" / f"{name}.txt"


def pinned(file: Path) -> list[str]:
    """The packages that a list of versions names."""
    return [line.split("==")[0] for line in file.read_text("utf8").splitlines() if re.match(r"\w.*==", line)]


def find_python(name: str) -> str:
    """Colab's own version of Python if this machine has one that runs, else this one."""
    wanted = shutil.which("python3.13") if name == "colab" else None
    runs = wanted and subprocess.run([wanted, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    return wanted if runs else sys.executable


def run(*words: object, **options: object) -> None:
    print("+", *words, flush=True)
    subprocess.run([str(word) for word in words], check=True, **options)


def make_environment(name: str, base: str | None) -> Path:
    """The Python of an environment with the listed versions, before our project is in it."""
    place, listed = ROOT / f".venv-{name}", constraints(name)
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        run(base or find_python(name), "-m", "venv", "--clear", place)
        wanted = sorted({*pinned(listed), *BEFORE})
        run(python, "-m", "pip", "install", "--quiet", "--prefer-binary", "-c", listed, *wanted)
        (place / ".ready").touch()
    return python


def copy_tree(place: Path) -> None:
    """The tree as it is, as a repository that git can clone."""
    shutil.rmtree(place, ignore_errors=True)
    kept = subprocess.run(["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "-z"], capture_output=True,
                          text=True, check=True).stdout.split("\0")
    for name in filter(None, kept):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    git = ["git", "-c", "user.name=tree", "-c", "user.email=tree@localhost", "-C", place]
    for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "the tree"]):
        run(*git, *words)


FIRST = """
from IPython.core.interactiveshell import InteractiveShell

InteractiveShell.instance().run_cell({cell!r}).raise_error()
"""


def first_cell(python: Path, tree: Path, content: Path) -> Path:
    """Run the published first cell, word by word, in an empty folder; git finds its address in our tree."""
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir(parents=True)
    cells = json.loads((tree / "nbs" / "00_notation.ipynb").read_text("utf8"))["cells"]
    cell = next("".join(cell["source"]) for cell in cells if "!git clone" in "".join(cell["source"]))
    address = {"GIT_CONFIG_KEY_0": f"url.{tree.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": HOME}
    where = {"PATH": f"{python.parent}:{os.environ['PATH']}", "GIT_CONFIG_COUNT": "1", **address}
    run(python, "-c", FIRST.format(cell=cell), cwd=content, env={**os.environ, **where})
    return content / "detr_nb"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("colab", "oldest"))
    parser.add_argument("notebooks", nargs="*", help="addresses from the root; all if none is named")
    parser.add_argument("--python", help="the Python to make the environment with")
    args = parser.parse_intermixed_args()
    work = ROOT / ".cache" / args.name
    python = make_environment(args.name, args.python)
    copy_tree(tree := work / "tree")
    if args.name == "colab":
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "detr-nb")
        tree = first_cell(python, tree, work / "content")
    else:
        run(python, "-m", "pip", "install", "--quiet", "-c", constraints(args.name), f"{tree}[book]", *TESTED)
    # the notebooks shall use the library that was installed, whatever the caller's own path says
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PATH"] = f"{python.parent}:{clean['PATH']}"
    notebooks = [tree / name for name in args.notebooks]
    ended = [subprocess.run([python, tree / "tools" / "run_notebooks.py", *notebooks], cwd=tree, env=clean).returncode]
    if args.name == "oldest" and not notebooks:
        ignored = [f"--ignore=tests/{name}.py" for name in LEFT_OUT]
        words = [python, "-m", "pytest", "-q", "-m", "not slow", *ignored]
        ended.append(subprocess.run(words, cwd=tree, env=clean).returncode)
    raise SystemExit(max(ended))


if __name__ == "__main__":
    main()
