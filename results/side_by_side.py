"""What runners of many short trainings share: what is recorded is not run again, and some run side by side."""
import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

from detr_nb.files import json_text, replacing
from detr_nb.measuring import describe_machine

ROOT = Path(__file__).resolve().parents[1]


def one_thread() -> None:
    """What every process does first: runs side by side have a core each."""
    os.chdir(ROOT)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def read_rows(file: Path) -> list[dict]:
    """The rows that are recorded."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def write_rows(rows: Iterable[dict], order: list[str], file: Path, what: str) -> None:
    """Write all rows in the order of their settings; a file that is cut off never takes the place of a whole one."""
    rows = sorted(rows, key=lambda row: order.index(row["name"]))
    record = {"what": what, "command": f"python results/{file.stem}.py", "date": max(row["date"] for row in rows),
              "machine": describe_machine(), "rows": rows}
    with replacing(file) as place:
        place.write(json_text(record, indent=1) + "\n")


def named_row(name: str, make: Callable[[str], dict]) -> dict:
    """Make one row; it bears its name and the day."""
    return {"name": name, "date": time.strftime("%Y-%m-%d"), **make(name)}


def say_ap(row: dict) -> str:
    """A row of a file whose rows have `metrics`, for people."""
    return f"AP {row['metrics']['AP']:.3f}  {row['seconds']:.0f} s"


def run_missing(
    names: list[str], make: Callable[[str], dict], file: Path, what: str, about: str,
    say: Callable[[dict], str] = say_ap,
) -> None:
    """Make the rows that a file lacks, each in a process of its own, and write the file after each.

    Args:
        names: all settings, in the order of the file.
        make: makes the row of a setting; a function of a module, so that processes find it.
        file: where the rows go; the runner has the same name.
        what: one sentence on what is recorded.
        about: the help text.
        say: what is printed of a row.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=names, choices=names, metavar="NAME", help="only these")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and stop")
    args = parser.parse_args()
    one_thread()
    rows = read_rows(file)
    missing = [name for name in args.names if name not in {row["name"] for row in rows}]
    if args.list:
        print("\n".join(f"{'missing' if name in missing else 'recorded':9} {name}" for name in args.names))
        return
    failed = {}
    with ProcessPoolExecutor(args.workers, get_context("spawn"), initializer=one_thread, max_tasks_per_child=1) as pool:
        begun = {pool.submit(named_row, name, make): name for name in missing}
        for done in as_completed(begun):
            if done.exception() is not None:  # the other runs go on, and are recorded
                failed[begun[done]] = done.exception()
                print(f"{begun[done]} failed: {done.exception()!r}", flush=True)
                continue
            rows.append(done.result())
            write_rows(rows, names, file, what)
            print(f"{len(rows):3} of {len(names)}  {rows[-1]['name']:40} {say(rows[-1])}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(missing)} runs failed: {', '.join(failed)}; give the command again")
