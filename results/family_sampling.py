"""Record the members that sample, for as many steps as fit into DETR's ten minutes: two seeds, one core a run.

    python results/family_sampling.py               all that is missing: three quarters of an hour of two cores
    python results/family_sampling.py --names "DINO, seed 0"
    python results/family_sampling.py --list

They stand beside DETR's 4,000 steps in results/family_race.py, and get fewer, so that all take the same time by the
costs of a step in results/run_costs.json. Steps are fixed, so that another program only slows a run. Two levels: the
grid of 16 x 16 cells that DETR has, and one of 8 x 8. Sizes and recipe are those of DETR for all, and nobody is tuned.
"""
from functools import partial

from family_race import CACHE, SIZES, train_noting_matches
from side_by_side import ROOT, run_missing

from detr_nb.config import find_kind
from detr_nb.loading import ShapesData
from detr_nb.model import DETRConfig
from detr_nb.shapes import DEFAULT
from detr_nb.training import TrainConfig

WHAT = "the members that sample, on the default setting, for as many steps as fit into DETR's ten minutes"
LEVELS = {"num_feature_levels": 2, "num_backbone_outs": 1}
REFINED = LEVELS | {"with_box_refine": True}
FEW_COPIES = REFINED | {"dn_number": 2}  # four groups
MODELS = {
    "DeformableDETR": (find_kind("DeformableDETR", DETRConfig)(**SIZES, **REFINED), 2800),
    "DINO": (find_kind("DINO", DETRConfig)(**SIZES, **FEW_COPIES), 1600),
    "TwoStageDETR": (find_kind("TwoStageDETR", DETRConfig)(**SIZES, **REFINED), 2500),
}
NAMES = [f"{name}, seed {seed}" for seed in (0, 1) for name in MODELS]


def planned(name: str) -> TrainConfig:
    """The run of a name."""
    what, seed = name.rsplit(", seed ", 1)
    model, steps = MODELS[what]
    return TrainConfig(
        ShapesData(DEFAULT, cache=str(CACHE / "scenes")), model, steps=steps, seed=int(seed), evaluations=6, bf16=True,
        progress=False, folder=str(CACHE / "runs" / f"sampling_{what}_seed{seed}"),
    )


if __name__ == "__main__":
    make = partial(train_noting_matches, planned=planned, what=WHAT, runner="family_sampling")
    run_missing(NAMES, make, ROOT / "results" / "family_sampling.json", WHAT, __doc__)
