"""Run the notebooks as a reader does, each in a fresh kernel of this Python, and keep what failed.

    python tools/run_notebooks.py                       all of them
    python tools/run_notebooks.py nbs/03_boxes.ipynb    some of them
    python tools/run_notebooks.py --minutes 8           as many as begin within eight minutes; call again for the rest

Each notebook leaves a line in KEEP/done.jsonl as soon as it has ended; a notebook that passed is not run again. One
that failed leaves its executed copy in KEEP too. It wants nbclient and what the notebooks want, nothing of the book's
tools, so it runs where a reader runs them: in Colab's environment, in the oldest one, beside a graphics card.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]


def all_notebooks() -> list[Path]:
    """Chapters, experiments, solutions."""
    return sorted((ROOT / "nbs").rglob("*.ipynb"))


def name_of(path: Path) -> str:
    return path.resolve().relative_to(ROOT).as_posix()


def passed(notes: Path) -> set[str]:
    """The notebooks that have passed already."""
    lines = notes.read_text("utf8").splitlines() if notes.exists() else []
    return {row["notebook"] for row in map(json.loads, filter(is_whole, lines)) if row["error"] is None}


def is_whole(line: str) -> bool:
    """False for a line that was cut off while it was written."""
    return line.startswith("{") and line.endswith("}")


def add_line(row: dict, notes: Path) -> None:
    """Append a line of JSON; a line before it that was cut off stays one of its own."""
    cut_off = notes.exists() and not notes.read_bytes().endswith(b"\n")
    with notes.open("a", encoding="utf8") as file:
        file.write("\n" * cut_off + json.dumps(row) + "\n")


def first_error(notebook: nbformat.NotebookNode) -> str | None:
    """Number and last line of the first cell that failed."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"cell {number}: {output.ename}: {output.evalue}"[:500]
    return None


def run_notebook(path: Path, keep: Path, timeout: float) -> str | None:
    """Execute one notebook where it lies; its error, or None. The file itself stays as it is."""
    notebook = nbformat.read(path, 4)
    place = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=place).execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        nbformat.write(notebook, keep / f"{name_of(path).replace('/', '_')}")
        return first_error(notebook) or f"{type(error).__name__}: {str(error)[-400:]}"
    return None


def machine() -> dict[str, str]:
    """Where this happens."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "ipython")}
    return {"python": platform.python_version(), "graphics card": card, **packages}


def run_all(paths: Iterable[Path], keep: Path, minutes: float, timeout: float) -> list[dict]:
    """Run what has not passed yet, as long as the time lasts; a line of notes for each."""
    keep.mkdir(parents=True, exist_ok=True)
    notes, rows = keep / "done.jsonl", []
    until, there = time.monotonic() + 60 * minutes, passed(notes)
    (keep / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", "utf8")
    for path in [path for path in paths if name_of(path) not in there]:
        begun = time.monotonic()
        if begun > until:
            break
        error = run_notebook(path, keep, min(timeout, until + 60 - begun) if minutes < 1e6 else timeout)
        rows.append({"notebook": name_of(path), "seconds": round(time.monotonic() - begun, 1), "error": error})
        add_line(rows[-1], notes)
        print(f"{rows[-1]['notebook']}: {'passed' if error is None else error} ({rows[-1]['seconds']} s)", flush=True)
    return rows


def main() -> int:
    """The exit code is 0 if all that were asked for have passed by now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--keep", type=Path, default=ROOT / ".cache" / "notebooks", help="for notes and failures")
    parser.add_argument("--minutes", type=float, default=1e6, help="no notebook begins later than this")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a cell may take")
    args = parser.parse_intermixed_args()
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    wanted = args.notebooks or all_notebooks()
    run_all(wanted, args.keep, args.minutes, args.timeout)
    missing = sorted({name_of(path) for path in wanted} - passed(args.keep / "done.jsonl"))
    print(f"{len(wanted) - len(missing)} of {len(wanted)} notebooks have passed")
    if missing:
        print("not yet: " + ", ".join(missing) + f"; what failed lies in {args.keep}")
    return bool(missing)


if __name__ == "__main__":
    raise SystemExit(main())
