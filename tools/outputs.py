"""Write outputs into the notebooks in the form that GitHub shows: no machine's paths, no widget state, no time stamps.

    python tools/outputs.py                     every notebook, with the outputs of the last book build (`make book`)
    python tools/outputs.py nbs/03_boxes.ipynb  these only
    python tools/outputs.py --execute NOTEBOOK  execute it here instead of taking what the book build left
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from detr_nb_book import WIDGET, prepare  # noqa: E402

CACHE = ROOT / "book" / "_build" / ".jupyter_cache"
WIDGET_TEXT = "An interactive figure: see it in the book, or run this cell."
METADATA = {
    "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def clean_text(text: str) -> str:
    """Text of an output without what belongs to one machine: paths, addresses in memory, overwritten progress lines."""
    text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    temporary = re.escape(os.path.realpath(tempfile.gettempdir()))
    text = re.sub(temporary + r"/ipykernel_\d+/\d+\.py", "<cell>", text)
    data = Path(os.environ.get("DETR_NB_DATA", "/"))
    for folder, name in (
        (data, "$DETR_NB_DATA"),
        (ROOT, "."),
        (Path(sys.base_prefix), "<python>"),
        (Path.home(), "~"),
    ):
        if len(folder.parts) > 1:
            text = text.replace(str(folder), name)
    text = re.sub(temporary + r"(/tmp\w{8})?(?=/)", "<temporary>", text)
    return re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)


def clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    if output.output_type == "stream":
        output.text = clean_text(output.text)
    elif output.output_type in ("display_data", "execute_result"):
        if WIDGET in output.data:
            stills = {kind: value for kind, value in output.data.items() if kind.startswith("image/")}
            output.data = nbformat.from_dict(stills or {"text/plain": WIDGET_TEXT})
        for kind, value in output.data.items():
            if isinstance(value, str) and (kind.startswith("text/") or kind.endswith("+xml")):
                output.data[kind] = clean_text(value)
    elif output.output_type == "error":
        output.evalue, output.traceback = clean_text(output.evalue), [clean_text(line) for line in output.traceback]
    if "execution_count" in output:
        output.execution_count = None
    return output


def execute(prepared: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    from nbclient import NotebookClient

    NotebookClient(prepared, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return prepared


def last_build(prepared: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The notebook as a book build executed it; None if it or what it depends on was edited since."""
    from jupyter_cache import get_cache

    try:
        return get_cache(CACHE).merge_match_into_notebook(prepared)[1]
    except KeyError:
        return None


def write_outputs(path: Path, run_here: bool) -> str:
    """Bring one notebook's outputs up to date; says in a word what was done."""
    text = path.read_text("utf8")
    notebook, prepared = nbformat.reads(text, as_version=4), prepare(text)[0]
    executed = execute(prepared, path.parent) if run_here else last_build(prepared)
    if executed is None:
        return "MISSING: the book was not built since it was edited"
    for cell, done in zip(notebook.cells, executed.cells, strict=True):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [clean_output(output) for output in done.get("outputs", [])]
            cell.execution_count = None
    notebook.metadata = nbformat.from_dict(METADATA)
    new = nbformat.writes(notebook, indent=1) + "\n"
    if new == text:
        return "unchanged"
    path.write_text(new, encoding="utf8")
    return f"written, {len(new) / 1e3:.0f} kB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--execute", action="store_true", help="execute here instead of using the last book build")
    args = parser.parse_args()
    chosen = [path.resolve() for path in args.notebooks] or sorted((ROOT / "nbs").rglob("*.ipynb"))
    missing = 0
    for path in chosen:
        if ".ipynb_checkpoints" in path.parts:
            continue
        result = write_outputs(path, args.execute)
        missing += result.startswith("MISSING")
        print(f"{path.relative_to(ROOT)}: {result}", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
