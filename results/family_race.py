"""Record DETR beside its descendants on the book's default setting: two seeds each, two cores, the same recipe for all.

    python results/family_race.py               all that is missing, the most wanted first: about two hours
    python results/family_race.py --names "DNDETR, seed 0"
    python results/family_race.py --list
    python results/family_race.py --steps 20    a trial, kept under .cache/

DETR trains for ten minutes. Every descendant, and DETR once more, gets a whole schedule of 60 per cent of the steps
that DETR of the same seed had made by then. Nobody is tuned: all have the sizes of `detr_tiny` and the recipe of
chapter 12, which was found with DETR; class loss and class cost are those of each member's authors. A run that was cut
goes on when the command is given again. Nothing else should run beside it.
"""
import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from side_by_side import ROOT, named_row, read_rows, say_ap, write_rows

from detr_nb.config import find_kind
from detr_nb.loading import ShapesData
from detr_nb.model import TINY, TINY_STRIDES, DETRConfig, TinyConfig
from detr_nb.runs import describe_run
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
FIRST = ("DETR", "DNDETR", "DETR, 60 %")
NAMES = [f"{name}, seed {seed}" for part in (FIRST, MODELS.keys() - FIRST) for seed in SEEDS for name in MODELS
         if name in part]


def planned(name: str, rows: Mapping[str, dict], steps: int | None) -> TrainConfig:
    """The run of a name; that of a descendant is as long as DETR's of the same seed allows.

    Raises:
        ValueError: if DETR of this seed has not run yet.
    """
    what, seed = name.rsplit(", seed ", 1)
    config = TrainConfig(
        ShapesData(DEFAULT, cache=str(CACHE / "scenes")), MODELS[what], seed=int(seed), evaluations=8, bf16=True,
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


def make(name: str, config: TrainConfig) -> dict[str, object]:
    """Train, and return the row."""
    return describe_run(fit(config), WHAT, f'python results/family_race.py --names "{name}"')


def main() -> None:
    """Make what is missing, one run after the other."""
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
    for name in args.names:
        if name not in rows:
            rows[name] = named_row(name, partial(make, config=planned(name, rows, args.steps)))
            write_rows(rows.values(), NAMES, file, WHAT)
            print(f"{len(rows):3} of {len(NAMES)}  {name:24} {say_ap(rows[name])}", flush=True)


if __name__ == "__main__":
    main()
