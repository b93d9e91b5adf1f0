"""Record what one query of each trained member sees and says when its place is moved, for the figure of chapter 30.

    python results/family_places.py

It reads the weights that `results/family_race.py` left under .cache/runs/ (seed 0), and takes seconds.
"""
import os
import time
from pathlib import Path

from side_by_side import ROOT, one_thread

from detr_nb.explorables import record_places
from detr_nb.files import json_text, replacing
from detr_nb.measuring import describe_machine
from detr_nb.pretrained import pretrained_model
from detr_nb.shapes import DEFAULT, Scenes

WHAT = "attention and box of the first query of five trained members from 49 places of one held-out scene"
KINDS = {"Conditional DETR": "ConditionalDETR", "Anchor DETR": "AnchorDETR", "DAB-DETR": "DABDETR", "SMCA": "SMCADETR",
         "DN-DETR": "DNDETR"}


def main() -> None:
    """Load the five, move a query of each, and write the record."""
    one_thread()
    os.chdir(ROOT)
    runs = Path(".cache") / "runs"
    models = {name: pretrained_model(runs / f"race_{kind}_seed0") for name, kind in KINDS.items()}
    scenes = Scenes(DEFAULT, 20, seed=123)
    record = {
        "what": WHAT, "command": "python results/family_places.py", "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "rows": [{"names": list(scenes.names), "places": record_places(models, scenes[13][0])}],
    }
    with replacing(ROOT / "results" / "family_places.json") as file:
        file.write(json_text(record) + "\n")


if __name__ == "__main__":
    main()
