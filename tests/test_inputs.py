"""The list of known bad inputs and the marks of the tests agree; who counts them tells of a gap."""

import importlib.util
import json
from pathlib import Path

import pytest
from inputs import CASES, FED

TESTS = Path(__file__).parent
ROWS = json.loads((TESTS / "data" / "faults.json").read_text("utf8"))
LISTED = {row["input"] for row in ROWS}


def test_the_list_names_each_input_once_and_says_what_is_expected():
    assert len(LISTED) == len(ROWS) > 200 and all(row["table"] for row in ROWS)
    assert {folder.name for folder in CASES.iterdir() if "clean" not in folder.name} <= LISTED


def test_marks_are_those_of_the_list(pytestconfig):
    fed = pytestconfig.stash[FED]
    assert {name: sorted(marks - LISTED) for name, marks in fed.items() if marks - LISTED} == {}
    feeding = {path.name for path in TESTS.glob("test_*.py") if "fault(" in path.read_text("utf8")}
    if not feeding <= fed.keys():
        pytest.skip(f"{len(feeding - fed.keys())} files of tests were not collected")
    assert sorted(LISTED - set().union(*fed.values())) == []


def test_no_mark_is_set_too_late_to_be_chosen():
    late = "add" + "_marker"  # after the tests were collected, so `-m fault` leaves the test out
    assert [path.name for path in TESTS.glob("*.py") if late in path.read_text("utf8")] == []


@pytest.fixture
def tool(monkeypatch):
    """tools/faults.py, as a module, with three inputs known."""
    spec = importlib.util.spec_from_file_location("faults", TESTS.parent / "tools" / "faults.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setattr(made, "known_inputs", lambda: {name: {"table": "t", "expected": ""} for name in "abc"})
    monkeypatch.setattr("sys.argv", ["faults.py"])
    return made


RIGHT = {name: {"passed"} for name in "abc"}


@pytest.mark.parametrize(("outcomes", "code", "said"), [
    (RIGHT, 0, "in all 3 of 3 inputs behave"),
    ({**RIGHT, "b": {"passed", "failed"}}, 1, "wrong: b"),
    ({**RIGHT, "b": {"skipped"}}, 1, "wrong: b"),
    ({"a": {"passed"}, "c": {"passed"}}, 1, "1 no test"),
    ({**RIGHT, "d": {"passed"}}, 1, "not in the list: d"),
])  # fmt: skip
def test_who_counts_tells_by_the_exit_code(outcomes, code, said, tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "outcomes", lambda: outcomes)
    assert tool.main() == code and said in capsys.readouterr().out
