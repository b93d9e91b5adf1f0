"""Measure what a training step of each descendant costs beside DETR's, with nothing else running: some ten minutes.

    python results/family_costs.py              writes results/family_costs.json
    python results/family_costs.py --rounds 2   a trial, which writes nothing

First all have the sizes of `detr_tiny` and learn from sixteen drawn scenes, then all have those of the paper
(ResNet-50, 100 queries) and learn from two larger ones. A round takes a step of each, in turn, on one core, so that
whatever else slows the machine slows all of them. Anchor DETR asks each point with one pattern, so that the number of
queries is the same.
"""
import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
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
from detr_nb.model import DETR, TINY, TINY_STRIDES, DETRConfig, ResNetConfig, TinyConfig
from detr_nb.notation import Target
from detr_nb.shapes import DEFAULT, Scenes

FILE = Path(__file__).resolve().with_suffix(".json")
WHAT = "seconds of a training step of DETR and its descendants at equal sizes, and their parameters"
SMALL = {"backbone": TinyConfig((32, 64, 128), TINY_STRIDES), "num_queries": 16, **TINY}
PAPER = {"backbone": ResNetConfig(pretrained=False), "num_queries": 100, "dim_feedforward": 2048, "dropout": 0.1}
KINDS = ("DETRConfig", "FocalDETR", "ConditionalDETR", "AnchorDETR", "DABDETR", "SMCADETR", "DNDETR")
OWN = {"AnchorDETR": {"num_query_pattern": 1}}


def one_step(model: DETR, images: Tensor, targets: list[Target]) -> Callable[[], None]:
    """What takes a step: forward, loss, backward, AdamW."""
    criterion, optimizer = criterion_for(model), torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        criterion.total(criterion(model(images, targets=targets), targets)).backward()
        optimizer.step()

    return step


def measure(what: str, sizes: dict, scenes: Scenes, rounds: int) -> list[dict[str, object]]:
    """Rows of one comparison, with the parameters of each model."""
    torch.manual_seed(0)
    pixels, targets = render_scenes(scenes, workers=1)
    images, classes = normalise(pixels), len(scenes.names)
    models = {kind: find_kind(kind, DETRConfig)(**sizes, **OWN.get(kind, {})).build(classes) for kind in KINDS}
    ways = {name: one_step(model.train(), images, targets) for name, model in models.items()}
    rows = rows_of(f"{what}, {len(images)} scenes of {images.shape[-1]} pixels", interleaved(ways, rounds))
    print(table(rows), flush=True)
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return [asdict(row) | {"parameters": counts[row.name]} for row in rows]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="a trial of so many rounds")
    trial = parser.parse_args().rounds
    one_thread()
    rows = measure("small", SMALL, Scenes(DEFAULT, 16, seed=0), trial or 15)
    rows += measure("as in the paper", PAPER, Scenes(replace(DEFAULT, size=512), 2, seed=0), trial or 5)
    if trial:
        return
    record = {"what": WHAT, "command": "python results/family_costs.py", "date": time.strftime("%Y-%m-%d"),
              "machine": describe_machine(), "rows": rows}
    with replacing(FILE) as place:
        place.write(json_text(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
