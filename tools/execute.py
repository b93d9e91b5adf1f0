"""Execute the notebooks that changed side by side, a core each, into the cache that the book build takes outputs from.

    python tools/execute.py                all that the cache lacks
    python tools/execute.py --workers 1    one after the other

Notebooks that measure time (`#| alone` in one of their cells) are left to the build, which runs one at a time. So is
one that fails here: the build runs it again and says what is wrong.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from detr_nb_book import prepare, split_directives  # noqa: E402
from jupyter_cache import get_cache  # noqa: E402
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract  # noqa: E402
from jupyter_cache.executors.utils import ExecutionResult, single_nb_execution  # noqa: E402
from nbformat import NotebookNode, reads  # noqa: E402

CACHE = ROOT / "book" / "_build" / ".jupyter_cache"
TIMEOUT = yaml.safe_load((ROOT / "book" / "_config.yml").read_text("utf8"))["execute"]["timeout"]


def listed() -> list[Path]:
    """The notebooks of the table of contents, in its order."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text("utf8"))
    files = [ROOT / f"{chapter['file']}.ipynb" for part in toc["parts"] for chapter in part["chapters"]]
    return [file for file in files if file.exists()]


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


def execute(path: Path, notebook: NotebookNode) -> ExecutionResult:
    """Execute one notebook, in place."""
    return single_nb_execution(notebook, cwd=str(path.parent), timeout=TIMEOUT, allow_errors=False)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, min(4, os.cpu_count() or 1)))
    workers = parser.parse_args().workers
    if workers > 1:  # kernels have a core each, and do not spin while they wait for one another
        os.environ |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), "OMP_WAIT_POLICY": "passive"}
    cache = get_cache(CACHE)
    execute_all(cache, missing(cache), workers)


if __name__ == "__main__":
    main()
