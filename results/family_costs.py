"""Measure what a training step of each descendant costs beside DETR's, with nothing else running: three minutes.

    python results/family_costs.py              writes results/family_costs.json
    python results/family_costs.py --rounds 2   a trial, which writes nothing

All have the sizes of `detr_tiny` and learn from the same batch of drawn scenes. A round takes a step of each, in turn,
on one core, so that whatever else slows the machine slows all of them. Anchor DETR asks each point with one pattern, so
that the number of queries is the same.
"""
import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from side_by_side import one_thread
from torch import Tensor

from detr_nb.cache import render_scenes
from detr_nb.config import find_kind
from detr_nb.data import normalise
from detr_nb.files import json_text, replacing
from detr_nb.losses import criterion_for
from detr_nb.measuring import describe_machine, interleaved, rows_of, table
from detr_nb.model import DETR, TINY, TINY_STRIDES, DETRConfig, TinyConfig
from detr_nb.notation import Target
from detr_nb.shapes import DEFAULT, Scenes

FILE = Path(__file__).resolve().with_suffix(".json")
WHAT = "seconds of a training step of DETR and its descendants at equal sizes, and their parameters"
SIZES = {"backbone": TinyConfig((32, 64, 128), TINY_STRIDES), "num_queries": 16, **TINY}
OWN = {"DETRConfig": {}, "FocalDETR": {}, "ConditionalDETR": {}, "AnchorDETR": {"num_query_pattern": 1}, "DABDETR": {},
       "SMCADETR": {}, "DNDETR": {}}
BATCH = 16


def one_step(model: DETR, images: Tensor, targets: list[Target]) -> Callable[[], None]:
    """What takes a step: forward, loss, backward, AdamW."""
    criterion, optimizer = criterion_for(model), torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        criterion.total(criterion(model(images, targets=targets), targets)).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="a trial of so many rounds")
    rounds = parser.parse_args().rounds
    one_thread()
    torch.manual_seed(0)
    scenes = Scenes(DEFAULT, BATCH, seed=0)
    pixels, targets = render_scenes(scenes, workers=1)
    images = normalise(pixels)
    models = {name: find_kind(name, DETRConfig)(**SIZES, **own).build(len(scenes.names)) for name, own in OWN.items()}
    ways = {name: one_step(model.train(), images, targets) for name, model in models.items()}
    rows = rows_of(f"a training step, {BATCH} scenes of {images.shape[-1]} pixels", interleaved(ways, rounds or 15))
    print(table(rows))
    if rounds:
        return
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    record = {"what": WHAT, "command": "python results/family_costs.py", "date": time.strftime("%Y-%m-%d"),
              "machine": describe_machine(), "rows": [asdict(row) | {"parameters": counts[row.name]} for row in rows]}
    with replacing(FILE) as place:
        place.write(json_text(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
