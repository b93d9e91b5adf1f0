"""Record which points one query reads, and how proposals become queries, for the figures of chapters 37 and 38.

    python results/family_points.py

It reads the weights that `results/family_sampling.py` left under .cache/runs/ (seed 0), and takes seconds.
"""
import os
import time
from pathlib import Path

from side_by_side import ROOT, one_thread

from detr_nb.explorables import ProposalView, SamplingView
from detr_nb.files import json_text, replacing
from detr_nb.measuring import describe_machine
from detr_nb.pretrained import pretrained_model
from detr_nb.shapes import DEFAULT, Scenes

WHAT = ("points that the first query of a trained Deformable DETR reads from 49 places of one held-out scene, and what"
        " all cells of a trained two-stage Deformable DETR propose for it")
KINDS = {"points": ("DeformableDETR", SamplingView), "proposals": ("TwoStageDETR", ProposalView)}


def main() -> None:
    """Load the two, look, and write the record."""
    one_thread()
    os.chdir(ROOT)
    runs, scenes = Path(".cache") / "runs", Scenes(DEFAULT, 20, seed=123)
    found = {name: view.record(pretrained_model(runs / f"sampling_{kind}_seed0"), scenes[13][0])
             for name, (kind, view) in KINDS.items()}
    record = {
        "what": WHAT, "command": "python results/family_points.py", "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(), "rows": [{"names": list(scenes.names), **found}],
    }
    with replacing(ROOT / "results" / "family_points.json") as file:
        file.write(json_text(record) + "\n")


if __name__ == "__main__":
    main()
