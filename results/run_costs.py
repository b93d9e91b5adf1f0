"""Measure what a step of each recorded run of the family costs, with nothing else running: some ten minutes.

    python results/run_costs.py              writes results/run_costs.json
    python results/run_costs.py --rounds 1   a trial, which writes nothing

Each round takes the first steps of the runs of results/family_race.py and results/family_sampling.py, in turn, on one
core, with all that belongs to them: half of the precision, smaller pictures, Muon, the making of batches. Seconds are
those of the processor. (results/family_costs.py takes steps of the same models in full precision, with AdamW.)
"""
import argparse
import time
from dataclasses import asdict, replace

import family_race
import family_sampling
from side_by_side import ROOT, one_thread

from detr_nb.files import json_text, replacing
from detr_nb.measuring import describe_machine, rows_of, table
from detr_nb.training import TrainConfig, fit

STEPS = 25
WHAT = f"processor seconds of the first {STEPS} steps of each recorded run of the family, beside DETR's"
RACE = [name for name in family_race.MODELS if name != "DETR, 60 %"]
PLANS = {name: family_race.planned(f"{name}, seed 0") for name in RACE}
PLANS |= {name: family_sampling.planned(f"{name}, seed 0") for name in family_sampling.MODELS}


def first_steps(plan: TrainConfig) -> float:
    """What they take."""
    short = replace(plan, steps=STEPS, evaluations=0, folder="")
    before = time.process_time()
    fit(short)
    return time.process_time() - before


def main() -> None:
    """Measure and record; the first round is for warming up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="a trial of so many rounds")
    trial = parser.parse_args().rounds
    one_thread()
    seen = [{name: first_steps(plan) for name, plan in PLANS.items()} for _ in range((trial or 4) + 1)][1:]
    rows = rows_of(WHAT, {name: [one[name] for one in seen] for name in PLANS})
    print(table(rows), flush=True)
    if trial:
        return
    record = {"what": WHAT, "command": "python results/run_costs.py", "date": time.strftime("%Y-%m-%d"),
              "machine": describe_machine(), "rows": [asdict(row) for row in rows]}
    with replacing(ROOT / "results" / "run_costs.json") as place:
        place.write(json_text(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
