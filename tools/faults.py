"""How many of the known bad inputs are handled as a user would wish?

    python tools/faults.py              run every test that is marked with a bad input, and count
    python tools/faults.py --missing    name the inputs that no test feeds, too

The exit code is 1 if an input is handled wrongly, or has no test, or is not in the list.
tests/data/faults.json lists the inputs that were once tried on the whole product, with what a user expects; the
folders of tests/data/cases are inputs, too. A test says by `@pytest.mark.fault("...")` which of them it feeds.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]


def outcomes() -> dict[str, set[str]]:
    """How the tests of each input ended."""
    with TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.jsonl"
        words = ["-m", "pytest", "-q", "-m", "fault", "--faults", str(notes), "-p", "no:cacheprovider", "-n", "0"]
        subprocess.run([sys.executable, *words], cwd=ROOT)
        found: dict[str, set[str]] = {}
        for row in map(json.loads, notes.read_text("utf8").splitlines()):
            found.setdefault(row["input"], set()).add(row["outcome"])
        return found


def known_inputs() -> dict[str, dict[str, str]]:
    """Every input of the list, by its name."""
    rows = json.loads((ROOT / "tests" / "data" / "faults.json").read_text("utf8"))
    return {row["input"]: row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="name the inputs without a test")
    args = parser.parse_args()
    known, found = known_inputs(), outcomes()
    counts: dict[str, Counter] = {row["table"]: Counter() for row in known.values()}
    for name, row in known.items():
        ended = found.get(name, set())
        state = "no test" if not ended else "right" if ended == {"passed"} else "wrong"
        counts[row["table"]][state] += 1
        if state == "wrong" or (args.missing and state == "no test"):
            print(f"{state}: {name}" + (f" (expected: {row['expected']})" if row["expected"] else ""))
    for table, count in counts.items():
        print(f"{table}: " + ", ".join(f"{number} {state}" for state, number in count.most_common()))
    print(f"in all {sum(count['right'] for count in counts.values())} of {len(known)} inputs behave")
    unlisted = sorted(found.keys() - known.keys())
    for name in unlisted:
        print(f"not in the list: {name}")
    return int(bool(unlisted) or any(count["wrong"] or count["no test"] for count in counts.values()))


if __name__ == "__main__":
    raise SystemExit(main())
