"""Record DETR beside its descendants on the default setting: two seeds each, one core each, the same recipe for all.

    python results/family_race.py               all that is missing, the most wanted first: about two hours of two cores
    python results/family_race.py --names "DNDETR, seed 0"
    python results/family_race.py --list

DETR trains for 4,000 steps, which is what ten undisturbed minutes of two cores gave in results/shapes_default_10min_*.
Every descendant, and DETR once more, gets a whole schedule of 60 per cent of these steps. Steps are fixed, so that two
runs can go side by side and another program only slows them. Nobody is tuned: all have the sizes of `detr_tiny` and the
recipe of chapter 12, which was found with DETR; class loss and class cost are those of each member's authors. At every
evaluation it is also noted which query each held-out object is matched to. A run that was cut goes on when the command
is given again.
"""
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from side_by_side import ROOT, run_missing

from detr_nb.config import find_kind
from detr_nb.insight import matched_queries, predict_layers
from detr_nb.loading import MemoryDataset, ShapesData
from detr_nb.losses import criterion_for
from detr_nb.model import TINY, TINY_STRIDES, DETRConfig, TinyConfig
from detr_nb.runs import Run, describe_run
from detr_nb.shapes import DEFAULT
from detr_nb.training import TrainConfig, fit

CACHE = Path(".cache")
WHAT = "DETR for the steps of ten minutes, and its descendants for 60 per cent of them, on the default setting"
STEPS, SHARE, SEEDS = 4000, 0.6, (0, 1)
SIZES = {"backbone": TinyConfig((32, 64, 128), TINY_STRIDES), "num_queries": 16, **TINY}
MODELS = {
    "DETR": DETRConfig(**SIZES),
    "DNDETR": find_kind("DNDETR", DETRConfig)(**SIZES),
    "DETR, 60 %": DETRConfig(**SIZES),
    "DABDETR": find_kind("DABDETR", DETRConfig)(**SIZES),
    "ConditionalDETR": find_kind("ConditionalDETR", DETRConfig)(**SIZES),
    "FocalDETR": find_kind("FocalDETR", DETRConfig)(**SIZES),
    "AnchorDETR": find_kind("AnchorDETR", DETRConfig)(**SIZES, num_query_pattern=1),
    "SMCADETR": find_kind("SMCADETR", DETRConfig)(**SIZES),
}
NAMES = [f"{name}, seed {seed}" for name in MODELS for seed in SEEDS]


def planned(name: str) -> TrainConfig:
    """The run of a name."""
    what, seed = name.rsplit(", seed ", 1)
    return TrainConfig(
        ShapesData(DEFAULT, cache=str(CACHE / "scenes")), MODELS[what],
        steps=STEPS if what == "DETR" else round(SHARE * STEPS),
        seed=int(seed), evaluations=6, bf16=True, progress=False,
        folder=str(CACHE / "runs" / f"race_{what.replace(', 60 %', '_60')}_seed{seed}"),
    )


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


def train_noting_matches(name: str, planned: Callable[[str], TrainConfig], what: str, runner: str) -> dict[str, object]:
    """Train the planned run of a name, and return the row."""
    config = planned(name)
    file = Path(config.folder) / "matches.json"
    run = fit(config, partial(note_matches, data=config.data.held_out(), file=file))
    row = describe_run(run, what, f'python results/{runner}.py --names "{name}"')
    return row | {"matches": changed_shares(file)}


if __name__ == "__main__":
    make = partial(train_noting_matches, planned=planned, what=WHAT, runner="family_race")
    run_missing(NAMES, make, ROOT / "results" / "family_race.json", WHAT, __doc__)
