"""Record DETR beside its descendants on the book's default setting: two seeds each, two cores, the same recipe for all.

    python results/family_race.py               all that is missing, the most wanted first: about two hours
    python results/family_race.py --names "DNDETR, seed 0"
    python results/family_race.py --list
    python results/family_race.py --steps 20    a trial, kept under .cache/

DETR trains for ten minutes. Every descendant, and DETR once more, gets a whole schedule of 60 per cent of the steps
that DETR of the same seed had made by then. Nobody is tuned: all have the sizes of `detr_tiny` and the recipe of
chapter 12, which was found with DETR; class loss and class cost are those of each member's authors. DETR and DNDETR,
whose minutes are compared, have both cores, one run after the other; the others run two at a time, one core each, and
only their steps count. At every evaluation it is also noted which query each held-out object is matched to. A run that
was cut goes on when the command is given again. Nothing else should run beside it.
"""
import argparse
import json
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from side_by_side import ROOT, named_row, one_thread, read_rows, say_ap, write_rows

from detr_nb.config import find_kind
from detr_nb.insight import matched_queries, predict_layers
from detr_nb.loading import MemoryDataset, ShapesData
from detr_nb.losses import criterion_for
from detr_nb.model import TINY, TINY_STRIDES, DETRConfig, TinyConfig
from detr_nb.runs import Run, describe_run
from detr_nb.shapes import DEFAULT
from detr_nb.training import TrainConfig, fit

FILE, CACHE = ROOT / "results" / "family_race.json", Path(".cache")
WHAT = "DETR for ten minutes, and its descendants for 60 per cent of its steps, on the default setting"
SHARE, MINUTES, SEEDS = 0.6, 10, (0, 1)
SIZES = {"backbone": TinyConfig((32, 64, 128), TINY_STRIDES), "num_queries": 16, **TINY}
MODELS = {
    "DETR": DETRConfig(**SIZES),
    "DNDETR": find_kind("DNDETR", DETRConfig)(**SIZES),
    "DETR, 60 %": DETRConfig(**SIZES),
    "DABDETR": find_kind("DABDETR", DETRConfig)(**SIZES),
    "FocalDETR": find_kind("FocalDETR", DETRConfig)(**SIZES),
    "ConditionalDETR": find_kind("ConditionalDETR", DETRConfig)(**SIZES),
    "AnchorDETR": find_kind("AnchorDETR", DETRConfig)(**SIZES, num_query_pattern=1),
    "SMCADETR": find_kind("SMCADETR", DETRConfig)(**SIZES),
}
FIRST = [f"{name}, seed {seed}" for seed in SEEDS for name in ("DETR", "DNDETR")]
NAMES = FIRST + [f"{name}, seed {seed}" for name in MODELS for seed in SEEDS if f"{name}, seed {seed}" not in FIRST]


def planned(name: str, rows: Mapping[str, dict], steps: int | None) -> TrainConfig:
    """The run of a name; that of a descendant is as long as DETR's of the same seed allows.

    Raises:
        ValueError: if DETR of this seed has not run yet.
    """
    what, seed = name.rsplit(", seed ", 1)
    config = TrainConfig(
        ShapesData(DEFAULT, cache=str(CACHE / "scenes")), MODELS[what], seed=int(seed), evaluations=6,
        bf16=True, progress=False,
        folder=str(CACHE / "runs" / f"race_{what.replace(', 60 %', '_60')}_seed{seed}{f'_{steps}' if steps else ''}"),
    )
    if steps:
        return replace(config, steps=steps)
    if what == "DETR":
        return replace(config, minutes=MINUTES)
    first = f"DETR, seed {seed}"
    if first not in rows:
        raise ValueError(f"{name} is as long as {first} says, which is not recorded yet: run that first")
    return replace(config, steps=round(SHARE * rows[first]["steps"]))


def note_matches(run: Run, data: MemoryDataset, file: Path) -> None:
    """After an evaluation, add to a file which query each held-out object is matched to."""
    if "metrics" in run.history[-1]:
        out, targets = predict_layers(run.shown, data)
        matched = matched_queries(out, targets, criterion_for(run.shown).matcher)[-1]
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {str(run.step): matched.tolist()}))


def changed_shares(file: Path) -> list[dict[str, float]]:
    """From each evaluation to the next, the share of objects that changed their query."""
    known = {int(step): torch.tensor(queries) for step, queries in json.loads(file.read_text()).items()}
    steps = sorted(known)
    return [{"from": before, "to": after, "changed": round(float((known[before] != known[after]).float().mean()), 4)}
            for before, after in zip(steps, steps[1:], strict=False)]


def make(name: str, config: TrainConfig) -> dict[str, object]:
    """Train, and return the row."""
    file = Path(config.folder) / "matches.json"
    run = fit(config, partial(note_matches, data=config.data.held_out(), file=file))
    row = describe_run(run, WHAT, f'python results/family_race.py --names "{name}"')
    return row | {"threads": torch.get_num_threads(), "matches": changed_shares(file)}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=NAMES, choices=NAMES, metavar="NAME", help="only these")
    parser.add_argument("--steps", type=int, help="of each run; a trial")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and stop")
    args = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_flush_denormal(True)
    file = CACHE / f"family_race_{args.steps}.json" if args.steps else FILE
    rows = {row["name"]: row for row in read_rows(file)}
    if args.list:
        print("\n".join(f"{'recorded' if name in rows else 'missing':9} {name}" for name in args.names))
        return

    def keep(row: dict[str, object]) -> None:
        rows[row["name"]] = row
        write_rows(rows.values(), NAMES, file, WHAT)
        print(f"{len(rows):3} of {len(NAMES)}  {row['name']:24} {say_ap(row)}", flush=True)

    missing = [name for name in args.names if name not in rows]
    for name in missing:
        if name in FIRST:
            keep(named_row(name, partial(make, config=planned(name, rows, args.steps))))
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=one_thread, max_tasks_per_child=1) as pool:
        rest = [name for name in missing if name not in FIRST]
        for done in as_completed([
            pool.submit(named_row, name, partial(make, config=planned(name, rows, args.steps))) for name in rest
        ]):
            keep(done.result())


if __name__ == "__main__":
    main()
