"""The built book: where it is, and which pages it lists."""

import os
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "book" / "_build" / "html"


def listed() -> list[str]:
    """Every page of the table of contents, in its order."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text("utf8"))
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def need(present, reason: str) -> None:
    """Skip for a reader, fail where everything should be at hand."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
