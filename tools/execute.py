"""Execute the notebooks that changed side by side, a core each, into the cache that the book build takes outputs from.

    python tools/execute.py                all that the cache lacks, the longest first
    python tools/execute.py --workers 1    one after the other
    python tools/execute.py --table        say which took longest in the last build
    python tools/execute.py --note         write what each took into tools/seconds.json, which decides the order

Notebooks that measure time (`#| alone` in one of their cells) are left to the build, which runs one at a time. So is
one that fails here: the build runs it again and says what is wrong.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "book" / "_ext"), str(ROOT / "tools")]
from detr_nb_book import prepare  # noqa: E402
from directives import split_directives  # noqa: E402
from forked import ForkedKernels, load_once  # noqa: E402
from jupyter_cache import get_cache  # noqa: E402
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract  # noqa: E402
from jupyter_cache.executors.utils import ExecutionResult, single_nb_execution  # noqa: E402
from nbformat import NotebookNode, reads  # noqa: E402

CACHE = ROOT / "book" / "_build" / ".jupyter_cache"
SECONDS = ROOT / "tools" / "seconds.json"
TIMEOUT = yaml.safe_load((ROOT / "book" / "_config.yml").read_text("utf8"))["execute"]["timeout"]


def listed() -> list[Path]:
    """The notebooks of the table of contents, in its order."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text("utf8"))
    files = [ROOT / f"{chapter['file']}.ipynb" for part in toc["parts"] for chapter in part["chapters"]]
    return [file for file in files if file.exists()]


def name_of(path: Path) -> str:
    """As the table of contents calls it."""
    return path.with_suffix("").relative_to(ROOT).as_posix()


def wants_to_be_alone(text: str) -> bool:
    """Does one of the cells say `#| alone`?"""
    cells = [cell.source for cell in reads(text, as_version=4).cells if cell.cell_type == "code"]
    return any(("alone", "") in split_directives(source)[0] for source in cells)


def is_cached(cache: JupyterCacheAbstract, notebook: NotebookNode) -> bool:
    try:
        cache.match_cache_notebook(notebook)
    except KeyError:
        return False
    return True


def missing(cache: JupyterCacheAbstract) -> dict[Path, NotebookNode]:
    """The notebooks to execute, as the book executes them."""
    texts = {path: path.read_text("utf8") for path in listed()}
    prepared = {path: prepare(text)[0] for path, text in texts.items() if not wants_to_be_alone(text)}
    return {path: notebook for path, notebook in prepared.items() if not is_cached(cache, notebook)}


def longest_first(notebooks: dict[Path, NotebookNode]) -> dict[Path, NotebookNode]:
    """In the order of what each took once; new ones may be long, so they come first."""
    noted = json.loads(SECONDS.read_text("utf8"))
    return dict(sorted(notebooks.items(), key=lambda item: -noted.get(name_of(item[0]), float("inf"))))


def taken(cache: JupyterCacheAbstract) -> dict[str, float]:
    """The seconds that each notebook took when it was executed last, the longest first."""
    found = {}
    for record in sorted(cache.list_cache_records(), key=lambda record: record.created):
        found[name_of(Path(record.uri))] = record.data["execution_seconds"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def say_taken(cache: JupyterCacheAbstract, count: int = 10) -> None:
    seconds = taken(cache)
    print(f"\nslowest {count} of {len(seconds)} notebooks, {sum(seconds.values()):.0f} s in all")
    for name, one in list(seconds.items())[:count]:
        print(f"{one:7.1f} s  {name}")


def note_taken(cache: JupyterCacheAbstract) -> None:
    """Write whole seconds, in the order of the book."""
    seconds = taken(cache)
    rounded = {name: round(seconds[name]) for name in map(name_of, listed()) if name in seconds}
    SECONDS.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf8")


def execute(path: Path, notebook: NotebookNode) -> ExecutionResult:
    """Execute one notebook, in place."""
    return single_nb_execution(notebook, cwd=str(path.parent), timeout=TIMEOUT, allow_errors=False,
                               kernel_manager_class=ForkedKernels)


def execute_all(cache: JupyterCacheAbstract, notebooks: dict[Path, NotebookNode], workers: int) -> None:
    """Execute side by side, and store each as soon as it is done."""
    with ThreadPoolExecutor(workers) as pool:
        runs = {pool.submit(execute, path, notebook): path for path, notebook in notebooks.items()}
        for number, run in enumerate(as_completed(runs), 1):
            path, error = runs[run], run.exception() or run.result().err
            said = f"FAILED ({type(error).__name__}), the build will say why"
            if error is None:
                result = run.result()
                bundle = CacheBundleIn(result.nb, str(path), data={"execution_seconds": result.time})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
                said = f"executed in {result.time:.1f} s"
            print(f"[{number:2}/{len(notebooks)}] {path.relative_to(ROOT)} {said}", flush=True)


def execute_missing(cache: JupyterCacheAbstract, workers: int) -> None:
    """Execute what the cache lacks, each kernel with its share of the cores."""
    if workers > 1:  # kernels have a core each, and do not spin while they wait for one another
        os.environ |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), "OMP_WAIT_POLICY": "passive"}
    load_once()
    execute_all(cache, longest_first(missing(cache)), workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, min(4, os.cpu_count() or 1)))
    parser.add_argument("--table", action="store_true", help="say which took longest, execute nothing")
    parser.add_argument("--note", action="store_true", help="write tools/seconds.json, execute nothing")
    args, cache = parser.parse_args(), get_cache(CACHE)
    if args.table or args.note:
        (say_taken if args.table else note_taken)(cache)
    else:
        execute_missing(cache, args.workers)


if __name__ == "__main__":
    main()
