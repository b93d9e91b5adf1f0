"""Record the experiment "train on shapes": one setting, one budget, one seed, one JSON file.

    python results/train_on_shapes.py --setting easy --minutes 5 --seed 0

A run that was stopped goes on when the command is given again. Scenes and checkpoints are kept under .cache/, which git
ignores. The clock counts steps and their data; drawing the scenes and evaluating do not count. Nothing else should run
beside it.
"""
import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from detr_nb.loading import ShapesData
from detr_nb.model import TinyModel
from detr_nb.runs import write_record
from detr_nb.shapes import DEFAULT, EASY
from detr_nb.training import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(".cache")  # relative, so that records name no folder of this machine
SETTINGS = {"easy": EASY, "default": DEFAULT}
PAPER_MODEL = TinyModel(pre_norm=False, dropout=0.1, temperature=10000)


def with_paper_rates(config: TrainConfig) -> TrainConfig:
    """The paper's rates, weights, norms and dropout; backbone, data, batch, schedule and budget stay ours."""
    optimizer = {"lr": 1e-4, "lr_backbone": 1e-5, "lr_muon": 0, "beta2": 0.999, "warmup": 0.0}
    weights = {"weight_ce": 1, "final_weight_ce": 1, "no_object_weight": 0.1}
    return replace(config, model=PAPER_MODEL, **optimizer, **weights, scales=())


def read_command_line() -> argparse.Namespace:
    """Setting, minutes, seed, and whose recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="easy")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--steps", type=int, help="fixed steps instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 where autocast allows it; see bf16_pays")
    parser.add_argument("--paper", action="store_true", help="the paper's rates and weights instead of ours")
    return parser.parse_args()


def main() -> None:
    """Train and record."""
    args = read_command_line()
    os.chdir(ROOT)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_flush_denormal(True)
    budget = f"{args.steps}steps" if args.steps else f"{args.minutes:g}min"
    name = f"shapes_{args.setting}_{budget}_{'paper_' if args.paper else ''}seed{args.seed}"
    config = TrainConfig(
        data=ShapesData(SETTINGS[args.setting], cache=str(CACHE / "scenes")),
        minutes=None if args.steps else args.minutes, steps=args.steps or 1, evaluations=8,
        bf16=args.bf16, seed=args.seed, folder=str(CACHE / "runs" / name),
    )
    run = fit(with_paper_rates(config) if args.paper else config)
    what = f"DETR from scratch on generated scenes, {args.setting} setting, {budget}"
    flags = f"--setting {args.setting} {f'--steps {args.steps}' if args.steps else f'--minutes {args.minutes:g}'}"
    flags += f" --seed {args.seed}{' --bf16' if args.bf16 else ''}{' --paper' if args.paper else ''}"
    write_record(run, what + (", the paper's rates and weights" if args.paper else ""),
           f"python results/train_on_shapes.py {flags}", Path("results") / f"{name}.json")
    print(name, run.line())


if __name__ == "__main__":
    main()
