"""Notebooks executed side by side: what is stored, what is left to the build."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("execute", ROOT / "tools" / "execute.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def notebook(*sources: str) -> str:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells))


@pytest.mark.parametrize(
    ("sources", "alone"),
    [(("x = 1",), False), (("#| code-fold: true\n#| alone\nx = 1",), True), (("x = 1", "#| alone\ny = 2"), True),
     (("x = 1  # | alone",), False)],
)
def test_a_notebook_says_that_it_wants_to_be_alone(sources, alone):
    assert tool.wants_to_be_alone(notebook(*sources)) is alone


def test_the_notebooks_of_the_book_are_listed_and_some_want_to_be_alone():
    listed = tool.listed()
    assert sorted(listed) == sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_" not in str(path))
    alone = [path.stem for path in listed if tool.wants_to_be_alone(path.read_text("utf8"))]
    assert {"17_bench", "94_measuring", "96_peers", "01_train_on_shapes", "09_performance"} == set(alone)


IN_A_FOLDER = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import execute as tool

tool.ROOT = folder = Path(sys.argv[2])
tool.listed = lambda: [folder / f"{name}.ipynb" for name in sys.argv[3:]]
cache = tool.get_cache(folder / "cache")
tool.execute_all(cache, tool.missing(cache), workers=2)
print("left:", *(path.stem for path in tool.missing(cache)))
good = tool.prepare((folder / "good.ipynb").read_text())[0]
print("kept:", cache.merge_match_into_notebook(good)[1].cells[0].outputs)
"""


@pytest.mark.slow
def test_what_succeeds_is_stored_and_what_fails_is_left_to_the_build(tmp_path):
    texts = {"good": notebook("print(1 + 1)"), "bad": notebook("1 / 0"), "dead": notebook("import os; os._exit(1)"),
             "alone": notebook("#| alone\nprint(3)")}
    for name, text in texts.items():
        (tmp_path / f"{name}.ipynb").write_text(text)
    # In a process of its own: the clients of kernels leave their event loops open.
    command = [sys.executable, "-c", IN_A_FOLDER, ROOT / "tools", tmp_path, *texts]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout
    assert "good.ipynb executed in" in said and "alone" not in said, done.stderr
    assert "bad.ipynb FAILED (CellExecutionError)" in said and "dead.ipynb FAILED (DeadKernelError)" in said
    assert "left: bad dead" in said and "'text': '2\\n'" in said
