"""Record the score at which the trained members find most and invent least: where F1 is best, at an IoU of 0.5.

    python results/family_thresholds.py

It reads the weights that results/family_race.py and results/family_sampling.py left under .cache/runs/ on this machine,
and adds what the record lacks. A minute a run.
"""
from pathlib import Path

import family_race
import family_sampling
import numpy as np
from side_by_side import ROOT, named_row, one_thread, read_rows, write_rows

from detr_nb.evaluation import evaluate_detections, precision_recall, predict_with_truth
from detr_nb.pretrained import pretrained_model

WHAT = "the score at which a trained member has its best F1 on 500 held-out scenes, and what a threshold of 0.3 costs"
PLANS = {name: module.planned(name) for module in (family_race, family_sampling) for name in module.NAMES}
USUAL = 0.3  # of every member with sigmoids


def measure(name: str) -> dict[str, float]:
    """The best threshold of one run, and F1 there and at the usual one."""
    plan = PLANS[name]
    model = pretrained_model(Path(plan.folder))
    seen = predict_with_truth(model, plan.data.held_out(), 25, None, None)
    judged = evaluate_detections(*zip(*seen, strict=True), np.array([0.5]))
    kept = judged.counted[0]
    scores = judged.scores[kept]
    precision, recall = precision_recall(judged.correct[0, kept], len(judged.truth))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best, usual = int(f1.argmax()), max(int((scores >= USUAL).sum()) - 1, 0)
    values = {"threshold": scores[best], "f1": f1[best], "f1_usual": f1[usual], "default": model.threshold}
    return {key: round(float(value), 4) for key, value in values.items()}


if __name__ == "__main__":
    one_thread()
    record = ROOT / "results" / "family_thresholds.json"
    rows = read_rows(record)
    known = {row["name"] for row in rows}
    for name, plan in PLANS.items():
        if name not in known and (Path(plan.folder) / "checkpoint.pt").exists():
            rows.append(named_row(name, measure))
            print(name, rows[-1], flush=True)
            write_rows(rows, list(PLANS), record, WHAT)
