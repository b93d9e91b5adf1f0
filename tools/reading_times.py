"""Print how long the pages of the book take to read, and its reading paths: the numbers that the book shows.

    python tools/reading_times.py
"""

import sys
from pathlib import Path

from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from reading import PATHS, in_words, listed_pages, read_amount  # noqa: E402


def main() -> None:
    pages = [page for page in parse_toc_yaml(ROOT / "book" / "_toc.yml") if page.startswith("nbs/")]
    amounts = {page: read_amount(ROOT / f"{page}.ipynb") for page in pages}
    print("words lines formulas minutes  page")
    for page, amount in amounts.items():
        print(f"{amount.words:5} {amount.lines:5} {amount.formulas:8} {amount.minutes:7}  {page}")
    for path in PATHS:
        on_it = listed_pages(path, amounts)
        print(f"{path.name}: {len(on_it)} pages, {in_words(sum(amounts[page].minutes for page in on_it))}")
    whole = sum(amount.minutes for page, amount in amounts.items() if "/solutions/" not in page)
    print(f"all pages but the solutions: {in_words(whole)}")


if __name__ == "__main__":
    main()
