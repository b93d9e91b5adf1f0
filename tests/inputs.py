"""What the tests of bad inputs share: where the small folders lie, how a test names its input, strict reading."""

import json
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "data" / "cases"
FED = pytest.StashKey[dict[str, set[str]]]()  # for each file of tests the bad inputs that it feeds


def fault(name: str, *values: object) -> object:
    """A row of a table of bad inputs, under the name that it has in tests/data/faults.json."""
    return pytest.param(*values, marks=pytest.mark.fault(name), id=name)


def strict_json(text: str) -> object:
    """What a reader finds that knows nothing beyond the standard: no NaN, no Infinity, valid UTF-8."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text.encode("utf8"), parse_constant=refuse)


def snapshot(folder: str | Path = ".") -> dict[str, bytes]:
    """Every file in a folder and below, by its path from there, and what it holds."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
